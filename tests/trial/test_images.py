"""Images that are at hand as tensors."""

import pytest
import torch

from token_merge_plugin.trial import Tensors


@pytest.mark.parametrize("labels", [None, torch.zeros(3, dtype=torch.int64)])
def test_labels_are_on_the_device_of_the_images(labels):
    images = Tensors(torch.empty(3, 1, 8, 8, device="meta"), labels)
    assert [batch.labels.device.type for batch in images.batches()] == ["meta"]
