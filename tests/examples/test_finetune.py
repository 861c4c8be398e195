"""examples/finetune.py: the same result on any number of processes and after any interruption, and the right loss."""

import json
import math
import random
import sys

import finetune
import numpy as np
import pytest
import timm
import torch
from checks import EXAMPLES, TORCHRUN, draw_two_classes, run_program
from timm.models import load_checkpoint
from train_reference import create_model

from token_merge_plugin import MergeConfig, apply
from token_merge_plugin.builtin import create_reference_model, load_images, load_pixels
from token_merge_plugin.models.lvvit import random_box, token_labeling_loss
from token_merge_plugin.trial.fusion import remembered
from token_merge_plugin.trial.images import Tensors
from token_merge_plugin.trial.measuring import plan
from token_merge_plugin.trial.models import load_model
from token_merge_plugin.trial.run import evaluate

# Plain gradient steps where numbers of processes are compared: Adam would blow rounding up to whole steps, in weights
# whose gradient is zero but for it.
OPTIONS = ["--epochs", "2", "--batch-size", "8", "--keep-rate", "0.5", "--multi-scale", "learned", "--seed", "1"]
OPTIONS += ["--warmup-epochs", "1.5", "--ema", "0.5"]
SGD = ["--opt", "sgd", "--lr", "0.02", "--distill", "0.3"]
# Three steps an epoch: checkpoints behind steps 3, 4 and 6.
SAVING = ["--save-every", "4"]
KILLED_BEHIND = 5


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.contiguous().numpy().tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images to train on and 11 to test on, as IDX files."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = load_pixels()
    for split, part in (("train", slice(24)), ("t10k", slice(24, 35))):
        write_idx(folder / f"{split}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels[part])
    return folder


def run(data, output, *options):
    return finetune.main(["--data", str(data), "--output", str(output), "--device", "cpu", "--workers", "0", *options])


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def state(output):
    """Everything that was learned, by name."""
    content = torch.load(output / "weights.pth", weights_only=True)
    parts = ("state_dict", "state_dict_ema")
    return {f"{part} {name}": value for part in parts for name, value in content.get(part, {}).items()}


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """An uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("one")
    assert run(data, output, *OPTIONS, *SGD, *SAVING) == 0
    return output


def killed(tmp_path, launcher, data, output, *options):
    """Run the script, and let it be killed in the middle of an epoch, a step behind a checkpoint."""
    script = tmp_path / "killed.py"
    script.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import finetune

take_step = finetune.Run.take_step

def take_step_or_die(self, *batch):
    if self.step == {KILLED_BEHIND}:
        os.kill(os.getpid(), signal.SIGKILL)
    take_step(self, *batch)

finetune.Run.take_step = take_step_or_die
if __name__ == "__main__":
    sys.exit(finetune.main())
"""
    )
    command = [*launcher, script, "--data", data, "--output", output, "--device", "cpu", *options]
    # One thread, as in the tests' own process: sums over several have other bits.
    ended = run_program(*command, OMP_NUM_THREADS="1")
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr or ended.returncode == -9, ended.stderr
    saved = torch.load(output / "last.checkpoint", weights_only=True)
    assert (saved["step"], len(saved["history"])) == (4, 2)


@pytest.mark.parametrize(("first", "then"), [([], ["--fsdp"]), (["--fsdp"], [])], ids=["DDP, FSDP2", "FSDP2, DDP"])
def test_two_processes_killed_and_resumed_end_where_one_does(first, then, one, data, tmp_path):
    output = tmp_path / "two"
    options = [*OPTIONS, *SGD, *SAVING, "--workers", "0"]
    killed(tmp_path, TORCHRUN, data, output, *options, *first)
    command = [*TORCHRUN, EXAMPLES / "finetune.py", "--data", data, "--output", output, "--device", "cpu", *options]
    ended = run_program(*command, *then)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1  # of the second epoch, by one process alone
    for line, expected in zip(log(output), log(one), strict=True):
        assert line.pop("loss", 0) == pytest.approx(expected.pop("loss", 0), rel=1e-4)
        assert line == expected
    found, expected = state(output), state(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=5e-6, msg=lambda text, name=name: name + text)


