"""Drawings of what was kept, merged and dropped."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from token_merge_plugin import apply
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.config import DROPPING, METHODS
from token_merge_plugin.trial.drawing import Picture, StagePicture, contact_sheet, draw_stage, picture_stages, scaled
from token_merge_plugin.trial.tracing import TracedStage, trace

RED, BLUE, GREEN, WHITE = (200, 0, 0), (0, 0, 100), (0, 120, 0), (255, 255, 255)
SIDE = 112  # pixels of a patch in the drawings of `quarters`


def quarters():
    """An image of four patches: red and blue above, green and white below."""
    return Image.fromarray(np.array([[RED, BLUE], [GREEN, WHITE]], np.uint8))


def centres(drawing):
    return [[drawing.getpixel((x, y)) for x in (56, 168)] for y in (56, 168)]


def drawn(token_map, kept, image=None):
    return draw_stage(image or quarters(), np.array(token_map), np.array(kept, bool))


def test_kept_patches_have_their_own_pixels():
    assert centres(drawn([[0, 1], [2, 3]], [[1, 1], [1, 1]])) == [[RED, BLUE], [GREEN, WHITE]]


def test_merged_patches_have_the_mean_colour_of_their_token():
    drawing = drawn([[0, 0], [1, 2]], [[1, 0], [1, 1]])
    assert centres(drawing) == [[RED, (100, 0, 50)], [GREEN, WHITE]]


def test_a_merged_patch_far_from_its_token_has_its_colour_too():
    drawing = drawn([[0, 1], [2, 0]], [[0, 1], [1, 0]])
    mean = tuple(round((a + b) / 2) for a, b in zip(RED, WHITE, strict=True))
    assert np.abs(np.subtract(centres(drawing)[1][1], mean)).max() <= 1
    assert centres(drawing)[0][0] == centres(drawing)[1][1]


def test_dropped_patches_are_dark_and_hatched():
    drawing = np.asarray(drawn([[0, -1], [1, -1]], [[1, 0], [1, 0]]))
    white = drawing[SIDE + 4 : -4, SIDE + 4 : -4]
    assert set(np.unique(white)) == {64, 110}
    assert (white == 64).mean() > 0.6


def test_a_dropped_patch_is_not_blended_into_the_colours_of_the_others():
    assert centres(drawn([[0, 0], [-1, -1]], [[0, 0], [0, 0]]))[0] == [(100, 0, 50), (100, 0, 50)]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128)])
def test_different_tokens_are_parted_by_a_line_on_any_background(colour):
    drawing = np.asarray(drawn([[0, 1], [0, 1]], [[1, 1], [0, 0]], Image.new("RGB", (224, 224), colour)))
    assert (
        np.abs(drawing[:, SIDE - 1].astype(int) - colour).max() > 50
        or np.abs(drawing[:, SIDE].astype(int) - colour).max() > 50
    )
    inside = np.delete(drawing, [SIDE - 1, SIDE], axis=1)
    assert (inside == colour).all()


def test_patches_of_the_same_token_have_no_line_between_them():
    grey = Image.new("L", (28, 28), 90)
    assert (np.asarray(drawn([[0, 0], [0, 0]], [[1, 0], [0, 0]], grey)) == 90).all()


@pytest.mark.parametrize(
    ("size", "drawn_size"),
    [
        ((28, 28), (224, 224)),
        ((224, 224), (224, 224)),
        ((100, 60), (300, 180)),
        ((1000, 500), (448, 224)),
        ((1, 1), (224, 224)),
    ],
)
def test_drawings_have_a_longer_side_of_224_to_448_pixels(size, drawn_size):
    image = Image.new("RGB", size, RED)
    assert scaled(image).size == drawn_size
    assert drawn([[0, 1, 2], [3, 4, 5]], [[1, 1, 1], [1, 1, 1]], image).size == drawn_size


def test_tiny_images_are_enlarged_pixel_by_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    enlarged = np.asarray(scaled(Image.fromarray(pixels)))
    assert (enlarged == pixels.repeat(8, 0).repeat(8, 1)[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
def test_images_of_any_mode_are_drawn_and_stay_unchanged(mode):
    image = Image.new(mode, (32, 32), 1)
    before = image.tobytes()
    assert drawn([[0, 0]], [[1, 0]], image).mode == "RGB"
    assert (image.tobytes(), image.size) == (before, (32, 32))


def test_a_patch_grid_that_does_not_divide_the_image_covers_all_of_it():
    tokens = np.arange(15).reshape(3, 5)
    drawing = draw_stage(Image.new("RGB", (227, 229), WHITE), tokens, np.zeros((3, 5), bool))
    assert drawing.size == (227, 229)
    assert np.asarray(drawing).min() > 100  # nothing is left black


def test_stages_are_drawn_from_what_was_traced():
    stage = TracedStage(3, (2, 2), torch.tensor([0, 0, 1, -1]), torch.tensor([0, 2]))
    (picture,) = picture_stages(quarters(), [stage])
    assert (picture.block, picture.tokens, picture.patches) == (3, 2, 4)
    assert picture.image.tobytes() == drawn([[0, 0], [1, -1]], [[1, 0], [1, 0]]).tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_built_in_model_can_be_drawn(method):
    images, _ = load_images()
    model = apply(create_reference_model(), 0.5, method=method)
    image = Image.new("L", (28, 28), 90)
    stages = picture_stages(image, trace(model, images[:1]))
    assert len(stages) == {"merge": 4, "tome": 12, "late_tome": 11}.get(method, 3)
    counts = [stage.tokens for stage in stages]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 60
    hatched = (np.asarray(stages[-1].image) == 110).any()
    assert hatched == (method in DROPPING)


def test_a_contact_sheet_shows_each_image_with_its_stages_and_captions():
    stages = tuple(StagePicture(block, 10, 16, Image.new("RGB", (224, 224), RED)) for block in (3, 6, 9))
    picture = Picture(Image.new("RGB", (224, 224), BLUE), "a caption", stages)
    one, two = contact_sheet([picture]), contact_sheet([picture, picture])
    pixels = np.asarray(one)
    assert one.width >= 4 * 224
    assert 2 * 224 < two.height < 2 * one.height
    panel = 224 * 224
    assert (pixels == BLUE).all(2).sum() == panel
    assert (pixels == RED).all(2).sum() == 3 * panel
    under_a_panel = pixels[12 + 224 : -8, 12 : 12 + 224]
    assert (under_a_panel < 50).all(2).sum() > 50  # letters


def test_a_contact_sheet_breaks_many_stages_into_lines_and_cuts_long_captions():
    image = Image.new("RGB", (224, 224), RED)
    stages = tuple(StagePicture(block, 10, 16, image) for block in range(12))
    caption = "a very long name " * 20
    assert ImageFont.load_default(14).getlength(caption) > 224 * 5
    sheet = contact_sheet([Picture(image, caption + "\n猫", stages)])
    assert sheet.width < 6 * 224
    assert (np.asarray(sheet) == RED).all(2).sum() == 13 * 224 * 224  # no caption runs over a panel


def test_a_contact_sheet_has_a_heading_whose_lines_fit():
    picture = Picture(Image.new("RGB", (224, 224), RED), "a caption", ())
    plain, headed = contact_sheet([picture]), contact_sheet([picture], ["the model", "many words " * 20])
    added = headed.height - plain.height
    assert added > 4 * 20
    assert headed.crop((0, added, *headed.size)).tobytes() == plain.tobytes()
    heading = np.asarray(headed)[:added]
    assert (heading < 50).all(2).any(axis=1).sum() > 20  # letters
    assert heading[:, -12:].min() == 255
