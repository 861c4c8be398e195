"""Adapter for timm's twins.py: attention in windows, attention to a subsampled grid, and position convolutions.

Tokens are merged on entry to a block, and every token gets its update back behind it, since convolutions follow.
"""

from collections.abc import Iterator
from typing import Any

import timm.models.twins as twins
from torch import Tensor, nn

from token_merge_plugin.adapters.base import (
    GridAdapter,
    Patched,
    PatchedAttention,
    PatchedGridBlock,
    attend,
    attend_by_parts,
    known_mixin,
    register_adapter,
)


class MergingLocalAttention(PatchedAttention):
    """timm's `LocallyGroupedAttn`, on windows that are cut already."""

    parts = ("qkv", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "scale", "ws")

    def merged_forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        number = (size[0] // self.ws) * (size[1] // self.ws)

        def drop(weight: Tensor) -> Tensor:  # timm has [B, windows, H, T, T]
            return self.attn_drop(weight.unflatten(0, (-1, number))).flatten(0, 1)

        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(self, query, key, value, drop=drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MergingGlobalAttention(PatchedAttention):
    """timm's `GlobalSubSampleAttn`: merged tokens attend to the subsampled grid, which stays as it is."""

    parts = ("q", "kv", "attn_drop", "proj", "proj_drop", "sr", "norm")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor, size: tuple[int, int], *, grid: Tensor) -> Tensor:
        if self.sr is not None:
            grid = self.norm(self.sr(grid.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))
        query = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.kv(grid).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend_by_parts(self, query, key, value, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MergingLocalBlock(PatchedGridBlock):
    """Twins' `Block` with attention in windows."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        (height, width), side = size, self.attn.ws
        if height % side or width % side:
            # Padded windows have fewer tokens to merge than places: attention is left as it is, the MLP needs no
            # windows.
            x = x + self.drop_path1(self.attn(self.norm1(x), size))
            return self.update_fewer(
                x, size, lambda tokens: self.drop_path2(self.mlp(self.norm2(tokens))), attends=False
            )
        x = x.unflatten(1, size)
        return self.update_windows(x, (side, side), lambda tokens: self.update(tokens, size)).flatten(1, 2)

    def update(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what attention and MLP add to the tokens of all windows of grids of that size, [W, K, C]."""
        number = (size[0] // self.attn.ws) * (size[1] // self.attn.ws)
        attended = self.per_image(self.drop_path1, self.attn(self.norm1(x), size), number)
        return attended + self.per_image(self.drop_path2, self.mlp(self.norm2(x + attended)), number)


class MergingGlobalBlock(PatchedGridBlock):
    """Twins' `Block` with attention to a subsampled grid."""

    parts = MergingLocalBlock.parts

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.update_fewer(x, size, lambda tokens: self.update(tokens, x, size))

    def update(self: Any, x: Tensor, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what attention and MLP add to merged tokens of the grid, [B, K, C]."""
        attended = self.drop_path1(self.attn(self.norm1(x), size, grid=self.norm1(grid)))
        return attended + self.drop_path2(self.mlp(self.norm2(x + attended)))


@register_adapter(twins.Twins)
class TwinsAdapter(GridAdapter):
    """Twins-PCPVT and Twins-SVT."""

    family = "Twins"
    timm_modules = ("twins",)
    example = "twins_svt_small"
    least_channels = 192
    reduces = "tokens of each window, or of each cell of the grid as queries, in attention and MLP"
    known_attention = {
        twins.LocallyGroupedAttn: MergingLocalAttention,
        twins.GlobalSubSampleAttn: MergingGlobalAttention,
    }

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for blocks in model.blocks for block in blocks]

    def mixins(self, block: Any) -> Iterator[tuple[nn.Module, type[Patched]]]:
        local = isinstance(block.attn, twins.LocallyGroupedAttn)
        yield block, known_mixin(block, {twins.Block: MergingLocalBlock if local else MergingGlobalBlock})
        yield block.attn, known_mixin(block.attn, self.known_attention)
