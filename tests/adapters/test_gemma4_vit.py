"""What holds for Gemma 4, which takes patches with padding: `test_families.py` holds the rest."""

import pytest
import torch
from families import images, make

from token_merge_plugin import apply


@pytest.mark.parametrize("kind", ["Gemma 4", "Gemma 4, encoder"])
@torch.no_grad()
def test_padding_changes_nothing(kind):
    """An image among larger ones is padded. It is merged to the count that it has alone."""
    model = apply(make(kind), 0.6)
    small, large = images(kind)[:1, :, :96], images(kind)[1:]
    patches = torch.zeros(2, 81, 16 * 16 * 3)
    coordinates = torch.full((2, 81, 2), -1)
    for i, image in enumerate((small, large)):
        height, width = image.shape[2] // 16, image.shape[3] // 16
        grid = image.unflatten(2, (height, 16)).unflatten(4, (width, 16))[0]
        patches[i, : height * width] = grid.permute(1, 3, 2, 4, 0).reshape(height * width, -1)
        coordinates[i, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    together = model.forward_features({"patches": patches, "patch_coord": coordinates})
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[:1, :54], model.forward_features(small), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[1:], model.forward_features(large), rtol=1e-3, atol=1e-4)
    output = model({"patches": patches, "patch_coord": coordinates})
    torch.testing.assert_close(output[1:], model(large), rtol=1e-3, atol=1e-4)
