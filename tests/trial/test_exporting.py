"""Export: the file does what the model does, in each runtime, or there is no file."""

import sys

import onnx
import pytest
import torch
from checks import Kept
from families import FAMILIES, fingerprint, images, make
from onnx import TensorProto, helper
from torch import nn

from token_merge_plugin import (
    ConfigError,
    DataError,
    ExportError,
    MergeConfig,
    MissingExtraError,
    UnsupportedModelError,
    apply,
    export,
    is_patched,
    remove,
)
from token_merge_plugin.method.merging import assign
from token_merge_plugin.trial import exporting
from token_merge_plugin.trial.runtimes import RUNTIMES, OpenVino

SUFFIXES = {to: runtime.suffix for to, runtime in RUNTIMES.items()}


def small(**options):
    """Return a ViT of two blocks, which are exported in seconds; tokens are merged in the first."""
    return make("ViT", depth=2, **options)


@pytest.fixture(scope="module", params=RUNTIMES)
def exported(request, tmp_path_factory):
    """A model exported to each runtime, with a dynamic batch: (runtime, model, result)."""
    to = request.param
    file = tmp_path_factory.mktemp(to) / f"model{SUFFIXES[to]}"
    model = small()
    x = images("ViT", batch=9)
    rounds = int(to == "torch")  # of the others, two models would take half a minute
    return RUNTIMES[to], model, export(model, file, to, 0.6, images=x, dynamic_batch=True, rounds=rounds)


@torch.no_grad()
def test_a_file_gives_what_the_model_gives_at_any_batch(exported):
    runtime, model, result = exported
    patched = apply(make("ViT", depth=2), 0.6)
    assert not torch.allclose(patched(images("ViT")), model(images("ViT")), atol=1e-4)
    run = runtime.load(result.files[0])
    for batch in (1, 3, 8):
        x = images("ViT", batch=batch, seed=batch)
        (output,) = run(x)
        torch.testing.assert_close(output, patched(x), rtol=1e-4, atol=1e-5)
    assert sorted(result.differences) == [1, 2, 8]
    assert max(result.differences.values()) < 1e-5
    assert result.agreement == 1


@pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="needs torch 2.6")
@pytest.mark.parametrize("to", ["torch", "onnx"])
@torch.no_grad()
def test_a_file_takes_images_of_any_size_where_the_model_does(to, tmp_path):
    model, x = make("ViT, any image size", depth=2), images("ViT, any image size")
    height, width = x.shape[2:]
    options = {"images": x, "dynamic_batch": True, "dynamic_size": True, "rounds": 0}
    result = export(model, tmp_path / f"model{SUFFIXES[to]}", to, 0.6, **options)
    assert list(result.resized) == [(2 * height, width), (height, 2 * width)]
    assert max(result.resized.values()) < 1e-5
    assert f", {2 * height} x {width} pixels {result.resized[2 * height, width]:.1e}, " in str(result)
    run, patched = RUNTIMES[to].load(result.files[0]), apply(model, 0.6)
    x = torch.randn(3, 3, height + 8, width + 16)
    torch.testing.assert_close(run(x)[0], patched(x), rtol=1e-4, atol=1e-5)


def test_a_file_is_described_and_timed(exported):
    *_, result = exported
    assert result.size == sum(file.stat().st_size for file in result.files)
    assert {file.name for file in result.files[0].parent.iterdir()} == {file.name for file in result.files}
    timed = bool(result.speed_ups)
    assert list(result.speed_ups) == ([1, 8] if timed else [])
    assert result.contents.scatters == ()
    numbers = [*result.contents.operators.values()]
    assert numbers == sorted(numbers, reverse=True)
    text = str(result)
    for part in (
        "VisionTransformer, merge, keep rate 0.6, for ",
        f"{sum(numbers):,} operators: {next(iter(result.contents.operators))} {numbers[0]}, ",
        "scatters with a reduction: none",
        "largest difference to PyTorch on 9 images, as a share of the largest output: batch 1 ",
        "top-1 agrees on 100.00%",
        *(["speed-up over the unpatched model, exported likewise: batch 1 "] if timed else []),
    ):
        assert part in text


