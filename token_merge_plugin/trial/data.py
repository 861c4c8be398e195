"""Images for a trial, through timm's own functions.

With the models of `models.py`, the path is that of timm's validate.py: `create_model`, `load_checkpoint`,
`resolve_input_data_config`, `create_dataset` and `create_loader`. So an unpatched model has the accuracy here that
validate.py prints for it. What differs: an image that cannot be read is named and left out, where timm puts its
neighbour in its place; images of 16 bits are scaled to 8, where Pillow cuts them off; more kinds of files are taken
from folders; and the images shared among several processes are never padded with duplicates.
"""

import copy
import importlib.util
import operator
import os
import random
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, get_img_extensions
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.functional import to_pil_image

from token_merge_plugin.builtin import CLASSES, FOLDER, load_pixels
from token_merge_plugin.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    counted,
    first_few,
    first_line,
    how_to_install,
)
from token_merge_plugin.trial.images import NO_LABEL, Batch

# validate.py's 4, where there are so many cores.
DEFAULT_WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
# In a sample's row, in the place of its label. Worker processes send numbers back, no exceptions.
_UNREADABLE, _BAD_LABEL = -2, -3

_LABEL_ADVICE = "Give --class-map FILE (one folder name a line, in the order of the model's classes), or --unlabelled."
# Beside those that timm takes.
_MORE_EXTENSIONS = (".webp", ".bmp", ".tif", ".tiff", ".gif")
# Names of the folders of splits, those with one meaning together: as in timm's `create_dataset`.
_SAME_SPLIT = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test",))
_SPLITS = [name for names in _SAME_SPLIT for name in names]
_PACKAGES = {"hfds": "datasets", "wds": "webdataset", "torch": "torchvision"}


class Data:
    """Images in batches, from `open_data`. Each iteration is a new pass in the same order.

    Attributes:
        labelled: there are labels to compare with.
        description: what the images are, in one line.
        indices: numbers, in the whole source, of the images that this process goes through.
        batch_size: images a batch; a new value holds from the next pass on.
        warnings: what may be wrong with the labels.
    """

    def __init__(
        self,
        samples: "_Images | _Shards",
        config: Mapping[str, Any],
        *,
        indices: Sequence[int],
        labelled: bool,
        num_classes: int | None,
        description: str,
        batch_size: int,
        workers: int,
        device: torch.device,
        warnings: Sequence[str] = (),
    ):
        self.labelled = labelled
        self.warnings = warnings
        self.description = description
        self.indices = indices
        self.batch_size = batch_size
        self._samples = samples
        self._config = dict(config)
        self._num_classes = num_classes
        self._workers = workers
        self._device = device
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far, each with the reason."""
        return [self._unreadable[index] for index in sorted(self._unreadable)]

    def filename(self, index: int) -> str:
        """Return the name of an image, given its number in the whole source."""
        return self._samples.name(index)

    def picture(self, index: int) -> Image.Image:
        """Return an image as the model gets it, resized and cropped, but not normalised.

        Args:
            index: number of the image in the whole source.

        Raises:
            DataError: the image cannot be read.
        """
        try:
            image, _ = self._samples.open(index)
        except Exception as error:  # as in `_Images.__getitem__`
            raise DataError(f"{self.filename(index)} cannot be read: {_reason(error)}") from error
        return to_pil_image(create_transform(**self._config, use_prefetcher=True)(image))

    def subset(self, indices: Sequence[int]) -> "Data":
        """Return these images alone, given their numbers in the whole source, in the order of the source."""
        part = copy.copy(self)
        part.indices = sorted(indices)
        part._unreadable = {}
        return part

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Go through the images from the one at position `start` on; `Batch.end` says where to resume.

        Raises:
            DataError: no image could be read, or a label is not a class of the model.
        """
        samples = copy.copy(self._samples)
        samples.indices = self.indices[start:]
        if not samples.indices:
            return
        end, delivered = start, 0
        for images, rows in self._loader(samples):
            indices, labels = rows.cpu().unbind(1)
            end += len(indices)
            readable = labels != _UNREADABLE
            self._unreadable.update({index: self._why_unreadable(index) for index in indices[~readable].tolist()})
            if readable.any():
                indices, labels = indices[readable], labels[readable]
                self._check_labels(indices, labels)
                delivered += len(indices)
                yield Batch(images, labels.to(self._device), indices, end)
        # A stream leaves out by itself what it cannot read, and does not say which.
        left_out = samples.indices[end - start :]
        self._unreadable.update(dict.fromkeys(left_out, "a sample that timm's log describes"))
        if start == delivered == 0:
            raise DataError(f"No image could be read, of {self.description}: {first_few(self.unreadable)}.")

    def _why_unreadable(self, index: int) -> str:
        """Return an image's name and the reason, which is found by reading it again: workers send numbers alone."""
        try:
            self._samples.open(index)
        except Exception as error:
            return f"{self.filename(index)}: {_reason(error)}"
        return f"{self.filename(index)}: it could not be read before, and can be now"

    def _loader(self, samples: Any) -> Any:
        config = self._config
        return create_loader(
            samples,
            batch_size=self.batch_size,
            num_workers=min(self._workers, 1) if isinstance(samples, _Shards) else self._workers,
            collate_fn=partial(_collate, channels=config["input_size"][0]),
            persistent_workers=False,
            pin_memory=self._device.type == "cuda",
            device=self._device,
            **config,
        )

    def _check_labels(self, indices: Tensor, labels: Tensor) -> None:
        bad = labels == _BAD_LABEL
        if bad.any():
            name = self.filename(int(indices[bad][0]))
            raise DataError(
                f"The label of {name} is not one class index, or not in the class map. Name the field of the label "
                f"with --target-key. {_LABEL_ADVICE}"
            )
        if self._num_classes is not None and (labels >= self._num_classes).any():
            raise DataError(_too_many_classes(self.description, int(labels.max()) + 1, self._num_classes))


