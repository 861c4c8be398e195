"""examples/train_classifier.py: the images it makes, and the same training whether it was interrupted or not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import train_classifier
from checks import EXAMPLES, run_program
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_dataset
from timm.models import load_checkpoint
from train_classifier import PastedObjects, Picture

from token_merge_plugin.errors import DataError

NAMES = ["birds/owl", "frog", "zebra"]


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def cut_out(pixels, radius=0.9):
    """Return an RGBA picture of which an ellipse is opaque."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha = np.where(x**2 + y**2 < radius**2, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([pixels, alpha]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three objects and much that is none, and nine photographs in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    objects = root / "objects"
    (objects / "birds").mkdir(parents=True)
    for channel, name in enumerate(NAMES):
        pixels = noise(channel, 60, 40 + 10 * channel) // 2
        pixels[..., channel] += 127
        cut_out(pixels).save(objects / f"{name}.png")
    Image.open(objects / "frog.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(objects / "mirrored.png")
    cut_out(noise(7, 60, 60) // 64 * 64).save(objects / "a_drawing.png")
    cut_out(noise(8, 20, 20)).save(objects / "too_small.png")
    cut_out(noise(9, 60, 60), radius=2).save(objects / "a_rectangle.png")
    Image.fromarray(noise(10, 60, 60)).save(objects / "opaque.png")
    (objects / "damaged.png").write_bytes((objects / "zebra.png").read_bytes()[:900])
    for number in range(9):
        folder = root / f"photographs{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(noise(100 + number, 260, 300)).save(folder / f"{number}.png")
    torch.manual_seed(1)
    backbone = timm.create_model("test_vit", num_classes=0, img_size=96)  # a larger grid than that of the images
    save_file(backbone.state_dict(), root / "backbone.safetensors")
    return root


@pytest.fixture(scope="module")
def objects(folders):
    return train_classifier.read_objects(folders / "objects", pixels=500)


@pytest.fixture(scope="module")
def backgrounds(folders):
    return train_classifier.read_backgrounds([folders / "photographs0", folders / "photographs1"])


def command(folders, output, *options):
    """Five steps of four images, three of them on windows."""
    arguments = ["--objects", folders / "objects", "--object-pixels", 500, "--output", output]
    arguments += ["--backgrounds", folders / "photographs0", folders / "photographs1"]
    arguments += ["--model", "test_vit", "--init", folders / "backbone.safetensors", "--img-size", 64, "--seed", 3]
    arguments += ["--schedule", "32 12 1e-3, 64 8 1e-3", "--batch-size", 4, "--eval-images", 6, "--frozen-blocks", 2]
    return [str(argument) for argument in (*arguments, *options)]


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "uninterrupted"
    assert train_classifier.main(command(folders, output)) == 0
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_objects_are_cut_out_photographs_cropped_to_what_is_opaque(objects, folders):
    assert [x.name for x in objects] == NAMES
    for name, image in objects:
        alpha = np.asarray(image)[..., 3]
        assert all(edge.any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))
        assert image.size < Image.open(folders / "objects" / f"{name}.png").size


def test_training_and_test_have_no_photograph_in_common(backgrounds):
    names = {split: {(x.name, x.image.tobytes()) for x in pictures} for split, pictures in backgrounds.items()}
    assert {split: len(x) for split, x in names.items()} == {"train": 7, "test": 2}
    assert not names["train"] & names["test"]


def test_an_image_is_the_same_whenever_it_is_made(objects, backgrounds):
    first = PastedObjects(objects, backgrounds["train"], "train", 30, size=64, seed=5)
    expected = [first[number] for number in range(30)]
    again = PastedObjects(objects, backgrounds["train"], "train", 40, size=64, seed=5)
    for number in np.random.default_rng(0).permutation(30).tolist():
        image, label = again[number]
        assert torch.equal(image, expected[number][0])
        assert label == expected[number][1] == number % 3
    assert len({image.numpy().tobytes() for image, _ in expected}) == 30
    images, labels = again.batch([7, 3])
    assert torch.equal(images, torch.stack([expected[7][0], expected[3][0]]))
    assert labels.tolist() == [1, 0]


def test_another_seed_and_another_split_make_other_images(objects, backgrounds):
    pictures = backgrounds["train"]
    placements = {
        PastedObjects(objects, pictures, split, 1, seed=seed).placement(0)
        for split in train_classifier.SPLITS
        for seed in (0, 1)
    }
    assert len(placements) == 4


def test_an_object_lies_anywhere_at_any_angle_and_of_every_length(objects, backgrounds):
    data = PastedObjects(objects, backgrounds["train"], "train", 2000)
    for name, low, high in (("x", 0, 1), ("y", 0, 1), ("angle", 0, 360), ("length", 0.15, 0.5), ("crop", 0.4, 1)):
        values = np.array([getattr(data.placement(number), name) for number in range(0, 2000, 4)])
        assert ((values >= low) & (values <= high)).all()
        counts, _ = np.histogram(values, bins=5, range=(low, high))
        assert counts.min() > 60
    assert {data.placement(number).background for number in range(200)} == set(range(7))


def white_on_black(width, height, count, **options):
    white = Picture("white", Image.new("RGBA", (width, height), "white"))
    return PastedObjects([white], [Picture("black", Image.new("RGB", (300, 300)))], "train", count, **options)


def test_an_object_is_as_long_as_its_placement_says():
    data = white_on_black(100, 60, 20)
    for number in range(20):
        area = np.asarray(data.image(number)).mean() / 255
        assert area == pytest.approx(data.placement(number).length ** 2 * 0.6, rel=0.1)


def test_a_window_is_a_part_of_the_image_with_the_whole_object_in_it():
    data = white_on_black(100, 60, 40, size=96)
    windows = white_on_black(100, 60, 40, size=96, window=72)  # an object is at most 56 pixels wide
    corners = set()
    for number in range(40):
        whole, part = np.asarray(data.image(number)), np.asarray(windows.image(number))
        assert part.shape == (72, 72, 3)
        assert part.sum() == whole.sum()
        found = [(y, x) for y in range(25) for x in range(25) if np.array_equal(whole[y : y + 72, x : x + 72], part)]
        assert found
        corners.add(found[0])
    assert len(corners) > 20


def test_a_window_smaller_than_the_object_lies_within_the_object():
    for number in range(20):
        data = white_on_black(60, 60, 20, size=96, window=8, lengths=(0.5, 0.6))
        # Where the object is turned, its box has black corners, which the window may show.
        assert np.asarray(data.image(number)).shape == (8, 8, 3)
    shares = [(np.asarray(data.image(number)) > 127).mean() for number in range(20)]
    assert np.mean(shares) > 0.6


def test_images_are_normalised_as_timm_does_it(objects, backgrounds):
    data = PastedObjects(objects, backgrounds["train"], "train", 3)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    pixels = torch.from_numpy(np.array(data.image(2))).permute(2, 0, 1) / 255
    torch.testing.assert_close(data[2][0] * std + mean, pixels)


def test_written_images_are_read_with_the_labels_of_the_classes(folders, tmp_path, capsys, objects, backgrounds):
    written = tmp_path / "images"
    options = command(folders, tmp_path / "output", "--write", "test", 7, written)
    assert train_classifier.main(options) == 0
    assert not (tmp_path / "output").exists()
    dataset = create_dataset("", str(written))
    data = PastedObjects(objects, backgrounds["test"], "test", 7, size=64, seed=3)
    numbers = [int(Path(dataset.filename(index)).stem) for index in range(7)]
    assert sorted(numbers) == list(range(7))
    for (image, label), number in zip(dataset, numbers, strict=True):
        assert label == number % 3
        difference = np.asarray(image).astype(float) - np.asarray(data.image(number))
        assert np.abs(difference).mean() < 25  # of noise, as JPEG keeps it
    assert train_classifier.main([*options[:-2], "2", str(written)]) == 1
    assert "2 images cannot show 3 classes" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_the_log_has_a_line_for_each_phase(uninterrupted):
    lines = log(uninterrupted)
    assert [(line["size"], line["images"], line["step"]) for line in lines] == [(32, 12, 3), (64, 8, 5)]
    assert [(line["classes"], line["test_images"]) for line in lines] == [(3, 6), (3, 6)]
    assert (uninterrupted / "classes.txt").read_text().splitlines() == NAMES


def test_what_was_learned_is_loaded_as_a_plain_model_of_timm(uninterrupted, objects, backgrounds):
    model = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    load_checkpoint(model, str(uninterrupted / "weights.safetensors"))
    images, labels = PastedObjects(objects, backgrounds["test"], "test", 6, size=64, seed=3).batch(range(6))
    with torch.no_grad():
        top1 = (model(images).argmax(1) == labels).float().mean().item()
    assert log(uninterrupted)[-1]["top1"] == pytest.approx(top1)


@pytest.mark.parametrize("frozen", [0, 2])
def test_training_starts_from_the_weights_given_and_changes_all_that_are_not_frozen(
    frozen, uninterrupted, folders, tmp_path
):
    output = uninterrupted
    if not frozen:
        output = tmp_path / "output"
        assert train_classifier.main(command(folders, output, "--frozen-blocks", 0)) == 0
    before, after = load_file(folders / "backbone.safetensors"), load_file(output / "weights.safetensors")
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    assert after["pos_embed"].shape == (1, 1 + 4 * 4, 64)
    for name in set(before) - {"pos_embed"}:
        change = (after[name] - before[name]).abs().max()
        assert change < 0.02, name  # five steps of at most 1e-3, and decay
        below = name.startswith(("cls_token", "patch_embed", "blocks.0.", "blocks.1."))
        assert (change == 0) == (below and frozen == 2), name


def test_classes_are_learned(folders, tmp_path):
    options = ["--frozen-blocks", "0", "--layer-decay", "1", "--schedule", "64 400 2e-3", "--eval-images", "60"]
    assert train_classifier.main(command(folders, tmp_path / "output", *options)) == 0
    (line,) = log(tmp_path / "output")
    assert line["loss"] < 0.9 * np.log(3)
    assert line["top1"] > 0.6


@pytest.mark.parametrize(
    ("method", "call", "save_seconds", "step", "phases"),
    [("take_step", 5, 0, 4, 1), ("take_step", 5, 1e9, 3, 1), ("top1", 1, 0, 3, 0)],
    ids=["behind a checkpoint", "steps behind a checkpoint", "while it evaluates"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    method, call, save_seconds, step, phases, uninterrupted, folders, tmp_path
):
    output, script = tmp_path / "output", tmp_path / "killed.py"
    script.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import train_classifier

method, calls = train_classifier.Training.{method}, []

def work_or_die(self):
    calls.append(self.step)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self)

train_classifier.Training.{method} = work_or_die
sys.exit(train_classifier.main())
"""
    )
    options = command(folders, output, "--save-seconds", save_seconds)
    # One thread, as in the tests' own process: sums over several have other bits.
    ended = run_program(sys.executable, script, *options, OMP_NUM_THREADS="1")
    assert ended.returncode == -9, ended.stderr
    saved = torch.load(output / "last.checkpoint", weights_only=True)
    assert (saved["step"], len(saved["history"])) == (step, phases)
    assert set(load_file(output / "weights.safetensors")) == set(saved["model"])
    assert train_classifier.main(options) == 0
    expected, weights = (load_file(folder / "weights.safetensors") for folder in (uninterrupted, output))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert log(output) == log(uninterrupted)


def test_a_finished_run_is_left_as_it_is(folders, uninterrupted, capsys):
    weights = (uninterrupted / "weights.safetensors").read_bytes()
    assert train_classifier.main(command(folders, uninterrupted)) == 0
    assert (uninterrupted / "weights.safetensors").read_bytes() == weights
    assert train_classifier.main(command(folders, uninterrupted, "--seed", 4)) == 1
    assert "holds a run with --seed 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objects", "nowhere"], "There is no folder nowhere of objects"),
        (["--objects", str(EXAMPLES)], "has 0 PNG files of at least 500 opaque pixels"),
        (["--object-pixels", "100000"], "has 0 PNG files of at least 100000 opaque pixels"),
        (["--backgrounds", "nowhere"], "There is no folder nowhere of photographs"),
        (["--init", "nowhere.safetensors"], "There are no weights nowhere.safetensors"),
        (["--init", str(EXAMPLES / "benchmark.py")], "does not fit --model test_vit"),
        (["--model", "vit_tiny_patch16_224"], "does not fit --model vit_tiny_patch16_224"),
        (["--model", "resnet18"], "--model resnet18 is no VisionTransformer of timm"),
        (["--schedule", "64 8"], '--schedule: "64 8" is no phase'),
        (["--schedule", "64 8 1e-3, 128 8 1e-3"], '"128 8 1e-3" is no phase. Give pixels, up to 64'),
        (["--write", "validation", "10", "folder"], "--write validation 10 folder: give train or test"),
    ],
)
def test_bad_input_is_answered_in_a_line(options, message, folders, tmp_path, capsys):
    assert train_classifier.main(command(folders, tmp_path / "output", *options)) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_photographs_that_are_too_few_are_refused(folders, tmp_path):
    Image.open(folders / "photographs0" / "0.png").save(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"has 1 photographs, and every 4th is for the test"):
        train_classifier.read_backgrounds([tmp_path])


def test_what_training_needs_is_asked_for(folders, capsys):
    arguments = ["--objects", str(folders), "--backgrounds", str(folders)]
    with pytest.raises(SystemExit):
        train_classifier.main(arguments)
    assert "--output and --init are needed to train" in capsys.readouterr().err