class Wrong(Kept):
    """An exporter that is slightly wrong, as `how` has it."""

    def __init__(self, how):
        self.how = how

    def load(self, path):
        run = super().load(path)
        return lambda x: [self.how(output) for output in run(x)]


@pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="needs torch 2.6")
def test_a_file_that_is_wrong_at_another_size_is_refused(tmp_path, monkeypatch):
    x = images("ViT, any image size")

    class WrongElsewhere(Kept):
        def load(self, path):
            run = super().load(path)
            return lambda y: [output + (y.shape[2:] != x.shape[2:]) for output in run(y)]

    monkeypatch.setitem(RUNTIMES, "torch", WrongElsewhere())
    model = make("ViT, any image size", depth=2)
    with pytest.raises(ExportError, match=r"at \d+ x \d+ pixels outputs differ by"):
        export(model, tmp_path / "model.pt2", "torch", images=x, dynamic_size=True, rounds=0)
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "model.pt2", "torch", images=x, rounds=0)


@pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="needs torch 2.6")
@pytest.mark.parametrize("output", [0, 1])
def test_a_number_that_is_none_at_another_size_is_refused_in_whichever_output(output, tmp_path, monkeypatch):
    x = images("ViT, any image size")

    class NoNumberElsewhere(Kept):
        def load(self, path):
            run = super().load(path)

            def spoilt(y):
                outputs = run(y)
                if y.shape[2:] != x.shape[2:]:
                    outputs[output] = outputs[output] * float("nan")
                return outputs

            return spoilt

    monkeypatch.setitem(RUNTIMES, "torch", NoNumberElsewhere())
    model = Two()
    model.encoder = make("ViT, any image size", depth=2)
    with pytest.raises(ExportError, match=r"at \d+ x \d+ pixels outputs differ by nan"):
        export(model, tmp_path / "model.pt2", "torch", images=x, dynamic_size=True, rounds=0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setitem(RUNTIMES, "torch", Kept())


class Two(nn.Module):
    """A module with a model in it, and two outputs."""

    def __init__(self):
        super().__init__()
        self.encoder = small()

    def forward(self, x):
        features = self.encoder.forward_features(x)
        return {"features": features, "classes": self.encoder.forward_head(features)}


def test_a_static_file_takes_one_image(tmp_path, kept):
    result = export(small(), tmp_path / "model.pt2", "torch", images=images("ViT"), rounds=1)
    assert list(result.differences) == list(result.speed_ups) == [1]
    assert result.images == 8  # two, repeated


def test_the_model_is_not_altered(tmp_path, kept):
    model = small().train()
    before = fingerprint(model)
    export(model, tmp_path / "model.pt2", "torch", images=images("ViT"), rounds=0)
    assert fingerprint(model) == before
    assert model.training


@pytest.mark.parametrize(
    ("patch", "keep_rate", "expected"),
    [(None, None, 0.7), (0.5, None, 0.5), (0.5, 0.8, 0.8), (None, MergeConfig({0: 0.5}), {0: 0.5})],
)
def test_what_is_applied_is_what_is_asked_for_or_what_the_model_has(patch, keep_rate, expected, tmp_path, kept):
    model = small()
    if patch is not None:
        apply(model, patch)
    result = export(model, tmp_path / "model.pt2", "torch", keep_rate, images=images("ViT"), rounds=0)
    assert result.config.keep_rate == expected
    assert is_patched(model) == (patch is not None)


@torch.no_grad()
def test_a_learned_fusion_is_exported(tmp_path, kept):
    model, x = apply(small(), 0.6, multi_scale="learned"), images("ViT", batch=1)
    next(p for name, p in model.named_parameters() if name.endswith("fusion.gates")).fill_(1.0)
    export(model, tmp_path / "model.pt2", "torch", images=x, rounds=0)
    (output,) = Kept().load(tmp_path / "model.pt2")(x)
    torch.testing.assert_close(output, model(x))
    assert not torch.allclose(output, apply(remove(model), 0.6)(x), atol=1e-4)


def test_a_model_inside_of_another_is_exported_with_all_its_outputs(tmp_path, kept):
    result = export(Two(), tmp_path / "model.pt2", "torch", images=images("ViT"), dynamic_batch=True, rounds=0)
    assert result.agreement is None
    assert len(result.differences) == 3
    assert len(Kept().load(tmp_path / "model.pt2")(images("ViT"))) == 2


def test_a_model_is_loaded_by_its_name(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(exporting, "load_model", lambda name: make("ViT", depth=2) if name == "small" else None)
    result = export("small", tmp_path / "model.pt2", "torch", images=images("ViT"), rounds=0)
    assert result.model == "VisionTransformer"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda x: x + 0.02 * x.abs().max(),
            r"at batch [128] outputs differ by 0\.02 of the largest output, and 0\.01 ",
        ),
        (lambda x: x * float("nan"), r"at batch 1 outputs differ by nan of "),
        (lambda x: x[:, :2], r"at batch 1 outputs differ by inf of "),
        # Right for a batch of one image, as OpenVINO was.
        (lambda x: torch.cat((x[:1], x[1:] * 2)), r"at batch [28] outputs differ by "),
    ],
)
def test_a_wrong_file_is_not_left_there(how, message, tmp_path, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "torch", Wrong(how))
    file = tmp_path / "model.pt2"
    file.write_bytes(b"what was there")
    with pytest.raises(ExportError, match=rf"does not give what this VisionTransformer gives: {message}"):
        export(small(), file, "torch", images=images("ViT"), dynamic_batch=True, replace=True, rounds=0)
    assert [part.read_bytes() for part in tmp_path.iterdir()] == [b"what was there"]


