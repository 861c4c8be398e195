"""Multi-scale features of the patch grid: to choose tokens by without training, or learned, and fused into the tokens.

Bian et al. (arXiv 2306.04897) fuse features of several scales into the tokens before tokens are pruned. Without
training the tokens cannot be changed (blending a token with its neighbourhood costs accuracy at once), but what
decides which tokens stay and where the others go can be read at several scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (3, 5)
LEARNED_SCALES = (3, 5, 7)


class MultiScaleFusion(nn.Module):
    """Adds to each token what depthwise convolutions of several sizes see around it on the patch grid.

    The gates start at zero, so that an untrained module changes nothing, and training decides how much of each scale
    goes into each channel.

    Args:
        dim: channels of a token.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, **factory)  # type: ignore[arg-type]
            for size in LEARNED_SCALES
        )
        self.gates = nn.Parameter(torch.zeros(len(LEARNED_SCALES), dim, **factory))  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Return fused tokens [B, N, C], given tokens [B, N, C] on a grid (height, width) of N patches."""
        grid = tokens.transpose(1, 2).unflatten(2, grid_size)  # [B, C, height, width]
        for gate, conv in zip(self.gates, self.convs, strict=True):
            grid = grid + gate[:, None, None] * conv(tokens.transpose(1, 2).unflatten(2, grid_size))
        return grid.flatten(2).transpose(1, 2)


def fuse(features: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Return the mean of the features and of their neighbourhood means, over squares of 3 and 5 patches.

    Args:
        features: [B, N, C] on the full patch grid.
        grid_size: (height, width), whose product is N.

    Returns:
        [B, N, C].
    """
    grid = features.transpose(1, 2).unflatten(2, grid_size)  # [B, C, height, width]
    fused = grid
    for scale in SCALES:
        fused = fused + F.avg_pool2d(grid, scale, stride=1, padding=scale // 2, count_include_pad=False)
    return (fused / (1 + len(SCALES))).flatten(2).transpose(1, 2)
