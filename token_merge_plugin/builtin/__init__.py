"""The built-in model and images: a small ViT trained on Fashion-MNIST, and 1,000 of its test images.

They let anybody see what token merging does to a trained model on real images, with nothing to download.
`examples/train_reference.py` made the weights; README.md in this folder gives origin and licence.
"""

import gzip
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from token_merge_plugin.errors import DataError

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "vit_fashion_mnist.safetensors"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and standard deviation of the 60,000 training images' pixels in [0, 1].
MEAN, STD = 0.2860, 0.3530


class ConvStem(nn.Module):
    """Patch embedding by 3x3 convolutions, for patches of 2x2 pixels (Xiao et al. 2021, "Early Convolutions")."""

    def __init__(self, img_size: int = 28, patch_size: int = 2, in_chans: int = 1, embed_dim: int = 96, **_: object):
        super().__init__()
        if patch_size != 2:
            raise ValueError(f"ConvStem halves the image once, so patch_size is 2, not {patch_size}.")
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        channels = in_chans
        for width, stride in ((24, 1), (48, 2), (96, 1), (96, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the patch grid of an image of `img_size` pixels, both as (height, width)."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, C]


def create_reference_model(pretrained: bool = True, **kwargs: Any) -> VisionTransformer:
    """Build the built-in ViT: 28x28 grey images, 196 image tokens and a class token, 12 blocks of 96 channels.

    Args:
        pretrained: load the shipped weights.
        kwargs: passed to timm's `VisionTransformer`, over the defaults.
    """
    options: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": len(CLASSES),
        "embed_dim": 96,
        "depth": 12,
        "num_heads": 3,
        "embed_layer": ConvStem,
    }
    model = VisionTransformer(**(options | kwargs))
    if pretrained:
        load_checkpoint(model, str(WEIGHTS))
    return model.eval()


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file of bytes, plain or gzipped (the format of MNIST).

    Returns:
        uint8 tensor of the file's own shape: [images, height, width] or [labels].

    Raises:
        DataError: the file is missing, or is not an IDX file of bytes.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a folder with the four IDX files.") from error
    dimensions = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4)]
    if not dimensions or len(raw) - header != torch.Size(shape).numel():
        raise DataError(f"{path} is not an IDX file of bytes, or is cut short.")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(shape)


def load_pixels(folder: str | Path = FOLDER, split: str = "t10k") -> tuple[Tensor, Tensor]:
    """Load Fashion-MNIST images and labels as they are in the files.

    Args:
        folder: folder of the IDX files; by default the shipped sample of 1,000 test images.
        split: "t10k" (test) or "train", as the files are named.

    Returns:
        images, uint8 [B, 28, 28]; labels, uint8 [B].

    Raises:
        DataError: a file is missing or damaged.
    """
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        plain = Path(folder) / f"{split}-{kind}-ubyte"
        zipped = plain.with_name(plain.name + ".gz")
        arrays.append(read_idx(zipped if zipped.exists() else plain))
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(f"{folder} has {len(images)} images but {len(labels)} labels in its {split} files.")
    return images, labels


def load_images(folder: str | Path = FOLDER, split: str = "t10k") -> tuple[Tensor, Tensor]:
    """Load Fashion-MNIST images and labels for the built-in model.

    Args, Raises:
        as `load_pixels`.

    Returns:
        images, float [B, 1, 28, 28], normalised as in training; labels, int64 [B].
    """
    images, labels = load_pixels(folder, split)
    return (images[:, None].float() / 255 - MEAN) / STD, labels.long()
