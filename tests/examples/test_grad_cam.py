"""examples/grad_cam.py: Grad-CAM through full_grid."""

import sys

import torch
from checks import EXAMPLES, run_program
from grad_cam import grad_cam
from PIL import Image

from token_merge_plugin import apply, remove
from token_merge_plugin.builtin import create_reference_model, load_images


def test_maps_of_a_patched_model_are_those_of_the_unpatched_one_but_for_merging():
    model, x = create_reference_model(), load_images()[0][:20]
    expected = grad_cam(model, model.blocks[-2], x, (14, 14))
    mine = grad_cam(apply(model, 0.8), model.blocks[-2], x, (14, 14))
    assert mine.shape == expected.shape == (20, 14, 14)
    assert torch.nn.functional.cosine_similarity(mine.flatten(1), expected.flatten(1)).mean() > 0.9
    assert torch.equal(grad_cam(remove(model), model.blocks[-2], x, (14, 14)), expected)


def test_the_script_writes_a_picture(tmp_path):
    ended = run_program(sys.executable, EXAMPLES / "grad_cam.py", "--output", tmp_path / "cam.png")
    assert ended.returncode == 0, ended.stderr
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.size == (28, 28)