def test_a_larger_difference_is_allowed_on_request(tmp_path, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "torch", Wrong(lambda x: x + 0.02 * x.abs().max()))
    result = export(small(), tmp_path / "model.pt2", "torch", images=images("ViT"), tolerance=0.03, rounds=0)
    assert result.differences[1] == pytest.approx(0.02, rel=1e-3)


class Failing(Kept):
    """A runtime that cannot deal with patched models, or with none, at a step or at a batch size."""

    def __init__(self, any_model, step):
        self.any_model, self.step = any_model, step

    def fail(self, model, step):
        if step == self.step and (self.any_model or is_patched(model)):
            try:
                raise RuntimeError("no rule for aten.topk:\nmore lines")
            except RuntimeError as error:
                raise ValueError("a long story") from error

    def save(self, program, path):
        self.fail(program, "save")
        super().save(program, path)

    def load(self, path):
        model, run = torch.load(path, weights_only=False), super().load(path)
        self.fail(model, "load")
        return lambda x: self.fail(model, len(x)) or run(x)


@pytest.mark.parametrize("step", ["save", "load", 1, 8])
@pytest.mark.parametrize(
    ("any_model", "message"),
    [
        (True, r"^VisionTransformer, unpatched, does not export to torch\.export: no rule for aten\.topk\.$"),
        (
            False,
            r"^VisionTransformer, patched, does not .*: no rule for aten\.topk\. Unpatched it does\. Please report",
        ),
    ],
)
def test_a_model_that_does_not_export_is_refused_by_name(any_model, message, step, tmp_path, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "torch", Failing(any_model, step))
    with pytest.raises(ExportError, match=message):
        export(small(), tmp_path / "model.pt2", "torch", images=images("ViT"), dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_exports_with_the_patch_alone_is_exported_without_a_speed_up(tmp_path, monkeypatch):
    class PatchedAlone(Kept):
        def save(self, program, path):
            if not is_patched(program):
                raise RuntimeError("no rule")
            super().save(program, path)

    monkeypatch.setitem(RUNTIMES, "torch", PatchedAlone())
    assert export(small(), tmp_path / "model.pt2", "torch", images=images("ViT"), rounds=1).speed_ups == {}
    assert (tmp_path / "model.pt2").exists()


def test_bad_input_is_refused_before_the_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *_: pytest.fail("the work has begun"))
    x = images("ViT")
    for name in ("there.onnx", "weights.bin"):
        (tmp_path / name).touch()
    (tmp_path / "folder.onnx").mkdir()
    cases = [
        (small(), "model.onnx", {"to": "tensorrt"}, ConfigError, "'tensorrt' is not known. Choose one of 'onnx', "),
        (small(), "model.pt", {"to": "torch"}, DataError, r"does not end in \.pt2, as files for torch.export do"),
        (small(), "there.onnx", {}, DataError, r"there\.onnx is there already.*replace=True"),
        (small(), "weights.xml", {"to": "openvino"}, DataError, r"weights\.bin is there already"),
        (small(), "folder.onnx", {"replace": True}, DataError, "it is a folder"),
        (small(), "nowhere/model.onnx", {}, DataError, "there is no folder"),
        (nn.Linear(2, 2), "model.onnx", {}, UnsupportedModelError, "Linear"),
        (small(), "model.onnx", {"keep_rate": 1.5}, ConfigError, "keep_rate"),
        (small(), "model.onnx", {"images": x[:, :1]}, DataError, "does not take images"),
        (small(), "model.onnx", {"images": x[:0]}, DataError, "There are no images"),
        (small(), "model.onnx", {"images": x, "dynamic_size": True}, ConfigError, "(?s)of other sizes.*|torch 2.6"),
    ]
    for model, name, options, error, message in cases:
        with pytest.raises(error, match=message):
            export(model, tmp_path / name, **{"images": x} | options)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_package_is_an_error_that_names_the_extra(to, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .*pip install {package}\..*\[{to}\]"):
        export(small(), tmp_path / f"model{SUFFIXES[to]}", to)


def test_scatters_that_reduce_are_found_wherever_they_are_in_an_onnx_graph(tmp_path):
    def scatter(reduction):
        return helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=0, reduction=reduction)

    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    inner = helper.make_graph([scatter("add"), scatter("none")], "inner", [], [y])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    given = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", TensorProto.FLOAT, [2]),
            ("i", TensorProto.INT64, [2]),
            ("u", TensorProto.FLOAT, [2]),
            ("c", TensorProto.BOOL, []),
        )
    ]
    model = helper.make_model(
        helper.make_graph([branch], "outer", given, [y]), opset_imports=[helper.make_opsetid("", 18)]
    )
    onnx.save(model, tmp_path / "model.onnx")
    contents = RUNTIMES["onnx"].contents(None, tmp_path / "model.onnx")
    assert contents.scatters == ("ScatterElements", "ScatterElements")
    assert contents.operators == {"ScatterElements": 4, "If": 1}
    assert contents.form == "ONNX, opset 18"