def test_a_killed_run_ends_with_the_same_bits(data, tmp_path):
    options = [*OPTIONS, *SAVING, "--mixup", "0.8", "--cutmix", "1.0", "--layer-decay", "0.8", "--bfloat16"]
    assert run(data, tmp_path / "whole", *options) == 0
    killed(tmp_path, [sys.executable], data, tmp_path / "killed", *options, "--workers", "1")
    assert run(data, tmp_path / "killed", *options) == 0
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    found, expected = state(tmp_path / "killed"), state(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_finished_run_is_left_alone_and_one_of_other_options_is_refused(one, data, capsys):
    before = {file: file.stat().st_mtime_ns for file in one.iterdir()}
    assert run(data, one, *OPTIONS, *SGD, *SAVING) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert run(data, one, *OPTIONS, *SGD, *SAVING, "--lr", "0.5") == 1
    assert "holds a run with --lr 0.02" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in one.iterdir()} == before


def test_the_log_has_a_line_for_each_epoch(one):
    lines = log(one)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (1, 3), (2, 6)]
    assert [line.get("keep_rate") for line in lines] == [None, 0.79, 0.5]
    assert lines[1]["lr"] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * 2 / 6)))
    before = create_reference_model()
    images, labels = (x[24:35] for x in load_images())
    with torch.no_grad():
        unpatched = (before(images).argmax(1) == labels).sum().item() / 11
    for line in lines:
        assert line["top1_difference"] == pytest.approx(line["top1"] - unpatched)
        assert line["top1_interval"][0] < line["top1_difference"] < line["top1_interval"][1]


@pytest.mark.parametrize("ema", [False, True])
def test_one_file_has_all_that_was_learned(ema, one):
    images, labels = (x[24:35] for x in load_images())
    model = load_model(checkpoint=one / "weights.pth", use_ema=ema)
    config = remembered(model).config
    assert (config.keep_rate, config.multi_scale) == (0.5, "learned")
    assert config == MergeConfig.from_json((one / "token-merge.json").read_text())
    result = evaluate(model, Tensors(images, labels), config)
    assert result.rows[1].top1 == pytest.approx(log(one)[-1]["ema_top1" if ema else "top1"])
    plan(model, config)
    gates = next(value for name, value in model.state_dict().items() if name.endswith("token_merge_fusion.gates"))
    assert (gates.abs() > 0).all()
    # timm's own loader, strict: the fusion is not lost in silence.
    with pytest.raises(RuntimeError, match="token_merge_fusion"):
        load_checkpoint(create_reference_model(pretrained=False), str(one / "weights.pth"), use_ema=ema)
    patched = apply(create_reference_model(pretrained=False), config)
    load_checkpoint(patched, str(one / "weights.pth"), use_ema=ema)
    with torch.no_grad():
        assert torch.equal(patched(images), model(images))


def test_a_run_goes_on_from_a_learned_fusion_and_never_loses_it_in_silence(one, data, tmp_path, capsys):
    options = ["--checkpoint", str(one / "weights.pth"), "--keep-rate", "0.5", "--epochs", "1", "--batch-size", "8"]
    assert run(data, tmp_path / "lost", *options) == 1
    assert "has a learned fusion: --multi-scale learned goes on with it" in capsys.readouterr().err
    assert run(data, tmp_path / "next", *options, "--multi-scale", "learned", "--opt", "sgd", "--lr", "1e-9") == 0
    assert log(tmp_path / "next")[0]["top1"] == pytest.approx(log(one)[-1]["top1"])


def test_training_changes_the_weights_but_not_the_statistics_of_batch_norm(one):
    before = create_reference_model().state_dict()
    after = torch.load(one / "weights.pth", weights_only=True)["state_dict"]
    assert [name for name in after if "token_merge_fusion" not in name] == list(before)
    for name, value in before.items():
        statistics = "running" in name or "num_batches" in name
        assert torch.equal(after[name], value) == statistics, name


