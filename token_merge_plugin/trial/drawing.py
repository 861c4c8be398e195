"""Drawings of what token merging does to an image: which patches each stage keeps, merges and drops."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from token_merge_plugin.trial.tracing import TracedStage

DROPPED = -1
# Drawings have a longer side of 224 to 448 pixels: patches can be told apart, and a report stays small.
SMALLEST_SIDE = 224
LARGEST_SIDE = 448
# Images of up to this many pixels a side are enlarged pixel by pixel: there, smoothing hides what the model sees.
TINY_SIDE = 64
MARGIN = 12
LEGEND = (
    "Patches that show the image are kept. Patches of one plain colour were merged: it is the mean of all patches that "
    "their token stands for. Dark, hatched patches were dropped. Lines run between patches of different tokens."
)
PANELS_A_LINE = 5


@dataclass(frozen=True)
class StagePicture:
    """A drawing of one stage: in block `block`, `tokens` image tokens are left of `patches`."""

    block: int
    tokens: int
    patches: int
    image: Image.Image


@dataclass(frozen=True)
class Picture:
    """An image, a caption for it, and a drawing of each stage."""

    image: Image.Image
    caption: str
    stages: tuple[StagePicture, ...]


def picture_stages(image: Image.Image, stages: Sequence[TracedStage]) -> tuple[StagePicture, ...]:
    """Draw the traced stages of one image, which is given as the model sees it: cropped, but not normalised."""
    pictures = []
    for stage in stages:
        token_map = stage.token_map.cpu().numpy()
        representative = stage.representative.cpu().numpy()
        kept = np.zeros(token_map.shape, bool)
        kept[representative] = True
        drawing = draw_stage(image, token_map.reshape(stage.grid_size), kept.reshape(stage.grid_size))
        pictures.append(StagePicture(stage.block, len(representative), len(token_map), drawing))
    return tuple(pictures)


def draw_stage(image: Image.Image, token_map: NDArray[np.integer], kept: NDArray[np.bool_]) -> Image.Image:
    """Draw over an image what its tokens stand for.

    Crucial patches keep their own pixels. Patches that were merged have the mean colour of all patches of their token.
    Dropped patches are dark and hatched. A line, dark on one side and bright on the other, parts patches of different
    tokens.

    Args:
        image: of any mode and size; drawn with a longer side of 224 to 448 pixels, see `scaled`.
        token_map: [h, w], index of the token that holds each patch, -1 if it was dropped.
        kept: [h, w], whether a patch is the crucial one of its token.

    Returns:
        RGB image of the size of `scaled(image)`.
    """
    pixels = np.asarray(scaled(image), np.float32)  # [H, W, 3]
    height, width, _ = pixels.shape
    rows = np.arange(height) * token_map.shape[0] // height
    columns = np.arange(width) * token_map.shape[1] // width
    tokens = token_map[rows][:, columns]  # [H, W], as are all below but the colours
    crucial = kept[rows][:, columns]
    drawing = np.where(crucial[..., None], pixels, _mean_colours(pixels, tokens))
    hatch = np.add.outer(np.arange(height), np.arange(width)) % 8 < 2
    dropped = np.where(hatch[..., None], 110, 0.25 * pixels)
    drawing = np.where((tokens == DROPPED)[..., None], dropped, drawing)

    before, after = np.zeros((2, height, width), bool)  # the two sides of a border
    across, down = tokens[:, 1:] != tokens[:, :-1], tokens[1:] != tokens[:-1]
    before[:, :-1] |= across
    after[:, 1:] |= across
    before[:-1] |= down
    after[1:] |= down
    drawing[after] = 0.5 * drawing[after]
    drawing[before] = 0.5 * drawing[before] + 0.5 * 255
    return Image.fromarray(drawing.round().astype(np.uint8))


def scaled(image: Image.Image) -> Image.Image:
    """Return the image in RGB, enlarged by a whole factor or reduced to a longer side of 224 to 448 pixels."""
    image = image.convert("RGB")
    side = max(image.size)
    if side > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        return image
    factor = -(-SMALLEST_SIDE // side)
    smoothing = Image.Resampling.NEAREST if side <= TINY_SIDE else Image.Resampling.BICUBIC
    return image.resize((image.width * factor, image.height * factor), smoothing)


def contact_sheet(pictures: Sequence[Picture], heading: Sequence[str] = ()) -> Image.Image:
    """Draw pictures with their stages on one sheet: each image and its stages side by side, captions below.

    Args:
        pictures: at least one.
        heading: lines of text above them, which are broken where they are too long.

    Returns:
        RGB image. A picture of more than five panels takes several lines.
    """
    lines = []
    for picture in pictures:
        panels = [(scaled(picture.image), picture.caption)]
        panels += [(stage.image, stage_caption(stage)) for stage in picture.stages]
        lines += [panels[at : at + PANELS_A_LINE] for at in range(0, len(panels), PANELS_A_LINE)]
    font = ImageFont.load_default(14)
    text_height = 20
    width = max(sum(panel.width + MARGIN for panel, _ in line) for line in lines) + MARGIN
    heights = [max(panel.height for panel, _ in line) + text_height + MARGIN for line in lines]
    texts = [part for line in heading for part in _broken(line, font, width - 2 * MARGIN)]
    top = MARGIN + (len(texts) * text_height + MARGIN if texts else 0)
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(texts):
        draw.text((MARGIN, MARGIN + number * text_height), text, "black", font)
    y = top
    for line, height in zip(lines, heights, strict=True):
        x = MARGIN
        for panel, caption in line:
            sheet.paste(panel, (x, y))
            draw.text((x, y + panel.height + 3), _fitted(caption, font, panel.width), "black", font)
            x += panel.width + MARGIN
        y += height
    return sheet


def stage_caption(stage: StagePicture) -> str:
    """Return, for example, "block 3: 137 of 196 tokens"."""
    return f"block {stage.block}: {stage.tokens} of {stage.patches} tokens"


def _mean_colours(pixels: NDArray[np.float32], tokens: NDArray[np.integer]) -> NDArray[np.float32]:
    """Return [H, W, 3]: for each pixel, the mean colour of all pixels of its token. `tokens` is [H, W]."""
    _, index = np.unique(tokens, return_inverse=True)
    index = index.reshape(-1)
    counts = np.bincount(index)
    means = [np.bincount(index, channel.reshape(-1)) / counts for channel in np.moveaxis(pixels, 2, 0)]
    return np.stack(means, 1)[index].reshape(pixels.shape).astype(np.float32)


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Return the text in lines of at most `width` pixels, unless a word is longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text, cut to `width` pixels if it is longer."""
    text = " ".join(text.split())  # a line break would run into the panel below
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
