r"""Fine-tune a ViT with real pretrained weights to tell objects apart in front of natural backgrounds.

    python examples/real_weights.py --output weights
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python examples/train_classifier.py --objects stamps/usr/share/tuxpaint/stamps --backgrounds photographs \
        --init weights/backbone.safetensors --output classifier --bfloat16

An image is one object, cut out by its alpha channel, at a random place, size and angle in front of a crop of a
photograph; each object is a class. Every fourth photograph, by name, is kept for the test images, so the test shows
backgrounds that training never showed. Image i of a split follows from the seed, i and the files alone, whenever and
in whatever order images are made: no file of images is needed. To have files all the same,

    python examples/train_classifier.py --objects ... --backgrounds ... --write test 2000 objects/test

writes them as folders that `token-merge trial --data` reads, named so that their order is that of the classes.

The objects are the photographs of things among Debian's Tux Paint stamps, and not the drawings: pictures with enough
opaque pixels, and with many colours. Backgrounds are photographs from any folders; see real_weights.py.

The lower half of the blocks stays as it was pretrained. Most images of training are small, windows of 112 x 112 pixels
with the object inside, which is four times cheaper, and the last ones are whole. --schedule lists phases: pixels of a
side, images, and peak learning rate. The default takes about half an hour of one core.

The output folder holds
    last.checkpoint      everything: the same command goes on from there after an interruption, to the same result
    weights.safetensors  weights so far, for images of --img-size: `token-merge evaluate --model
                         vit_small_patch14_dinov2 --img-size 224 --num-classes N --checkpoint weights.safetensors`
    classes.txt          names of the classes, one a line
    log.jsonl            a line for each phase, with top-1 on the test images
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from finetune import keep_freed_memory, parameter_groups, read_checkpoint, write
from PIL import Image
from real_weights import MODEL, fit_positions, read_photographs
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from train_reference import label_loss, learning_rate, soft_labels

from token_merge_plugin.errors import ConfigError, DataError, TokenMergeError

SPLITS = ("train", "test")
TEST_EVERY = 4  # every so many-th photograph is for the test
SCHEDULE = "112 11200 5e-4, 224 3200 2e-4"
# Of 224 px: what is cached is no larger than it can be shown.
OBJECT_SIDE, BACKGROUND_SIDE = 192, 448
ALIKE = 4.0  # of 255: mean difference of 16 x 16 thumbnails below which two objects are one


# ---------------------------------------------------------------------------------------------------------------------
# Objects and backgrounds


class Picture(NamedTuple):
    """An object, RGBA and cropped to what is opaque, or a background, RGB, and the name of its file."""

    name: str
    image: Image.Image


def read_objects(folder: Path, pixels: int = 10_000, colors: float = 0.27) -> list[Picture]:
    """Return the cut-out photographs in a folder of PNG files and the folders below it, sorted by name.

    A picture that occurs twice, or mirrored as well, is taken once.

    Args:
        pixels: least number of opaque pixels.
        colors: least number of different colours, as a share of the opaque pixels: photographs have many.

    Raises:
        DataError: there is no such folder, or fewer than two such pictures in it.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of objects.")
    objects: list[Picture] = []
    seen: list[np.ndarray] = []
    for path in sorted(folder.rglob("*.png")):
        image = _cut_out(path, pixels, colors)
        if image is None:
            continue
        small = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).astype(np.float32)
        if any(np.abs(small - other).mean() < ALIKE for other in seen):
            continue
        seen += [small, small[:, ::-1]]
        image.thumbnail((OBJECT_SIDE, OBJECT_SIDE), Image.Resampling.BICUBIC)
        objects.append(Picture(path.relative_to(folder).with_suffix("").as_posix(), image))
    if len(objects) < 2:
        raise DataError(
            f"The folder {folder} has {len(objects)} PNG files of at least {pixels} opaque pixels and a transparent "
            "background that are no drawings. Two or more are needed: --objects, --object-pixels, --object-colors."
        )
    return objects