def test_keep_rates_fall_by_half_a_cosine():
    rates = []
    for epochs in np.linspace(0, 4, 41):
        progress = finetune.warmup_progress(epochs, 3.0)
        rates.append(finetune.warmed_up(MergeConfig(0.6), progress).keep_rate)
        expected = 0.6 + 0.4 * (1 + math.cos(math.pi * min(epochs, 3) / 3)) / 2
        assert rates[-1] == pytest.approx(expected, abs=0.0051)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == finetune.LARGEST_RATE < 1
    assert set(rates[30:]) == {0.6}
    assert finetune.warmup_progress(0, 0) == 1


@pytest.mark.parametrize("kind", [lambda *rates: rates, lambda *rates: dict(zip((2, 5, 9), rates, strict=True))])
def test_each_keep_rate_of_several_falls_to_its_own_target(kind):
    config = MergeConfig(kind(0.5, 0.75, 1.0), multi_scale="learned")
    half = finetune.warmed_up(config, 0.5)
    assert half == MergeConfig(kind(0.75, 0.88, 1.0), multi_scale="learned")
    assert finetune.warmed_up(config, 0.0).keep_rate == kind(0.999, 0.999, 1.0)
    assert finetune.warmed_up(config, 1.0) == config
    # A sharded model cannot be given other stages.
    assert {len(finetune.warmed_up(config, t).amounts(12, (2, 5, 9))) for t in (0.0, 0.3, 0.999, 1.0)} == {2}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_batch_and_keep_mirrored_images_together(world_size):
    one = finetune.GlobalBatches(40, 12, seed=1)
    parts = [finetune.GlobalBatches(40, 12, 1, rank, world_size) for rank in range(world_size)]
    for sampler in (one, *parts):
        sampler.epoch = 5
    assert len(list(one)) == 3
    for batch, *shares in zip(one, *parts, strict=True):
        assert sorted(key for share in shares for key in share) == sorted(batch)
        mirrored = dict(zip(batch, reversed(batch), strict=True))
        for share in shares:
            assert [mirrored[key] for key in share] == share[::-1]
    first = list(one)
    one.first = 1
    assert list(one) == first[1:]
    one.first, one.epoch = 0, 6
    assert list(one) != first
    assert {epoch for batch in one for epoch, _ in batch} == {6}


def test_mixtoken_has_the_same_loss_on_two_processes_as_on_one():
    torch.manual_seed(0)
    model = create_model("lvvit").train()
    for module in model.patch_embed.modules():
        module.eval()
    apply(model, 0.5)
    images, labels = (x[:8] for x in load_images())
    target = finetune.soft_labels(labels, 10, 0.1)
    losses = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        ((keys),) = list(finetune.GlobalBatches(8, 8, 0, rank, world_size))
        mine = [index for _, index in keys]
        torch.manual_seed(3)  # a box of 35 of the 196 patches
        losses.append(finetune.label_loss(model(images[mine]), target[mine]).item())
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_an_image_is_augmented_the_same_whenever_it_is_read(data):
    args = finetune.create_parser().parse_args(["--data", str(data), "--output", "nowhere"])
    model = load_model()
    images = finetune.training_images(args, finetune.data_config(model), model.num_classes)
    keys = [(epoch, index) for epoch in range(2) for index in range(24)]
    expected = {key: images[key] for key in keys}
    flipped = 0
    plain = load_images()[0]
    for key in random.Random(0).sample(keys, len(keys)):
        random.random(), torch.rand(1)
        image, label = images[key]
        assert torch.equal(image, expected[key][0])
        assert label == load_pixels()[1][key[1]]
        original = plain[key[1]]
        is_flipped = not torch.allclose(image, original, atol=1e-5)
        flipped += is_flipped
        assert torch.allclose(image, original.flip(2) if is_flipped else original, atol=1e-5)
    assert 10 < flipped < 38
    assert not all(torch.equal(expected[0, i][0], expected[1, i][0]) for i in range(24))


