"""Images as a trial goes through them, in batches: whatever gives these, or tensors that are at hand."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from token_merge_plugin.errors import DataError, counted

NO_LABEL = -1


class Batch(NamedTuple):
    """Images that could be read, in the order of the data.

    Attributes:
        images: float [B, C, H, W], preprocessed, on the device.
        labels: int64 [B], on the device; -1 where there is none.
        indices: int64 [B], on the CPU: numbers of the images in the whole source.
        end: images that have gone by, with the unreadable ones; `batches(start=end)` goes on after them.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    end: int


class Images(Protocol):
    """What a trial goes through: `data.Data`, or `Tensors`."""

    labelled: bool
    description: str
    batch_size: int

    @property
    def unreadable(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def batches(self, start: int = 0) -> Iterator[Batch]: ...


class Tensors:
    """Images that are at hand as tensors.

    Args:
        images: [B, C, H, W], preprocessed, on the model's device.
        labels: [B], class indices, or None.
        batch_size: images a forward pass.

    Raises:
        DataError: there are no images, or the labels are not one for each.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, batch_size: int = 50):
        if len(images) == 0 or (labels is not None and len(images) != len(labels)):
            given = "none" if labels is None else len(labels)
            raise DataError(f"A trial needs images, and labels are one for each: given {len(images)} and {given}.")
        self.labelled = labels is not None
        self.description = counted(len(images), "image")
        self.batch_size = batch_size
        self.unreadable: list[str] = []
        self._images = images
        labels = torch.full((len(images),), NO_LABEL) if labels is None else labels
        self._labels = labels.to(images.device)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for begin in range(start, len(self), self.batch_size):
            index = torch.arange(begin, min(begin + self.batch_size, len(self)))
            part = slice(begin, begin + len(index))
            yield Batch(self._images[part], self._labels[part], index, begin + len(index))


# What images can be given as, where labels do not matter: see `collect_images`.
AnyImages: TypeAlias = Tensor | Images | Iterable[Any]


def collect_images(images: AnyImages, number: int | None = None) -> Tensor:
    """Return the first images of what gives images, on the CPU; those of one tensor stay where they are.

    Args:
        images: a tensor, [B, C, H, W]; what a trial goes through; or a DataLoader or another iterable of batches. A
            batch is a tensor, or a tuple, list or dict in which the first tensor of four dimensions has the images.
        number: how many at most: an iterable is read no further. None for all.

    Returns:
        [at most `number`, C, H, W], of a float dtype.

    Raises:
        DataError: there are none, or they are not batches of images of one size and of a float dtype.
    """
    if isinstance(images, Tensor):
        return _checked(images)[:number]
    batches = getattr(images, "batches", lambda: images)()
    if isinstance(batches, str | bytes | Mapping) or not hasattr(batches, "__iter__"):
        raise DataError(f"Images are given as a {type(images).__name__}. {_ALLOWED}")
    parts: list[Tensor] = []
    for batch in batches:
        part = _checked(_tensor_of(batch)).cpu()
        if parts and (part.shape[1:], part.dtype) != (parts[0].shape[1:], parts[0].dtype):
            both = " and ".join(f"{list(x.shape[1:])} of {x.dtype}" for x in (parts[0], part))
            raise DataError(f"Batches have images of several kinds: {both}. Prepare all of them alike.")
        parts.append(part)
        if number is not None and sum(map(len, parts)) >= number:
            break
    if not parts:
        raise DataError(f"There are no images: the {type(images).__name__} gives no batch.")
    return torch.cat(parts)[:number]


_ALLOWED = "Give a float tensor [B, C, H, W], a DataLoader, or another iterable of such batches."


def _tensor_of(batch: Any) -> Any:
    """Return the tensor of images in a batch; the batch itself where there is none."""
    values = [*batch.values()] if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return next((tensor for tensor in tensors if tensor.ndim == 4), tensors[0] if tensors else batch)


def _checked(images: Any) -> Tensor:
    if not isinstance(images, Tensor):
        raise DataError(f"A batch is a {type(images).__name__} without a tensor. {_ALLOWED}")
    if images.ndim != 4:
        one = " One image is a batch as image[None]; a Dataset gives batches through a DataLoader."
        raise DataError(f"A batch has the shape {list(images.shape)}. {_ALLOWED}{one if images.ndim == 3 else ''}")
    if not images.is_floating_point():
        raise DataError(
            f"Images are {images.dtype}, not floats. Give them preprocessed: scaled, and normalised by mean and std."
        )
    if len(images) == 0:
        raise DataError("There are no images: given none.")
    return images
