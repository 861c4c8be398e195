"""Where the patches of an image went, stage by stage."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from token_merge_plugin.adapters import find_adapter
from token_merge_plugin.adapters.base import Patched, PatchedGridBlock
from token_merge_plugin.errors import UnsupportedModelError
from token_merge_plugin.method.state import Pass, recorded
from token_merge_plugin.trial.measuring import evaluating


@dataclass(frozen=True, eq=False)
class TracedStage:
    """One stage of one image's way through a patched model.

    Attributes:
        block: index of the block.
        grid_size: (height, width) of the patch grid, of N patches.
        token_map: [N], for each patch the index of the token that holds it, in [0, K); -1 if it was dropped.
        representative: [K], for each token the patch that it stood for at the start.
    """

    block: int
    grid_size: tuple[int, int]
    token_map: Tensor
    representative: Tensor


@torch.inference_mode()
def trace(model: nn.Module, image: Tensor) -> list[TracedStage]:
    """Run one image through a patched model, and return what each stage did to its tokens.

    Args:
        model: patched by `apply`.
        image: [1, C, H, W].

    Raises:
        UnsupportedModelError: the model is not patched, or its blocks keep every token and merge within themselves
            (such as Swin's), or the order of its tokens does not tell where they are (Hiera).
    """
    parts = [module for module in model.modules() if isinstance(module, Patched)]
    if not parts:
        raise UnsupportedModelError("The model is not patched, so no stage reduces its tokens. Call apply first.")
    name = getattr(type(model), "_token_merge_parts", (None, type(model)))[1].__name__  # the one before it was patched
    if any(isinstance(module, PatchedGridBlock) for module in parts):
        raise UnsupportedModelError(
            f"The blocks of {name} merge tokens inside and give back the whole grid, so there is no "
            "set of tokens that stays. Token maps exist for families whose tokens leave the sequence."
        )
    adapters = [adapter for module in parts if (adapter := find_adapter(module)) is not None]
    if not all(adapter.in_rows for adapter in adapters):
        raise UnsupportedModelError(f"{name} does not keep its tokens in the order of the image's rows.")
    with evaluating(model), recorded() as stages:
        model(image)
    return [_traced(block, state, image) for block, state in stages]


def _traced(block: int, state: Pass, image: Tensor) -> TracedStage:
    merged = state.merged
    assert merged is not None
    token_map, representative = merged.token_map[0].cpu(), merged.representative[0].cpu()
    token_map = token_map.where(token_map < len(representative), -1)
    return TracedStage(block, _grid_size(state, image), token_map, representative)


def _grid_size(state: Pass, image: Tensor) -> tuple[int, int]:
    """Return the grid of the pass; where it is not known, the one with the image's aspect ratio."""
    patches, grid = state.num_patches, state.grid_size
    if grid is None or grid[0] * grid[1] != patches:
        height = max(1, round((patches * image.shape[-2] / image.shape[-1]) ** 0.5))
        grid = (height, patches // height)
        if grid[0] * grid[1] != patches:
            raise UnsupportedModelError(
                f"The {patches} tokens of this model are no grid with the image's aspect ratio."
            )
    return grid
