"""Trials of dense models: the errors of their tokens, and the change of what a head makes of these."""

import json

import pytest
import timm
import torch
from checks import draw_two_classes
from families import SMALL_SWIN, make
from torch import nn

from token_merge_plugin import ConfigError, MergeConfig, apply, remove, summary
from token_merge_plugin.cli import main
from token_merge_plugin.trial.accuracy import Comparison, compare
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.images import Tensors
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import features, forward
from token_merge_plugin.trial.run import evaluate, run_trial

FAST = {"rounds": 1, "seconds": 0.0}
ERRORS = ("patch_error", "class_error", "head_change")
CLASS_FIELDS = ("top1", "top5", "top1_difference", "top1_interval", "agreement", "kl")


def make_images(number=7, size=32):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens_of(model, images, config):
    """Return what forward_features makes of each image alone, unpatched and patched, in double precision."""
    found = []
    with torch.no_grad():
        for change in (remove, lambda model: apply(model, config)):
            change(model.eval())
            found.append([model.forward_features(image[None])[0].double() for image in images])
    remove(model)
    return found


def mean_error(unpatched, patched, part):
    """Return the mean over images of |patched - unpatched| / |unpatched| of a part of their tokens, summed by hand."""
    errors = []
    for a, b in zip(unpatched, patched, strict=True):
        a, b = part(a).flatten().tolist(), part(b).flatten().tolist()
        squares = sum((y - x) ** 2 for x, y in zip(a, b, strict=True))
        errors.append((squares / sum(x**2 for x in a)) ** 0.5)
    return sum(errors) / len(errors)


class PatchHead(nn.Module):
    """Gives each patch three numbers; in training mode, others each time."""

    def __init__(self, channels=32, prefix=1):
        super().__init__()
        self.prefix, self.dropout, self.linear = prefix, nn.Dropout(0.5), nn.Linear(channels, 3)
        self.calls = []

    def forward(self, tokens):
        self.calls.append((self.training, torch.is_grad_enabled(), tuple(tokens.shape)))
        return self.linear(self.dropout(tokens[:, self.prefix :]))


@pytest.fixture
def head():
    torch.manual_seed(3)
    return PatchHead()


def test_errors_of_a_model_without_classes_are_means_over_the_images():
    model, images, config = make(num_classes=0), make_images(), MergeConfig(0.5)
    unpatched, patched = tokens_of(model, images, config)
    first, row = run_trial(model, Tensors(images, None, 3), (0.5,), **FAST).rows
    assert first.patch_error == first.class_error == 0
    assert row.patch_error == pytest.approx(mean_error(unpatched, patched, lambda x: x[1:]), rel=1e-4)
    assert row.class_error == pytest.approx(mean_error(unpatched, patched, lambda x: x[0]), rel=1e-4)
    assert row.patch_error > 0.01
    assert row.class_error > 0.001
    assert 0 < row.cosine < 1
    assert row.head_change is None
    assert all(getattr(row, name) is None for name in CLASS_FIELDS)


@pytest.mark.parametrize(("options", "read"), [({"num_classes": 0}, False), ({}, True)])
def test_work_and_time_are_those_of_all_tokens(options, read, head, monkeypatch):
    """A head that reads the class token needs less, but it is the tokens that are judged."""
    ran, config, head = [], MergeConfig(0.5), head if read else None
    model, images = make(**options), make_images()

    def timed(model, configs, images, use, **rest):
        ran.append(use)
        return [[1.0]] * len(configs)

    monkeypatch.setattr("token_merge_plugin.trial.speed.time_in_turns", timed)
    row = run_trial(model, Tensors(images, None, 3), (config,), head=head, **FAST).rows[1]
    less, all_of_it = (count_macs(apply(model, config), images[:1], use) for use in (forward, features))
    assert less < all_of_it == round(1e9 * row.gmacs)
    assert set(ran) == {features}
    other = evaluate(model, Tensors(images), config, head=head).rows[1]
    assert other.gmacs == row.gmacs
    if not read:
        assert summary(apply(model, config)).macs == all_of_it


