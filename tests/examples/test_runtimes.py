"""The script about other runtimes: quantisation before and after `apply`, and the page that it writes."""

import copy
from types import SimpleNamespace

import nncf
import pytest
import real_weights
import runtimes
import torch
from families import images, make
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor

from token_merge_plugin import apply, export, remove
from token_merge_plugin.trial.runtimes import RUNTIMES


def small():
    return make("ViT", depth=2)


def relative_error(output, expected):
    return ((output - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
@torch.no_grad()
def test_torchao_quantises_before_apply_as_after_it(config):
    model, x = small(), images("ViT")
    expected = apply(copy.deepcopy(model), 0.6)(x)
    first = apply(runtimes.by_torchao(copy.deepcopy(model), config()), 0.6)
    then = runtimes.by_torchao(apply(copy.deepcopy(model), 0.6), config())
    for patched in (first, then):
        linear = [module for module in patched.blocks.modules() if isinstance(module, nn.Linear)]
        assert all(isinstance(module.weight, TorchAOBaseTensor) for module in linear)
        assert 0 < relative_error(patched(x), expected) < 0.1
    assert torch.equal(first(x), then(x))
    unpatched = runtimes.by_torchao(copy.deepcopy(model), config())(x)
    assert torch.equal(remove(first)(x), unpatched)
    assert torch.equal(remove(then)(x), unpatched)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(small(), file, "onnx", 0.6, images=images("ViT"), dynamic_batch=True, rounds=0)
    return file


@pytest.mark.parametrize(
    ("quantise", "calibrated", "operator"),
    [
        (runtimes.by_onnx_runtime, False, "MatMulInteger"),
        (runtimes.by_onnx_runtime, True, "DequantizeLinear"),
        (runtimes.by_openvino, False, "Convert"),
        (runtimes.by_openvino, True, "FakeQuantize"),
    ],
)
@torch.no_grad()
def test_exported_files_are_quantised_by_their_runtimes(quantise, calibrated, operator, onnx_file, tmp_path):
    file, x = tmp_path / "model.onnx", images("ViT", batch=8)
    file.write_bytes(onnx_file.read_bytes())
    run = quantise(file, x if calibrated else None)
    expected = apply(small(), 0.6)(x)
    assert 0 < relative_error(run(x), expected) < 0.2
    to, written = ("onnx", ".int8.onnx") if quantise is runtimes.by_onnx_runtime else ("openvino", ".xml")
    assert operator in RUNTIMES[to].contents(None, file.with_suffix(written)).operators


def test_the_page_goes_on_from_the_log(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(
        runtimes,
        "of_families",
        lambda names: [(name, lambda name=name: done.append(name) or ["0", "1", "2"]) for name in names],
    )
    arguments = ["--parts", "families", "--output", str(tmp_path / "r.md"), "--log", str(tmp_path / "r.jsonl")]
    runtimes.main([*arguments, "--families", "Swin"])
    runtimes.main([*arguments, "--families", "Swin", "BEiT"])
    assert done == ["Swin", "BEiT"]
    page = (tmp_path / "r.md").read_text()
    assert "| Swin | 0 | 1 | 2 |\n| BEiT | 0 | 1 | 2 |\n" in page
    assert "## Quantisation" not in page
    assert f"nncf {nncf.__version__}" in page
    assert "BEiT | 0 | 1 | 2" in capsys.readouterr().out


def test_the_row_of_a_compiled_model(monkeypatch):
    # Dynamo runs, and what it makes is run as it is.
    monkeypatch.setattr(torch, "compile", lambda model, **_: torch._dynamo.optimize("eager")(model))
    difference, *speeds = runtimes.compiled(small(), 3, images("ViT", batch=8))
    assert float(difference) < 1e-4
    assert all(speed.split()[0].endswith("x") for speed in speeds)
    assert len(speeds) == 2


@torch.no_grad()
def test_quantised_tokens_are_compared_with_those_of_the_model_as_it_was(monkeypatch, tmp_path):
    model, x = small(), images("ViT", batch=8)
    monkeypatch.setattr(real_weights, "load_backbone", lambda folder: copy.deepcopy(model))
    monkeypatch.setattr(real_weights, "photographs", lambda *_: SimpleNamespace(images=x))
    rows = {}
    for name, cells in runtimes.of_tokens(tmp_path / "tokens", tmp_path, [tmp_path]):
        rows[name] = [float(cell) for cell in cells()]
        if name.startswith("ONNX Runtime"):
            break
    expected = model.forward_features(x[1::2])
    merged = apply(copy.deepcopy(model), 0.7).forward_features(x[1::2])
    error = ((merged - expected)[:, 1:].flatten(1).norm(dim=1) / expected[:, 1:].flatten(1).norm(dim=1)).mean()
    assert rows["none"][0] == rows["none"][2] == 0
    assert rows["none"][1] == pytest.approx(error.item(), abs=6e-4)
    assert len(rows) == 6
    for patches, patched, token, patched_token in list(rows.values())[1:]:
        assert 0 < patches < patched
        assert 0 < token < patched_token


def test_photographs_are_needed_for_what_is_measured_on_them(capsys, tmp_path):
    with pytest.raises(SystemExit):
        runtimes.main(["--parts", "tokens", "--output", str(tmp_path / "r.md")])
    assert "--parts tokens needs --weights and --photographs." in capsys.readouterr().err
