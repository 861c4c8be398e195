"""Images as a trial goes through them, in batches: whatever gives these, or tensors that are at hand."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from token_merge_plugin.errors import DataError

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
        self.description = f"{len(images):,} images"
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