def test_a_model_with_classes_is_judged_by_these_unless_a_head_is_given(head):
    data = Tensors(make_images(), torch.arange(7) % 5)
    row = run_trial(make(), data, (0.5,), **FAST).rows[1]
    assert all(getattr(row, name) is None for name in ERRORS)
    assert row.top1 is not None
    row = run_trial(make(), data, (0.5,), head=head, **FAST).rows[1]
    assert all(getattr(row, name) > 0 for name in ERRORS)
    assert all(getattr(row, name) is None for name in CLASS_FIELDS)


def test_a_head_gets_the_tokens_in_eval_mode_without_gradients(head):
    model, images, config = make(), make_images(), MergeConfig(0.5)
    unpatched, patched = tokens_of(model, images, config)
    head.train()
    first, row = run_trial(model, Tensors(images, None, 3), (0.5,), head=head, **FAST).rows
    assert head.training
    assert head.dropout.training
    assert set(head.calls) == {(False, False, (batch, 65, 32)) for batch in (1, 3)}
    with torch.no_grad():
        pairs = [
            (head.linear(a[1:].float()), head.linear(b[1:].float())) for a, b in zip(unpatched, patched, strict=True)
        ]
    assert first.head_change == 0
    assert row.head_change == pytest.approx(sum((a - b).abs().mean().item() for a, b in pairs) / 7, rel=1e-4)


def test_one_setting_is_evaluated_with_the_head_as_in_a_trial(head):
    data = Tensors(make_images())
    row = run_trial(make(), data, (0.5,), head=head, **FAST).rows[1]
    other = evaluate(make(), data, MergeConfig(0.5), head=head).rows[1]
    assert [getattr(other, name) for name in ERRORS] == [getattr(row, name) for name in ERRORS]


def test_a_head_may_be_any_function_with_a_number_an_image():
    row = evaluate(make(), Tensors(make_images()), MergeConfig(0.5), head=lambda x: x.mean((1, 2))).rows[1]
    assert row.head_change > 0


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({}, 1), ({"reg_tokens": 3}, 4), ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, 2)],
)
def test_registers_are_neither_class_token_nor_patches(options, prefix):
    model, images, config = make(num_classes=0, **options), make_images(4), MergeConfig(0.5)
    unpatched, patched = tokens_of(model, images, config)
    row = evaluate(model, Tensors(images), config).rows[1]
    assert row.patch_error == pytest.approx(mean_error(unpatched, patched, lambda x: x[prefix:]), rel=1e-4)
    if "class_token" in options:
        assert row.class_error is None
    else:
        assert row.class_error == pytest.approx(mean_error(unpatched, patched, lambda x: x[0]), rel=1e-4)


def test_all_of_a_grid_is_patch_tokens():
    model = timm.create_model("swin_tiny_patch4_window7_224", **SMALL_SWIN | {"num_classes": 0})
    images, config = make_images(2, 112), MergeConfig(0.5)
    unpatched, patched = tokens_of(model, images, config)
    assert unpatched[0].ndim == 3  # [H, W, C]
    row = evaluate(model, Tensors(images), config, head=lambda grid: grid.permute(0, 3, 1, 2)).rows[1]
    assert row.patch_error == pytest.approx(mean_error(unpatched, patched, lambda x: x), rel=1e-4)
    assert row.class_error is None
    assert row.head_change > 0


def test_a_model_that_returns_its_class_tokens_alone_has_no_patch_error():
    row = evaluate(make("PiT", num_classes=0), Tensors(make_images(2, 112)), MergeConfig(0.5)).rows[1]
    assert row.patch_error is None
    assert row.class_error > 0


def test_where_nothing_is_pooled_the_error_of_the_patch_tokens_stands_in_for_the_cosine():
    row = evaluate(make(num_classes=0, global_pool=""), Tensors(make_images()), MergeConfig(0.5)).rows[1]
    assert row.cosine is None
    assert row.patch_error > 0


def test_tokens_run_through_the_model_once_for_each_contender(head):
    model, passes = make(), []
    model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    images = make_images(4)
    compare(model.eval(), [None, MergeConfig(0.5)], images, torch.zeros(4), batch_size=2, head=head)
    assert len(passes) == 4


