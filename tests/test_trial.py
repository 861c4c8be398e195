"""The built-in model and images, the trial, and the command line."""

import gzip
import subprocess
import sys

import pytest
import torch
from models import make

import token_merge_plugin
from token_merge_plugin import ConfigError, DataError, MergeConfig
from token_merge_plugin.builtin import CLASSES, FOLDER, create_reference_model, load_images, read_idx
from token_merge_plugin.cli import main
from token_merge_plugin.trial import format_table, run_trial


@pytest.fixture(scope="module")
def rows():
    images, labels = load_images()
    return run_trial(create_reference_model(), images, labels, (0.7, 0.5))


def test_the_sample_is_a_thousand_images_of_every_class():
    images, labels = load_images()
    assert images.shape == (1000, 1, 28, 28)
    assert labels.bincount(minlength=len(CLASSES)).min() > 80
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_the_built_in_model_is_small_and_good():
    model = create_reference_model()
    assert (FOLDER / "vit_fashion_mnist.safetensors").stat().st_size < 3 * 2**20
    assert model.patch_embed.num_patches == 196
    assert model.patch_embed.grid_size == model.patch_embed.dynamic_feat_size((28, 28)) == (14, 14)
    images, labels = load_images()
    with torch.inference_mode():
        top1 = (model(images).argmax(1) == labels).float().mean()
    assert top1 > 0.88


def test_the_defaults_keep_the_accuracy_of_the_built_in_model(rows):
    unpatched, at_7, at_5 = rows
    assert unpatched.agreement == 1
    assert unpatched.kl < 1e-9
    assert unpatched.speed_up == 1
    assert at_7.reduction > 0.3
    assert at_5.reduction > 0.45
    assert at_7.agreement >= 0.995
    assert at_7.kl <= 1e-4
    assert abs(at_7.top1 - unpatched.top1) <= 0.003  # the share of images that may disagree, and a few
    assert at_5.agreement >= 0.985


def test_half_precision_keeps_the_accuracy_too():
    images, labels = (x[:200] for x in load_images())
    model = create_reference_model()
    with torch.autocast("cpu", torch.bfloat16):
        _, row = run_trial(model, images, labels, (0.7,))
    assert row.agreement >= 0.98


def test_a_trial_leaves_the_model_as_it_was():
    model = make(in_chans=1).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    images = torch.randn(5, 1, 32, 32)
    run_trial(model, images, torch.zeros(5, dtype=torch.long), (0.5,), batch_size=2)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes


def test_a_trial_reports_its_progress_and_takes_configs():
    done = []
    images = torch.randn(5, 3, 32, 32)
    config = MergeConfig({2: 0.5})
    rows = run_trial(
        make(), images, torch.zeros(5, dtype=torch.long), [0.9, config], batch_size=2, progress=done.append
    )
    assert sum(done) == 3 * 3
    assert [row.name for row in rows] == ["unpatched", "0.9", "{2: 0.5}"]


@pytest.mark.parametrize("labels", [0, 3])
def test_a_trial_needs_a_label_for_each_image(labels):
    with pytest.raises(DataError, match=f"given 2 and {labels}"):
        run_trial(make(), torch.randn(2, 3, 32, 32), torch.zeros(labels, dtype=torch.long))
    with pytest.raises(DataError, match="given 0 and 0"):
        run_trial(make(), torch.randn(0, 3, 32, 32), torch.zeros(0, dtype=torch.long))


def test_a_trial_with_a_bad_keep_rate_is_refused():
    with pytest.raises(ConfigError, match="outside"):
        run_trial(make(), torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), (2.0,))


def test_the_table_has_a_line_for_each_row_and_is_aligned(rows):
    lines = format_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({len(line) for line in lines}) == 1
    assert "unpatched" in lines[2]


def test_idx_files_may_be_plain_or_zipped(tmp_path):
    zipped = FOLDER / "t10k-labels-idx1-ubyte.gz"
    plain = tmp_path / "t10k-labels-idx1-ubyte"
    plain.write_bytes(gzip.decompress(zipped.read_bytes()))
    assert torch.equal(read_idx(plain), read_idx(zipped))


def test_missing_damaged_and_mismatched_idx_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_images(tmp_path)
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    images.write_bytes(b"not idx")
    with pytest.raises(DataError, match="not an IDX file"):
        load_images(tmp_path)
    images.write_bytes(b"\0\0\x08\x03" + (2).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2 + b"\0" * 10)
    with pytest.raises(DataError, match="cut short"):
        load_images(tmp_path)
    images.write_bytes(b"\0\0\x08\x03" + (2).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2 + b"\0" * 2 * 784)
    labels.write_bytes(b"\0\0\x08\x01" + (1).to_bytes(4, "big") + b"\0")
    with pytest.raises(DataError, match="2 images but 1 labels"):
        load_images(tmp_path)
    images.write_bytes(b"\x1f\x8bdamaged")
    with pytest.raises(DataError, match="cannot be read"):
        load_images(tmp_path)


def test_the_command_prints_the_table_and_shows_progress(tmp_path):
    for name in ("images-idx3", "labels-idx1"):
        array = read_idx(FOLDER / f"t10k-{name}-ubyte.gz")[:60]
        header = bytes([0, 0, 8, array.dim()]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(header + array.numpy().tobytes())
    command = [sys.executable, "-m", "token_merge_plugin.cli", "trial", "--keep-rates", "0.5", "--data", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for column in ("keep rate", "GMACs", "reduction", "top-1", "agreement", "images/s", "speed-up"):
        assert column in run.stdout
    assert "60 test images" in run.stdout
    assert "unpatched" in run.stdout
    assert "/4 [" in run.stderr  # tqdm leaves out refreshes that come too fast


def test_the_command_says_what_is_wrong_and_exits_with_2(capsys, tmp_path):
    assert main(["trial", "--keep-rates", "1.5"]) == 2
    assert "outside (0, 1]" in capsys.readouterr().err
    assert main(["trial", "--data", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for arguments in (["trial", "--batch-size", "0"], ["trial", "--device", "nowhere"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_ctrl_c_ends_the_command_with_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("token_merge_plugin.cli.run_trial", interrupted)
    assert main(["trial"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == token_merge_plugin.__version__
