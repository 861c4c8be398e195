"""Images that are at hand as tensors, and those that come in batches of many forms."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from token_merge_plugin import DataError
from token_merge_plugin.trial import Tensors
from token_merge_plugin.trial.images import collect_images


@pytest.mark.parametrize("labels", [None, torch.zeros(3, dtype=torch.int64)])
def test_labels_are_on_the_device_of_the_images(labels):
    images = Tensors(torch.empty(3, 1, 8, 8, device="meta"), labels)
    assert [batch.labels.device.type for batch in images.batches()] == ["meta"]


IMAGES, LABELS = torch.rand(5, 3, 8, 8), torch.arange(5)
BATCHES = [(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])]


@pytest.mark.parametrize(
    "given",
    [
        IMAGES,
        [IMAGES[:3], IMAGES[3:]],
        BATCHES,
        [list(batch) for batch in BATCHES],
        [{"label": y, "pixel_values": x} for x, y in BATCHES],
        (batch for batch in BATCHES),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2),
        Tensors(IMAGES, LABELS, batch_size=4),
        [*Tensors(IMAGES, batch_size=4).batches()],
    ],
    ids=["tensor", "tensors", "tuples", "lists", "dicts", "generator", "DataLoader", "Tensors", "Batch"],
)
def test_images_are_collected_from_whatever_gives_them(given):
    assert torch.equal(collect_images(given), IMAGES)


def test_no_more_batches_are_read_than_are_needed():
    read = []

    def endless():
        while True:
            read.append(IMAGES)
            yield IMAGES

    assert len(collect_images(endless(), 12)) == 12
    assert len(read) == 3
    assert len(collect_images(IMAGES, 2)) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2, 3], "A batch is a int without a tensor"),
        (["photo.jpg"], "A batch is a str"),
        ("photos", "given as a str"),
        (None, "given as a NoneType"),
        ({"pixel_values": IMAGES}, "given as a dict"),
        (IMAGES[0], r"shape \[3, 8, 8\].*One image is a batch as image\[None\]"),
        (TensorDataset(IMAGES, LABELS), "given as a TensorDataset.*a DataLoader"),
        ([*TensorDataset(IMAGES, LABELS)], "through a DataLoader"),
        ((255 * IMAGES).to(torch.uint8), "torch.uint8, not floats"),
        (IMAGES[:0], "given none"),
        ([], "gives no batch"),
        ([IMAGES, IMAGES[..., :4]], r"several kinds: \[3, 8, 8\].* and \[3, 8, 4\]"),
    ],
)
def test_what_are_no_batches_of_images_is_refused_with_what_is_allowed(given, message):
    with pytest.raises(DataError, match=message):
        collect_images(given)