def _cut_out(path: Path, pixels: int, colors: float) -> Image.Image | None:
    """Return an object cropped to what is opaque, None if it is none, a drawing or too small."""
    try:
        with Image.open(path) as file:
            if "A" not in file.mode and "transparency" not in file.info:
                return None
            image = file.convert("RGBA")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
        return None
    opaque = np.asarray(image)[..., 3] > 127
    count = int(opaque.sum())
    if count < max(pixels, 1):
        return None
    rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    if count > 0.97 * (box[2] - box[0]) * (box[3] - box[1]):
        return None  # a rectangle: nothing was cut out
    red, green, blue = np.asarray(image)[opaque][:, :3].astype(np.int64).T
    if len(np.unique(red << 16 | green << 8 | blue)) < colors * count:
        return None
    return image.crop(box)


def read_backgrounds(folders: Sequence[Path]) -> dict[str, list[Picture]]:
    """Return the photographs in some folders for each of `SPLITS`: no photograph is in both.

    Raises:
        DataError: a folder is missing or has no photograph, or there are fewer than `TEST_EVERY` in all.
    """
    pictures = []
    for folder in folders:
        for name, image in read_photographs(folder):
            scale = BACKGROUND_SIDE / min(image.size)
            if scale < 1:
                image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            pictures.append(Picture(name, image))
    if len(pictures) < TEST_EVERY:
        raise DataError(
            f"--backgrounds has {len(pictures)} photographs, and every {TEST_EVERY}th is for the test: give more."
        )
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for number, picture in enumerate(pictures, 1):
        splits["train" if number % TEST_EVERY else "test"].append(picture)
    return splits


class Placement(NamedTuple):
    """How an image is put together; places and lengths as shares of what is there to choose from."""

    label: int
    background: int
    crop: float  # of the background's shorter side
    crop_x: float
    crop_y: float
    length: float  # of the object's longer side, of the image's
    angle: float  # degrees
    x: float
    y: float
    window_x: float
    window_y: float