class Interrupted(Tensors):
    """Tensors whose reading is interrupted behind the first two batches."""

    def batches(self, start=0):
        for number, batch in enumerate(super().batches(start)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_trial_goes_on_with_the_errors(tmp_path, head):
    log, images = tmp_path / "trial.jsonl", make_images(10)
    whole = run_trial(make(), Tensors(images, None, 3), (0.5,), head=head, **FAST)
    part = run_trial(make(), Interrupted(images, None, 3), (0.5,), head=head, log=log, **FAST)
    assert (part.images, part.total_images) == (6, 10)
    resumed = run_trial(make(), Tensors(images, None, 3), (0.5,), head=head, log=log, **FAST)
    assert resumed.images == 10
    for name in ERRORS:
        assert getattr(resumed.rows[1], name) == pytest.approx(getattr(whole.rows[1], name), rel=1e-5)
        assert getattr(part.rows[1], name) != pytest.approx(getattr(whole.rows[1], name), rel=1e-5)


def test_results_with_another_head_are_not_mixed_in(tmp_path, head):
    log, data = tmp_path / "trial.jsonl", Tensors(make_images(3))
    run_trial(make(), data, (0.5,), head=head, log=log, **FAST)
    for other in (PatchHead(), None):
        with pytest.raises(ConfigError, match="other work: it differs in head"):
            run_trial(make(), data, (0.5,), head=other, log=log, **FAST)


def test_a_log_from_before_there_were_errors_gives_none_for_them(tmp_path):
    log, images = tmp_path / "trial.jsonl", make_images(6)
    part = Interrupted(images, None, 2)
    run_trial(make(num_classes=0), part, (0.5,), log=log, **FAST)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    for entry in entries:
        entry["counts"] = {name: values[:8] for name, values in entry.get("counts", {}).items()}
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    row = run_trial(make(num_classes=0), Tensors(images, None, 2), (0.5,), log=log, **FAST).rows[1]
    assert row.cosine is not None
    assert row.patch_error is None


def test_heads_that_cannot_be_compared_are_refused_before_anything_is_timed(head):
    data = Tensors(make_images(3))
    for bad, given in ((lambda x: [x], "list"), (lambda x: x.mean(), r"\(\)"), (lambda x: x[0], r"\(65, 32\)")):
        with pytest.raises(ConfigError, match=f"head returned {given} for one image"):
            run_trial(make(), data, (0.5,), head=bad, **FAST)
    with pytest.raises(ConfigError, match=r"Sequential has no such method. Give the model"):
        run_trial(nn.Sequential(make()), data, (0.5,), head=head, **FAST)
    shapes = iter(range(1, 9))
    with pytest.raises(ConfigError, match="only outputs of one shape"):
        evaluate(make(), data, MergeConfig(0.5), head=lambda x: x[..., : next(shapes)])


def test_half_precision_errors_are_near_those_of_single_precision(head):
    data = Tensors(make_images())
    single = evaluate(make(), data, MergeConfig(0.5), head=head).rows[1]
    half = evaluate(make(), data, MergeConfig(0.5), head=head, dtype=torch.bfloat16).rows[1]
    assert half.patch_error == pytest.approx(single.patch_error, rel=0.2)
    assert half.head_change == pytest.approx(single.head_change, rel=0.2)


def test_processes_add_their_errors_up(monkeypatch, head):
    images, configs, parts = make_images(7), {"unpatched": None, "merge": MergeConfig(0.5)}, []
    whole = evaluate(make(), Tensors(images), MergeConfig(0.5), head=head).rows[1]
    for share in (images[:4], images[4:]):
        part = Comparison(make(), Tensors(share), head)
        part.measure(configs, Journal(None, {}), progress=False)
        parts.append(part)

    def all_gather_object(received, _):
        received[:] = [(dict(part.counts), [], len(part.data), False) for part in parts]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert not parts[0].gather(interrupted=False)
    for name in ERRORS:
        assert parts[0].fields("merge")[name] == pytest.approx(getattr(whole, name), rel=1e-5)


def test_the_command_reports_the_errors_of_a_model_without_classes(tmp_path, capsys):
    draw_two_classes(tmp_path / "photos", 4, (40, 40))
    options = ["--no-pretrained", "--num-classes", "0", "--data", str(tmp_path / "photos"), "--keep-rate", "0.7"]
    output = tmp_path / "result.json"
    assert main(["evaluate", "--model", "test_vit", *options, "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "patch error" in printed
    assert "class error" in printed
    row = json.loads(output.read_text())["rows"][1]
    assert row["patch_error"] > 0
    assert row["top1"] is None