class _Images(Dataset):
    """Random access to a timm reader, or to a torchvision dataset, by image number; `create_loader` sets `transform`.

    It stands in for timm's `ImageDataset`, which replaces an image that it cannot read by the next one.

    Attributes:
        reader: gives an open file or a PIL image, and a label or None.
        indices: numbers of the images to go through.
        transform: PIL image -> uint8 tensor [C, H, W].
    """

    def __init__(self, reader: Any, mode: str, labelled: bool):
        self.reader = reader
        self.mode = mode
        self.labelled = labelled
        self.indices: Sequence[int] = range(len(reader))
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor | None, Tensor]:
        index = self.indices[position]
        try:
            image, label = self.open(index)
        except _LabelError:
            return None, torch.tensor([index, _BAD_LABEL])
        except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
            return None, torch.tensor([index, _UNREADABLE])
        return self.transform(image), torch.tensor([index, label])

    def open(self, index: int) -> tuple[Image.Image, int]:
        """Return the image in the model's colour mode, and its label."""
        try:
            source, label = self.reader[index]
        except KeyError as error:
            raise _LabelError from error
        if isinstance(source, Image.Image):
            image = _converted(source, self.mode)
        else:
            with source, Image.open(source) as opened:
                image = _converted(opened, self.mode)
        return image, _class_index(label) if self.labelled else NO_LABEL

    def name(self, index: int) -> str:
        if hasattr(self.reader, "samples"):  # timm's and torchvision's folders
            return str(Path(self.reader.samples[index][0]).relative_to(self.reader.root))
        try:
            return self.reader.filename(index) or f"image {index}"
        except (AttributeError, TypeError):  # no names at all, or none in this cell of the table
            return f"image {index}"


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a colour mode of 8 bits. Pillow's own conversion makes nearly all 16-bit values white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert(mode)


def _reason(error: Exception) -> str:
    """Return what an error says, without the file, which is named beside it."""
    return re.sub(r" ?<_io\.[^>]*>| ?'?/[^']*'", "", first_line(error)).strip(" :.") or type(error).__name__


