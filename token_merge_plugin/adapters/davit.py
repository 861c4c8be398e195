"""Adapter for timm's davit.py: attention within windows, then between channels, and convolutions around both.

The convolutions need the full grid, and cost little. Tokens are merged for the attention, window by window or cell
by cell, and once more for the MLP.
"""

from typing import Any, ClassVar

import timm.models.davit as davit
from torch import Tensor, nn

from token_merge_plugin.adapters.base import GridAdapter, PatchedAttention, PatchedGridBlock, attend, register_adapter
from token_merge_plugin.method.merging import count_windows, pad_to_windows


class MergingDavitWindowAttention(PatchedAttention):
    """timm's `WindowAttention` of DaViT."""

    parts = ("qkv", "proj", "softmax")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(self, query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class MergingChannelAttention(PatchedAttention):
    """timm's `ChannelAttention`, whose products of channels are sums over the tokens."""

    parts = ("qkv", "proj")
    reads: ClassVar[tuple[str, ...]] = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        key = key * self.scale * self.weight(x)
        out = (key.transpose(2, 3) @ value).softmax(dim=-1) @ query.transpose(2, 3)  # [B, H, D, K]
        return self.proj(out.permute(0, 3, 1, 2).flatten(2))

    def weight(self: Any, x: Tensor) -> Tensor | float:
        """Return how often each token counts, broadcastable to [B, H, K, D]."""
        plan = self._token_merge.plan
        if not plan.config.proportional_attention:
            return 1.0
        return plan.current().merged.size[:, None, :, None].to(x.dtype)


class MergingChannelAttentionV2(MergingChannelAttention):
    """timm's `ChannelAttentionV2`."""

    reads = ("groups", "head_dim", "dynamic_scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.groups, -1)).permute(2, 0, 3, 1, 4)
        terms = self._token_merge.plan.current().num_patches if self.dynamic_scale else self.head_dim
        query = query * terms**-0.5 * self.weight(x)
        out = (query.transpose(2, 3) @ key).softmax(dim=-1) @ value.transpose(2, 3)  # [B, H, D, K]
        return self.proj(out.permute(0, 3, 1, 2).flatten(2))


class MergingChannelBlock(PatchedGridBlock):
    """timm's `ChannelBlock`."""

    parts = ("cpe1", "norm1", "attn", "drop_path1", "cpe2", "norm2", "mlp", "drop_path2")

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.attention(self.cpe1(x).permute(0, 2, 3, 1))  # [B, H, W, C]
        x = self.cpe2(x.permute(0, 3, 1, 2))
        if self.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        x = self.update_windows(x, x.shape[1:3], lambda x: self.drop_path2(self.mlp(self.norm2(x))), attends=False)
        return x.permute(0, 3, 1, 2)

    def attention(self: Any, x: Tensor) -> Tensor:
        """Return x [B, H, W, C] with the update of the attention."""
        return self.update_windows(x, x.shape[1:3], lambda x: self.drop_path1(self.attn(self.norm1(x))))


class MergingSpatialBlock(MergingChannelBlock):
    """timm's `SpatialBlock`."""

    reads = ("window_size",)

    def attention(self: Any, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x, real = pad_to_windows(x, *self.window_size)
        number = count_windows(x, *self.window_size)
        x = self.update_windows(x, self.window_size, lambda tokens: self.attend(tokens, number, real), real)
        return x[:, :height, :width]

    def attend(self: Any, x: Tensor, number: int, real: Tensor | None) -> Tensor:
        """Return what attention adds to the tokens of all windows, [W, K, C], of which each image has that number."""
        return self.per_image(self.drop_path1, self.attn(self.zero_padding(self.norm1(x), real)), number)


@register_adapter(davit.DaVit)
class DaVitAdapter(GridAdapter):
    """Everything that timm builds from `DaVit`; a window block and a channel block count as two."""

    family = "DaViT"
    timm_modules = ("davit",)
    example = "davit_tiny"
    least_channels = 192
    reduces = "tokens, in window attention, channel attention and MLP"
    restores = "behind each of them"
    known_blocks = {davit.SpatialBlock: MergingSpatialBlock, davit.ChannelBlock: MergingChannelBlock}
    known_attention = {
        davit.WindowAttention: MergingDavitWindowAttention,
        davit.ChannelAttention: MergingChannelAttention,
        davit.ChannelAttentionV2: MergingChannelAttentionV2,
    }

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.stages for pair in stage.blocks for block in pair]
