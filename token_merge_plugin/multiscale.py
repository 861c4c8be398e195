"""Multi-scale features of the patch grid, in their training-free form.

Bian et al. (arXiv 2306.04897) fuse features of several scales into the tokens before tokens are pruned. Without
training the tokens cannot be changed (blending a token with its neighbourhood costs accuracy at once), but what
decides which tokens stay and where the others go can be read at several scales.
"""

import torch.nn.functional as F
from torch import Tensor

SCALES = (3, 5)


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