class _Shards(IterableDataset):
    """A stream of samples from WebDataset shards, numbered in the order of the shards.

    One reader alone goes through the shards, so that the order, and with it an image's number, is always the same.
    """

    def __init__(self, reader: Any, labelled: bool):
        self.reader = reader
        # With a process group, timm's reader shares the shards out by itself, with duplicates.
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        self.labelled = labelled
        self.indices: Sequence[int] = range(reader.num_samples)
        self.transform: Any = None

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        wanted = set(self.indices)
        index = -1
        try:
            for index, (image, label) in enumerate(islice(self._samples(), max(wanted) + 1)):
                if index in wanted:
                    yield self.transform(image), torch.tensor([index, label])
        except (KeyError, TypeError, ValueError):  # timm's reader skips the other samples that it cannot use
            yield None, torch.tensor([index + 1, _BAD_LABEL])

    def _samples(self) -> Iterator[tuple[Image.Image, int]]:
        for image, label in self.reader:
            yield image, _class_index(label) if self.labelled else NO_LABEL

    def open(self, index: int) -> tuple[Image.Image, int]:
        return next(islice(self._samples(), index, None))

    def name(self, index: int) -> str:
        return f"image {index}"


class _LabelError(ValueError):
    """A sample's label is not one class index, or is not in the class map."""


class _OneFile:
    """Reader of a single image."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[BinaryIO, None]:
        return open(self.path, "rb"), None

    def filename(self, index: int) -> str:
        return self.path.name


def has_idx_files(folder: Path) -> bool:
    """Return whether a folder holds Fashion-MNIST's IDX files."""
    return any(folder.glob("*-images-idx3-ubyte*"))


class FashionMnist:
    """Reader of a folder of Fashion-MNIST's IDX files."""

    def __init__(self, folder: Path, split: str):
        images, self.labels = load_pixels(folder, "train" if split in ("train", "training") else "t10k")
        self.images = images.numpy()  # [B, 28, 28]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_data(
    source: str | Path | None,
    config: Mapping[str, Any],
    *,
    dataset: str = "",
    split: str | None = None,
    class_map: str | Path | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    num_classes: int | None = None,
    unlabelled: bool = False,
    num_images: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 50,
    workers: int = DEFAULT_WORKERS,
    device: str | torch.device = "cpu",
) -> Data:
    """Open images for a model. What they are is said as to timm's validate.py: a folder, and the name of a dataset.

    Args:
        source: folder of images, in one folder a class or in no folders; or of Fashion-MNIST's IDX files; or a single
            image; or where the dataset of that name is (for `hfds/`, its cache, which may be left to the library).
            None for the built-in images.
        config: from `data_config`.
        dataset: "hfds/NAME" (Hugging Face), "torch/NAME" (torchvision) or "wds/" (WebDataset); empty for folders.
        split: name of the split; the folder of that name inside `source` is entered. None for "validation", if there
            are splits. For "wds/", also the shards, and the number of their images: "val-{0000..0009}.tar|50000".
        class_map: file with one class name a line, in the order of the model's classes.
        input_key: field of the image; of a folder, the file extensions to take, as ".webp;.png".
        target_key: field of the label.
        num_classes: classes of the model, to check the labels against; 0 says that it has no classifier.
        unlabelled: ignore the labels.
        num_images: take so many of the images, chosen by chance.
        seed: of that choice.
        rank, world_size: this process takes every `world_size`-th image, from the one numbered `rank` on.
        batch_size: images a batch.
        workers: processes that read images; 0 to read in this one.
        device: where the batches go.

    Raises:
        ConfigError: an option has a value that is not allowed.
        DataError: there are no images there, or their labels do not fit the model.
        MissingExtraError: the package that reads this kind of dataset is not installed.
    """
    if num_images is not None and num_images < 1:
        raise ConfigError(f"num_images={num_images} is not positive.")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} is outside 0 to {world_size - 1}, the ranks of {world_size} processes.")
    unlabelled = unlabelled or num_classes == 0
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"The model takes images of {channels} channels: images are read as 1 (grey) or 3 (RGB).")
    mode = "RGB" if channels == 3 else "L"
    keys = {"input_key": input_key, "target_key": target_key, "class_map": None if unlabelled else class_map}
    if source is not None and not dataset and str(source).startswith("hfds/"):
        source, dataset = None, str(source)
    samples: _Images | _Shards
    if dataset:
        if source is not None and Path(source).is_dir() and dataset.lower() in ("torch/image_folder", "torch/folder"):
            _check_split(Path(source), split)
        samples, classes = _open_named(dataset, source, split or "validation", mode, unlabelled, keys)
        where = f"{dataset}, {split or 'validation'}"
    else:
        path = FOLDER if source is None else Path(source)
        samples, classes = _open_path(path, split, mode, unlabelled, keys)
        where = "Fashion-MNIST, built in" if source is None else str(path)
    doubts: list[str] = []
    if samples.labelled and num_classes is not None and classes is not None:
        doubts = _compare_classes(where, classes, num_classes, mapped=class_map is not None)
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)

    total = len(samples.indices)
    chosen: Sequence[int] = samples.indices
    if num_images is not None and num_images < total:
        chosen = sorted(random.Random(seed).sample(range(total), num_images))
    count = counted(total, "labelled image" if samples.labelled else "unlabelled image")
    if len(chosen) < total:
        count = f"{len(chosen):,} of {count}"
    return Data(
        samples,
        config,
        indices=chosen[rank::world_size],
        labelled=samples.labelled,
        num_classes=num_classes,
        description=f"{count}, {where}",
        batch_size=batch_size,
        workers=workers,
        device=torch.device(device),
        warnings=doubts,
    )