def test_the_distillation_loss_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, generator=generator) for _ in range(2))
    for temperature in (1.0, 3.0):
        expected = 0.0
        for row in range(4):
            p = [math.exp(x / temperature) for x in teacher[row].tolist()]
            q = [math.exp(x / temperature) for x in student[row].tolist()]
            for a, b in zip(p, q, strict=True):
                expected += temperature**2 * a / sum(p) * math.log(a / sum(p) / (b / sum(q))) / 4
        assert finetune.distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    # A box of 2 of 8 patches: a quarter of the teacher's say is that of the mirror.
    mixed = 0.75 * teacher.softmax(1) + 0.25 * teacher.softmax(1).flip(0)
    expected = (mixed * (mixed.log() - student.log_softmax(1))).sum() / 4
    loss = finetune.distillation_loss((student, torch.zeros(4, 8, 5), (0, 1, 1, 3)), teacher, 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_merges_nothing_has_nothing_to_learn_from_its_teacher(data, tmp_path):
    options = ["--epochs", "1", "--batch-size", "8", "--distill", "1", "--lr", "1e-9", "--opt", "sgd"]
    losses = []
    for rate in ("0.999", "0.3"):
        assert run(data, tmp_path / rate, *options, "--keep-rate", rate) == 0
        losses.append(log(tmp_path / rate)[-1]["loss"])
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 1e-4


def token_labeling_loss_by_hand(logits, dense, box, target, token_target, weight=0.5):
    """The loss of Jiang et al. 2021, patch by patch, on a grid as LV-ViT's."""
    batch, tokens, classes = dense.shape
    side = math.isqrt(tokens)
    x1, y1, x2, y2 = box
    in_box = sum(x1 <= i // side < x2 and y1 <= i % side < y2 for i in range(tokens))
    total = 0.0
    for b in range(batch):
        mirror = batch - 1 - b
        for c in range(classes):
            mixed = (target[b][c] * (tokens - in_box) + target[mirror][c] * in_box) / tokens
            total -= mixed * logits[b].log_softmax(0)[c] / batch
            for n in range(tokens):
                wanted = target[b][c] if token_target is None else token_target[b][n][c]
                total -= weight * wanted * dense[b, n].log_softmax(0)[c] / (batch * tokens)
    return float(total)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 0, 3, 2), (0, 0, 3, 3)])
@pytest.mark.parametrize("of_patches", [False, True])
def test_the_token_labelling_loss_is_that_of_the_paper(box, of_patches):
    generator = torch.Generator().manual_seed(0)
    logits, dense = torch.randn(3, 4, generator=generator), torch.randn(3, 9, 4, generator=generator)
    target = torch.randn(3, 4, generator=generator).softmax(1)
    token_target = torch.randn(3, 9, 4, generator=generator).softmax(2) if of_patches else None
    expected = token_labeling_loss_by_hand(logits, dense, box, target, token_target)
    assert token_labeling_loss((logits, dense, box), target, token_target).item() == pytest.approx(expected, rel=1e-5)
    assert finetune.label_loss((logits, dense, box), target, token_target).item() == pytest.approx(expected, rel=1e-5)