class PastedObjects(Dataset):
    """Images [3, window, window], normalised by ImageNet's mean and standard deviation, and labels, by number.

    Image i shows object i modulo the number of objects.

    Args:
        objects: of `read_objects`; their order is that of the classes.
        backgrounds: of one split.
        split: one of `SPLITS`.
        count: number of images.
        size: pixels of an image's side.
        window: show only so many pixels of each side, with the object inside as far as it fits; None for all.
        lengths: smallest and largest length of an object, as a share of the image's side.
    """

    def __init__(
        self,
        objects: list[Picture],
        backgrounds: list[Picture],
        split: str,
        count: int,
        size: int = 224,
        window: int | None = None,
        seed: int = 0,
        lengths: tuple[float, float] = (0.15, 0.5),
    ):
        self.objects, self.backgrounds = objects, backgrounds
        self.count, self.size, self.window, self.lengths = count, size, window or size, lengths
        self.seed = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.count

    def placement(self, number: int) -> Placement:
        """Return how an image is put together; `background` tells which images have the same one."""
        random = np.random.default_rng((*self.seed, number))
        return Placement(
            label=number % len(self.objects),
            background=int(random.integers(len(self.backgrounds))),
            crop=random.uniform(0.4, 1),
            crop_x=random.uniform(),
            crop_y=random.uniform(),
            length=random.uniform(*self.lengths),
            angle=random.uniform(0, 360),
            x=random.uniform(),
            y=random.uniform(),
            window_x=random.uniform(),
            window_y=random.uniform(),
        )

    def image(self, number: int) -> Image.Image:
        """Return one image, RGB."""
        if not 0 <= number < self.count:
            raise IndexError(f"There are {self.count} images, and none has number {number}.")
        at = self.placement(number)
        background, thing = self.backgrounds[at.background].image, self.objects[at.label].image
        side = at.crop * min(background.size)
        x, y = ((edge - side) * share for edge, share in zip(background.size, (at.crop_x, at.crop_y), strict=True))
        box = (x, y, x + side, y + side)
        canvas = background.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        scale = at.length * self.size / max(thing.size)
        thing = thing.resize([max(1, round(edge * scale)) for edge in thing.size], Image.Resampling.BICUBIC)
        thing = thing.rotate(at.angle, Image.Resampling.BICUBIC, expand=True)
        x, y = (round((self.size - edge) * share) for edge, share in zip(thing.size, (at.x, at.y), strict=True))
        canvas.paste(thing, (x, y), thing)
        left, top = self._window(x, thing.width, at.window_x), self._window(y, thing.height, at.window_y)
        return canvas.crop((left, top, left + self.window, top + self.window))

    def _window(self, start: int, length: int, share: float) -> int:
        """Return where the window begins, along one side: it holds the object, or nothing but the object."""
        first, last = sorted((start, start + length - self.window))
        first, last = max(first, 0), min(last, self.size - self.window)
        return round(first + (last - first) * share)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(np.array(self.image(number))).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return (pixels - mean) / std, number % len(self.objects)

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, size, size] and labels [B]."""
        images, labels = zip(*(self[number] for number in numbers), strict=True)
        return torch.stack(images), torch.tensor(labels)


def write_images(data: PastedObjects, folder: Path) -> None:
    """Write images into one folder a class, named by the class's number and name.

    Raises:
        DataError: there are fewer images than classes: who reads the folders would number the classes otherwise.
    """
    if len(data) < len(data.objects):
        raise DataError(f"{len(data)} images cannot show {len(data.objects)} classes: write at least as many.")
    for number in tqdm(range(len(data)), desc="writing", unit="image", mininterval=5):
        label = number % len(data.objects)
        file = folder / f"{label:03d}_{data.objects[label].name.replace('/', '_')}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        data.image(number).save(file, quality=95)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Phase(NamedTuple):
    """A part of the schedule."""

    size: int  # pixels
    images: int
    lr: float  # peak


def read_schedule(text: str, img_size: int) -> list[Phase]:
    """Return the phases of a text such as "112 11200 5e-4, 224 3200 2e-4".

    Raises:
        ConfigError: a phase is written otherwise.
    """
    phases = []
    for part in text.split(","):
        try:
            size, images, lr = part.split()
            phase = Phase(int(size), int(images), float(lr))
        except ValueError:
            phase = Phase(0, 0, 0.0)
        if min(phase) <= 0 or phase.size > img_size:
            raise ConfigError(
                f'--schedule: "{part.strip()}" is no phase. Give pixels, up to {img_size}, images and learning rate, '
                'such as "224 3200 2e-4", with commas between the phases.'
            )
        phases.append(phase)
    return phases


def build_model(args: argparse.Namespace, num_classes: int) -> Any:
    """Return a ViT of timm with the weights to start from and a new classifier, which takes images of several sizes.

    Raises:
        ConfigError: timm has no such model, or it takes images of one size.
        DataError: there are no such weights, or they do not fit.
    """
    torch.manual_seed(args.seed)
    try:
        model: Any = timm.create_model(
            args.model, num_classes=num_classes, img_size=args.img_size, dynamic_img_size=True
        )
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"--model {args.model} is no VisionTransformer of timm: {error}") from error
    if not args.init.is_file():
        raise DataError(f"There are no weights {args.init}. examples/real_weights.py writes some.")
    try:
        state = fit_positions(load_file(args.init), model)
        state |= {name: x for name, x in model.state_dict().items() if name.startswith("head.")}
        model.load_state_dict(state)
    except Exception as error:  # of torch and of safetensors
        raise DataError(f"--init {args.init} does not fit --model {args.model}: {error}") from error
    return model


def freeze(model: Any, blocks: int) -> None:
    """Keep the first blocks of a ViT, and its embeddings, from learning: nothing is propagated back to them."""
    if blocks:
        for name in ("cls_token", "reg_token", "pos_embed"):
            if getattr(model, name, None) is not None:
                getattr(model, name).requires_grad_(False)
        nn.ModuleList([model.patch_embed, *model.blocks[:blocks]]).requires_grad_(False)


class Training:
    """A training run: everything that it needs, and how far it is.

    Attributes:
        step: optimizer steps done, over all phases.
        loss_sum: of the steps of this phase.
        history: the lines of the log.
    """

    def __init__(self, args: argparse.Namespace, phases: list[Phase]):
        self.args, self.phases = args, phases
        self.objects = read_objects(args.objects, args.object_pixels, args.object_colors)
        self.backgrounds = read_backgrounds(args.backgrounds)
        self.model = build_model(args, len(self.objects))
        freeze(self.model, args.frozen_blocks)
        self.test = self._images("test", args.eval_images)
        self.step, self.loss_sum, self.history = 0, 0.0, []
        self.last_saved = time.monotonic()
        self._enter_phase(0)

    def _images(self, split: str, count: int, window: int | None = None) -> PastedObjects:
        args = self.args
        return PastedObjects(self.objects, self.backgrounds[split], split, count, args.img_size, window, args.seed)

    def _steps(self, phase: int) -> int:
        return -(-self.phases[phase].images // self.args.batch_size)

    def _enter_phase(self, phase: int) -> None:
        self.phase, self.loss_sum = phase, 0.0
        self.first = sum(map(self._steps, range(phase)))
        self.end = self.first + self._steps(phase)
        # Each step shows images that no step before it showed.
        self.train_images = self._images("train", self.end * self.args.batch_size, self.phases[phase].size)
        groups = parameter_groups(self.model, self.args.weight_decay, self.args.layer_decay, fusion_lr_scale=1.0)
        self.optimizer = torch.optim.AdamW(groups)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bfloat16)

    def run(self) -> None:
        """Go on to the end, from wherever the run is."""
        write(self.args.output / "classes.txt", "".join(f"{x.name}\n" for x in self.objects))
        for phase in range(self.phase, len(self.phases)):
            if phase != self.phase:
                self._enter_phase(phase)
            bar = tqdm(total=self.end, initial=self.step, desc=f"phase {phase}", unit="step", mininterval=10)
            while self.step < self.end:
                before = self.loss_sum
                self.take_step()
                bar.set_postfix(loss=f"{self.loss_sum - before:.3f}", refresh=False)
                bar.update()
                if time.monotonic() - self.last_saved > self.args.save_seconds:
                    self.save()
            bar.close()
            if len(self.history) == phase:
                self._end_phase()
                self.save()

    def take_step(self) -> None:
        """Do one optimizer step on the next images."""
        batch = self.args.batch_size
        images, labels = self.train_images.batch(range(self.step * batch, (self.step + 1) * batch))
        self.model.train()
        rate = learning_rate(self.step - self.first, self.end - self.first, self.phases[self.phase].lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        with self._autocast():
            target = soft_labels(labels, len(self.objects), self.args.label_smoothing)
            loss = label_loss(self.model(images), target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.loss_sum += loss.item()

    @torch.inference_mode()
    def top1(self) -> float:
        """Return the share of the test images that are classified right."""
        self.model.eval()
        right = 0
        for first in range(0, len(self.test), self.args.batch_size):
            images, labels = self.test.batch(range(first, min(first + self.args.batch_size, len(self.test))))
            with self._autocast():
                right += int((self.model(images).argmax(1) == labels).sum())
        return right / len(self.test)

    def _end_phase(self) -> None:
        line = {
            **self.phases[self.phase]._asdict(),
            "step": self.step,
            "loss": self.loss_sum / (self.end - self.first),
            "top1": self.top1(),
            "classes": len(self.objects),
            "test_images": len(self.test),
        }
        self.history.append(line)
        tqdm.write(json.dumps(line), file=sys.stdout)

    def save(self) -> None:
        """Write everything that the run needs to go on, and the weights so far."""
        output = self.args.output
        if not np.isfinite(self.loss_sum):
            raise ConfigError("The loss is no number any more. Give smaller learning rates in --schedule.")
        position = {"step": self.step, "phase": self.phase, "loss_sum": self.loss_sum, "history": self.history}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        write(output / "last.checkpoint", {"run": self.args.run} | position | state)
        write(output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        save_file(state["model"], output / "weights.safetensors.partial")
        (output / "weights.safetensors.partial").replace(output / "weights.safetensors")
        self.last_saved = time.monotonic()

    def resume(self, saved: dict[str, Any]) -> None:
        """Go back to a position that `save` wrote."""
        self._enter_phase(saved["phase"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.loss_sum, self.history = saved["step"], saved["loss_sum"], saved["history"]


def train(args: argparse.Namespace) -> None:
    """Run from the beginning, or go on where an earlier run of the same options was interrupted."""
    phases = read_schedule(args.schedule, args.img_size)
    args.output.mkdir(parents=True, exist_ok=True)
    saved = read_checkpoint(args)
    training = Training(args, phases)
    if saved is not None:
        training.resume(saved)
    training.run()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("images")
    group.add_argument("--objects", type=Path, required=True, help="folder of cut-out objects, PNG with alpha")
    group.add_argument("--backgrounds", type=Path, required=True, nargs="+", help="folders of photographs")
    group.add_argument("--object-pixels", type=int, default=10_000, help="least number of opaque pixels")
    group.add_argument("--object-colors", type=float, default=0.27, help="least number of colours, as a share of these")
    group.add_argument("--img-size", type=int, default=224, help="pixels of a test image's side")
    group.add_argument("--eval-images", type=int, default=1000, help="test images")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--write", nargs=3, metavar=("SPLIT", "COUNT", "FOLDER"), help="write images of a split, and train nothing"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--output", type=Path, help="folder of the results")
    group.add_argument("--model", default=MODEL, help="timm's name of a VisionTransformer")
    group.add_argument("--init", type=Path, help="its weights without a classifier, safetensors")
    group.add_argument("--schedule", default=SCHEDULE, help=f"phases (default: {SCHEDULE})")
    group.add_argument("--batch-size", type=int, default=32)
    group.add_argument("--frozen-blocks", type=int, default=6, help="so many blocks, and what is below, do not learn")
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--layer-decay", type=float, default=0.8, help="factor of the learning rate from layer to layer")
    group.add_argument("--label-smoothing", type=float, default=0.1)
    group.add_argument("--bfloat16", action="store_true", help="autocast to it")
    group.add_argument("--save-seconds", type=float, default=180.0, help="between two checkpoints")
    return parser


def write_split(args: argparse.Namespace) -> None:
    """Do what --write says."""
    split, count, folder = args.write
    if split not in SPLITS or not count.isdecimal():
        raise ConfigError(f"--write {' '.join(args.write)}: give {' or '.join(SPLITS)}, a number, and a folder.")
    objects = read_objects(args.objects, args.object_pixels, args.object_colors)
    backgrounds = read_backgrounds(args.backgrounds)[split]
    write_images(PastedObjects(objects, backgrounds, split, int(count), args.img_size, seed=args.seed), Path(folder))


def main(arguments: list[str] | None = None) -> int:
    parser = create_parser()
    args = parser.parse_args(arguments)
    free = ("output", "save_seconds", "write")  # the result does not depend on them
    args.run = {name: str(value) for name, value in vars(args).items() if name not in free}
    keep_freed_memory()
    try:
        if args.write is not None:
            write_split(args)
        elif args.output is None or args.init is None:
            parser.error("--output and --init are needed to train, --write to write images.")
        else:
            train(args)
    except TokenMergeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
