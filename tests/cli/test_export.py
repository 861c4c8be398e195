"""`token-merge export`, as a user runs it."""

import pytest
import torch
from checks import Kept, draw_two_classes

from token_merge_plugin import MergeConfig, apply
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.cli import main
from token_merge_plugin.trial.runtimes import RUNTIMES


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setitem(RUNTIMES, "torch", Kept())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("kept")
@torch.no_grad()
def test_the_built_in_model_is_exported_and_compared_on_its_own_images(tmp_path, capsys):
    arguments = ["export", "--keep-rate", "0.6", "--to", "torch", "-o", "model.pt2", "--workers", "0"]
    assert main([*arguments, "--num-images", "10", "--rounds", "1"]) == 0
    output, errors = capsys.readouterr()
    for part in (
        "the built-in ViT",
        "keep rate 0.6, for torch ",
        "on 10 images",
        "top-1 agrees on 100.00%",
        "batch 1 ",
    ):
        assert part in output
    assert output.endswith("Written: model.pt2\n")
    assert errors == ""
    images, _ = load_images()
    (result,) = RUNTIMES["torch"].load(tmp_path / "model.pt2")(images[:1])
    torch.testing.assert_close(result, apply(create_reference_model(), 0.6)(images[:1]))


@pytest.mark.usefixtures("kept")
def test_a_model_is_exported_by_its_name_and_a_config(tmp_path, capsys):
    (tmp_path / "c.json").write_text(MergeConfig({1: 0.5}).to_json())
    arguments = ["export", "test_vit", "--no-pretrained", "--to", "torch", "-o", "model.pt2", "--rounds", "0", "-q"]
    assert main([*arguments, "--config", "c.json", "--dynamic-batch"]) == 0
    output = capsys.readouterr().out
    assert "keep rate {1: 0.5}" in output
    assert "on 8 images" in output
    assert "speed-up" not in output
    assert main(arguments) == 2
    assert "model.pt2 is there already. Name another file, or have it replaced: replace=True, --force." in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--force", "--dynamic-size"]) == 0
    assert "320 x 160 pixels 0.0e+00" in capsys.readouterr().out
    draw_two_classes(tmp_path / "photos", 3, (40, 50))
    assert main([*arguments, "--force", "--data", "photos", "--workers", "0"]) == 0
    assert "keep rate 0.7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "model.onnx", "--to", "torch"], "model.onnx does not end in .pt2"),
        (["-o", "nowhere/model.onnx"], "there is no folder nowhere"),
        (["-o", "model.pt2", "--to", "torch", "--tolerance", "-1"], "does not give what this VisionTransformer gives"),
        (["test_vitt", "-o", "model.onnx"], "timm has no model 'test_vitt'"),
        (["test_vitt", "-o", "model.onnx", "--dynamic-size"], "timm has no model 'test_vitt'"),
        (
            ["cait_xxs24_224", "--no-pretrained", "-o", "model.onnx", "--dynamic-size"],
            "cait_xxs24_224 cannot be created with dynamic_img_size=True: ",
        ),
        (["-o", "model.pt2", "--to", "torch", "--dynamic-size"], "The built-in model is complete as it is"),
    ],
)
@pytest.mark.usefixtures("kept")
def test_bad_input_is_refused(arguments, message, tmp_path, capsys):
    assert main(["export", *arguments, "--rounds", "0", "--workers", "0", "--num-images", "8"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
