"""Adapter for timm's volo.py: outlookers on a fine grid, then transformer blocks on a coarse one, then class attention.

Outlookers mix each token with its neighbours, and keep the grid. The transformer blocks are one section, behind which
the grid is restored for class attention and the auxiliary head.
"""

from itertools import chain, takewhile
from typing import Any

import timm.models.volo as volo
from torch import Tensor, nn

from token_merge_plugin.adapters.base import (
    Adapter,
    PatchedBlock,
    PatchedModel,
    PatchedSelfAttention,
    register_adapter,
    unwrapped,
)
from token_merge_plugin.adapters.vit import MergingPreNormBlock
from token_merge_plugin.errors import UnsupportedModelError


class MergingVoloAttention(PatchedSelfAttention):
    """VOLO's `Attention`, on tokens out of the grid: [B, K, C]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        # Its own forward takes the grid alone, even where nothing is merged yet.
        return self.merged_forward(x) if x.dim() == 3 else super().forward(x)


class MergingVoloBlock(MergingPreNormBlock):
    """VOLO's `Transformer`: takes and returns the grid [B, H, W, C], and between the blocks of a pass [B, K, C]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        plan, block = self._token_merge
        span = plan.spans.get(block)
        if span is None or (block != span.start and plan.current() is None):
            return super().forward(x)
        x = super().forward(x.flatten(1, -2))
        height, width = plan.grid_size
        return x.unflatten(1, (height, width)) if x.shape[1] == height * width else x


class GridOutlooker(PatchedBlock):
    """VOLO's `Outlooker`, which keeps the grid: patched only to be recomputed where the model asks for that."""

    parts = MergingVoloBlock.parts


class MergingVolo(PatchedModel):
    """timm's `VOLO`."""

    def forward_train(self, *args: Any, **kwargs: Any) -> Any:
        # A forward of its own, for token labeling: nothing else is around the blocks.
        return self._call(super().forward_train, False, args, kwargs)  # type: ignore[misc]


@register_adapter(volo.VOLO)
class VoloAdapter(Adapter):
    """Everything that timm builds from `VOLO`."""

    family = "VOLO"
    timm_modules = ("volo",)
    example = "volo_d1_224"
    reduces = "tokens in the transformer blocks, from stage to stage"
    restores = "behind the last transformer block"
    model_mixin = MergingVolo
    known_blocks = {volo.Transformer: MergingVoloBlock, volo.Outlooker: GridOutlooker}
    known_attention = {volo.Attention: MergingVoloAttention}

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for blocks in _runs(model.network) for block in blocks]

    def sections(self, model: Any) -> list[range]:
        # timm adds the position embedding, whose grid is known, in front of the third module.
        start = sum(len(blocks) for blocks in _runs(model.network[:2]))
        runs = takewhile(lambda module: isinstance(module, nn.Sequential), model.network[2:])
        behind = takewhile(lambda block: isinstance(unwrapped(block), volo.Transformer), chain.from_iterable(runs))
        count = len(list(behind))
        if not count:
            raise UnsupportedModelError(
                f"This {type(model).__name__} has no transformer block behind its outlookers, which need the grid. "
                "Apply token merging before its layers are pruned."
            )
        return [range(start, start + count)]

    def num_prefix_tokens(self, model: Any) -> int:
        return 0  # the class token joins behind the section

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        # Without its transformer blocks, the model has no positions either.
        return None if model.pos_embed is None else tuple(model.pos_embed.shape[1:3])

    def layers(self, block: Any) -> list[Any]:
        return [] if isinstance(block, volo.Outlooker) else [block.attn]


def _runs(network: nn.ModuleList) -> list[nn.Sequential]:
    """Return the runs of blocks, without the downsampling between them."""
    return [module for module in network if isinstance(module, nn.Sequential)]