def test_an_lv_vit_learns_from_its_teacher_what_each_patch_shows(data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    untrained = create_model("lvvit").eval()
    torch.save(untrained.state_dict(), tmp_path / "lvvit.pth")
    seen = {}
    take_step, label_loss = finetune.Run.take_step, finetune.label_loss

    def watched_step(self, images, labels):
        seen["images"] = images.clone()
        take_step(self, images, labels)

    def watched_loss(output, target, token_target=None):
        seen["box"], seen["token_target"] = output[2], token_target
        return label_loss(output, target, token_target)

    monkeypatch.setattr(finetune.Run, "take_step", watched_step)
    monkeypatch.setattr(finetune, "label_loss", watched_loss)
    options = ["--model", "lvvit", "--checkpoint", str(tmp_path / "lvvit.pth"), "--token-labels", "teacher"]
    options += ["--epochs", "1", "--images", "4", "--batch-size", "4", "--eval-images", "4", "--distill", "0.5"]
    assert run(data, tmp_path / "output", *options, "--grad-checkpointing") == 0
    with torch.no_grad():
        tokens = untrained.forward_features(seen["images"])
        expected = untrained.aux_head(tokens[:, 1:]).softmax(2)
    torch.testing.assert_close(seen["token_target"], expected)
    torch.manual_seed(finetune.seed_of(0, 0))
    assert seen["box"] == random_box(14, 14)
    assert math.isfinite(log(tmp_path / "output")[-1]["loss"])
    load_checkpoint(untrained, str(tmp_path / "output" / "weights.pth"))
    before = torch.load(tmp_path / "lvvit.pth", weights_only=True)
    assert not torch.equal(untrained.aux_head.weight, before["aux_head.weight"])


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_parameter_is_in_one_group_and_those_of_the_fusion_learn_faster(layer_decay):
    model = apply(create_reference_model(), 0.5, multi_scale="learned")
    groups = finetune.parameter_groups(model, 0.05, layer_decay, fusion_lr_scale=7.0)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    fusion = {p for name, p in model.named_parameters() if "token_merge_fusion" in name}
    assert [set(group["params"]) for group in groups if group.get("lr_scale") == 7.0] == [fusion]
    (of_head,) = (group for group in groups if any(p is model.head.weight for p in group["params"]))
    (of_first,) = (group for group in groups if any(p is model.blocks[0].mlp.fc1.weight for p in group["params"]))
    assert of_head["weight_decay"] == 0.05
    assert (of_head is of_first) == (layer_decay is None)


def test_a_model_of_timm_on_a_folder_of_images(tmp_path):
    draw_two_classes(tmp_path / "photos" / "train", 12, (40, 50))
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=2).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "calibrated.json").write_text(MergeConfig({1: 0.6, 3: 0.8}).to_json())
    options = ["--model", "test_vit", "--num-classes", "2", "--checkpoint", str(tmp_path / "weights.pth")]
    options += ["--config", str(tmp_path / "calibrated.json"), "--auto-augment", "rand-m9-mstd0.5-inc1"]
    options += ["--images", "8", "--held-out", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "1"]
    assert run(tmp_path / "photos", tmp_path / "output", *options, "--ema", "0.9") == 0
    last = log(tmp_path / "output")[-1]
    assert last["step"] == 2
    assert last["top1"] * 4 == pytest.approx(round(last["top1"] * 4))  # of 4 images
    for use_ema in (False, True):  # as `token-merge trial --checkpoint` does
        load_model("test_vit", checkpoint=tmp_path / "output" / "weights.pth", num_classes=2, use_ema=use_ema)
    weights = torch.load(tmp_path / "output" / "weights.pth", weights_only=True)
    assert set(weights["state_dict"]) == set(timm.create_model("test_vit").state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "7"], "Give a multiple of 2"),
        (["--fsdp"], "start them with torchrun"),
        (["--distill", "1.5"], "--distill 1.5: give a number in [0, 1]"),
        (["--warmup-epochs", "31"], "--warmup-epochs 31 is more than --epochs 30"),
        (["--opt", "adamx"], "no optimizer of timm. Names it knows: adam"),
        (["--held-out"], "--held-out needs --images"),
        (["--keep-rate", "1.5"], "keep_rate=1.5 is outside"),
        (["--config", "missing.json"], "--config missing.json cannot be read"),
        (["--token-labels", "teacher"], "--token-labels teacher needs a model that classifies its patches"),
        (["--model", "lvvit"], "needs weights of train_reference.py"),
        (["--model", "test_vitt"], "Similar names: test_vit"),
        (["--batch-size", "26"], "there are 24 images to train on"),
        (["--images", "24", "--held-out", "--batch-size", "8"], "no images to evaluate on behind the first"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_answered_in_a_line(options, message, data, tmp_path, capsys):
    try:
        status = run(data, tmp_path / "output", *options)
    except SystemExit as end:
        status = end.code
    errors = capsys.readouterr().err
    assert status in (1, 2)
    assert "error: " in errors
    assert message in errors
    assert "Traceback" not in errors