def _open_path(
    path: Path, split: str | None, mode: str, unlabelled: bool, keys: dict[str, Any]
) -> tuple[_Images, int | None]:
    """Return the images of a folder or file, and the number of their classes if it is known."""
    if not path.exists():
        raise DataError(f"There is no {path}. Give a folder of images, or an image.")
    if path.is_file():
        if tarfile.is_tarfile(path):
            raise DataError(f'{path} is an archive. Unpack it, or read WebDataset shards by their folder and "wds/".')
        return _Images(_OneFile(path), mode, labelled=False), None
    if has_idx_files(path):
        if split is not None and split not in _SPLITS:
            raise DataError(_no_split(path, split, ["train", "test"]))
        return _Images(FashionMnist(path, split or "test"), mode, not unlabelled), len(CLASSES)
    _check_split(path, split)
    if keys["input_key"] is None:
        keys = {**keys, "input_key": ";".join(dict.fromkeys([*get_img_extensions(), *_MORE_EXTENSIONS]))}
    reader = _create("", path, split or "validation", mode, keys).reader
    flat = set(reader.class_to_idx) == {""}
    return _Images(reader, mode, not (unlabelled or flat)), max(reader.class_to_idx.values()) + 1


def _check_split(folder: Path, split: str | None) -> None:
    """Refuse a split that is not there: timm would take everything under the folder.

    A folder whose folders have such names, or two of them, has splits: "train" alone may be a class as well.
    """
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    there = [name for name in folders if name in _SPLITS]
    wanted = split or "validation"
    same = next((names for names in _SAME_SPLIT if wanted in names), ())
    if (folder / wanted).is_dir() or any(name in there for name in same):
        return
    if split is not None or len(there) > 1 or (there and there == folders):
        raise DataError(_no_split(folder, wanted, there))


def _no_split(folder: Path, split: str, there: Sequence[str]) -> str:
    choice = f"Those there are: {', '.join(there)}." if there else "It has no splits: leave --split out."
    return f"{folder} has no split {split!r}. {choice}"


def _open_named(
    dataset: str, source: str | Path | None, split: str, mode: str, unlabelled: bool, keys: dict[str, Any]
) -> tuple[_Images | _Shards, int | None]:
    """Return the images of one of timm's named datasets, and the number of their classes if it is known."""
    kind = dataset.partition("/")[0].lower()
    if "/" not in dataset or kind not in _PACKAGES:
        raise ConfigError(
            f"dataset={dataset!r} is not known. Its name begins with {', '.join(f'{k}/' for k in _PACKAGES)}."
        )
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        advice = how_to_install(_PACKAGES[kind], "data")
        raise MissingExtraError(f"{dataset} needs the package {_PACKAGES[kind]}, which is not installed. {advice}")
    if kind != "hfds" and (source is None or not Path(source).is_dir()):
        raise DataError(f"{dataset} needs the folder where it is: given {source}. Give it with --data.")
    if kind == "torch":
        if keys.pop("class_map") is not None:
            raise ConfigError("torch/ datasets take no class map. Read their folder without a dataset's name.")
        images = _create(dataset, source, split, mode, keys)
        return _Images(images, mode, not unlabelled), len(images.classes) if hasattr(images, "classes") else None
    reader = _create(dataset, source, split, mode, keys).reader
    classes = max(reader.class_to_idx.values()) + 1 if reader.class_to_idx else None
    if kind == "wds":
        reader.num_samples = reader.num_samples or _count_samples(reader)
        return _Shards(reader, not unlabelled), classes
    fields = reader.dataset.features
    if reader.dataset.data.column(reader.image_key).null_count == len(reader):  # a field that is not there, too
        raise DataError(
            f"{dataset} has no images in {reader.image_key!r}. Its fields: {', '.join(fields)} (--input-key)."
        )
    labelled = not unlabelled and all(_has_field(fields, key) for key in _label_keys(reader))
    if not labelled:
        # timm's reader always looks for a label: any field that is there will do.
        reader.label_key, reader.target_keys = reader.image_key, None
    return _Images(reader, mode, labelled), classes