class Assign(nn.Module):
    def forward(self, cost):
        return assign(cost, 0.5).rest


def test_openvino_decides_for_every_image_of_a_batch_as_for_one(tmp_path):
    """Its CPU plugin joins a reduction with the product behind it, wrongly from two images on."""
    cost = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    cost = cost + cost.transpose(1, 2)
    program = torch.export.export(Assign(), (cost,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    OpenVino().save(program, tmp_path / "assign.xml")
    (output,) = OpenVino().load(tmp_path / "assign.xml")(cost)
    assert output.sort().values.equal(assign(cost, 0.5).rest.sort().values)


# They do not export to ONNX unpatched, with torch 2.14; where they do with the patch, the file is held to the same.
NOT_UNPATCHED = ("Hiera", "SAM")


# A minute a model, for which the whole suite has no time.
@pytest.mark.sweep
@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("kind", [next(iter(table)) for table in FAMILIES.values()])
def test_every_family_is_exported_with_a_batch_of_any_size(kind, to, tmp_path):
    file = tmp_path / f"model{SUFFIXES[to]}"
    try:
        result = export(make(kind), file, to, 0.6, images=images(kind, batch=8), dynamic_batch=True, rounds=0)
    except ExportError as error:
        if kind not in NOT_UNPATCHED or "unpatched, does not export" not in str(error):
            raise
        return
    assert max(result.differences.values()) < 1e-3
    assert result.contents.scatters == ()
