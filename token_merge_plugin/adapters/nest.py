"""Adapter for timm's nest.py: attention within the blocks of the image, and convolutions between levels.

What NesT calls a block of the image is a window here. Tokens are merged window by window on entry to a layer, and
every token gets its update back behind it.
"""

import math
from typing import Any

import timm.models.nest as nest
from torch import Tensor, nn

from token_merge_plugin.adapters.base import GridAdapter, PatchedAttention, PatchedGridBlock, attend, register_adapter


class MergingNestAttention(PatchedAttention):
    """timm's `Attention` of NesT."""

    parts = ("qkv", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(0, 1).unflatten(2, (3, self.num_heads, -1))  # [B * windows, K, 3, H, D]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = attend(self, query, key, value, drop=lambda weight: self.drop(weight, x.shape[:2]))
        out = out.permute(0, 2, 3, 1).flatten(2)  # unlike elsewhere, the heads lie side by side in each channel
        return self.proj_drop(self.proj(out.reshape(x.shape)))

    def drop(self: Any, weight: Tensor, windows: tuple[int, int]) -> Tensor:
        """Drop of an attention matrix [B * windows, H, K, K], which timm has as [B, H, windows, K, K]."""
        return self.attn_drop(weight.reshape(*windows, *weight.shape[1:]).transpose(1, 2)).transpose(1, 2).flatten(0, 1)


class MergingTransformerLayer(PatchedGridBlock):
    """timm's `TransformerLayer` of NesT."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def forward(self: Any, x: Tensor) -> Tensor:
        batch, windows, patches, _ = x.shape
        side = math.isqrt(patches)
        x = self.update_fewer(
            x.flatten(0, 1),
            (side, side),
            lambda tokens: self.update(tokens.reshape(batch, windows, *tokens.shape[1:])).flatten(0, 1),
        )
        return x.reshape(batch, windows, *x.shape[1:])

    def update(self: Any, x: Tensor) -> Tensor:
        """Return what attention and MLP add to the tokens of all windows, [B, windows, K, C]."""
        attended = self.drop_path1(self.attn(self.norm1(x)))
        return attended + self.drop_path2(self.mlp(self.norm2(x + attended)))


@register_adapter(nest.Nest)
class NestAdapter(GridAdapter):
    """Everything that timm builds from `Nest`."""

    family = "NesT"
    timm_modules = ("nest",)
    example = "nest_tiny"
    reduces = "tokens of each block of the image, in attention and MLP"
    restores = "behind each layer"
    known_blocks = {nest.TransformerLayer: MergingTransformerLayer}
    known_attention = {nest.Attention: MergingNestAttention}

    def blocks(self, model: Any) -> list[nn.Module]:
        return [layer for level in model.levels for layer in level.transformer_encoder]