def _label_keys(reader: Any) -> list[str]:
    """Return the names of the fields that a reader of timm takes labels from; older ones know a single one."""
    return getattr(reader, "target_keys", None) or [reader.label_key]


def _has_field(fields: Any, name: str) -> bool:
    """Return whether there is a field of that name, or of that path in newer versions of timm."""
    try:
        from timm.data.readers.targets import has_field
    except ImportError:
        return name in fields
    return has_field(fields, name)


def _create(dataset: str, source: str | Path | None, split: str, mode: str, keys: dict[str, Any]) -> Any:
    if keys.get("class_map") is not None:
        keys = {**keys, "class_map": str(keys["class_map"])}
    root = None if source is None else str(source)
    try:
        return create_dataset(dataset, root=root, split=split, input_img_mode=mode, **keys)
    except Exception as error:  # timm and the libraries below it raise classes of every kind, AssertionError too
        if not dataset and "Found 0 images" in str(error):
            raise DataError(_no_images(source, keys)) from error
        advice = " Name its fields with --input-key and --target-key, and its split with --split." if dataset else ""
        raise DataError(f"{dataset or source} cannot be opened: {first_line(error)}{advice}") from error


def _no_images(folder: str | Path | None, keys: dict[str, Any]) -> str:
    if keys["class_map"] is not None:
        return f"{folder} has no image in a folder that {keys['class_map']} names. {_LABEL_ADVICE}"
    types = keys["input_key"].replace(";", ", ")
    return f'{folder} has no images ({types}). Other files are taken with --input-key ".jp2;.ppm", for example.'


def _count_samples(reader: Any) -> int:
    import webdataset

    shards = [str(Path(reader.root) / name) for name in reader.split_info.filenames]
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing:
        raise DataError(f"Shards are missing: {first_few(missing)}.")
    return sum(1 for _ in webdataset.DataPipeline(webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples()))


def _compare_classes(where: str, classes: int, num_classes: int, mapped: bool) -> list[str]:
    """Return what may be wrong with the labels.

    Raises:
        DataError: they cannot be right.
    """
    if classes > num_classes:
        raise DataError(_too_many_classes(where, classes, num_classes))
    if classes == num_classes or mapped:
        return []
    return [
        f"{where} has {counted(classes, 'class', 'classes')}, the model {num_classes}: labels are numbers in the "
        f"sorted list of the data's own classes, which are probably not the model's. {_LABEL_ADVICE}"
    ]


def _too_many_classes(where: str, classes: int, num_classes: int) -> str:
    return (
        f"{where} has labels of {classes} classes, the model has {num_classes}. {_LABEL_ADVICE} A model made for other "
        "data is created with --num-classes and --checkpoint."
    )


def _class_index(label: Any) -> int:
    if label is None:
        return NO_LABEL
    try:
        return max(NO_LABEL, operator.index(label))
    except TypeError as error:
        raise _LabelError from error


def _collate(samples: list[tuple[Tensor | None, Tensor]], channels: int) -> tuple[Tensor, Tensor]:
    """Stack the images that could be read [R, C, H, W], and the rows (index, label) of all samples [B, 2]."""
    readable = [sample for sample in samples if sample[0] is not None]
    images = fast_collate(readable)[0] if readable else torch.empty(0, channels, 1, 1, dtype=torch.uint8)
    return images, torch.stack([row for _, row in samples])
