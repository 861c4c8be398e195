"""Adapter for timm's gcvit.py: windows, in every other block with queries that are the same in all of an image.

Tokens are merged window by window on entry to a block, and every token gets its update back behind it.
"""

from typing import Any

import timm.models.gcvit as gcvit
from torch import Tensor, nn

from token_merge_plugin.adapters.base import (
    GridAdapter,
    PatchedAttention,
    PatchedGridBlock,
    attend,
    register_adapter,
    relative_bias,
)
from token_merge_plugin.method.merging import count_windows, take


class MergingGlobalAttention(PatchedAttention):
    """timm's `WindowAttentionGlobal`: bias and global query of a token are those of its representative's position."""

    parts = ("rel_pos", "qkv", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "head_dim", "scale", "use_global")

    def merged_forward(self: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        # [2 or 3, W, H, K, D]
        projected = self.qkv(x).unflatten(2, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        key, value = projected[-2], projected[-1]
        if self.use_global and q_global is not None:
            query = q_global.flatten(1, 2).repeat_interleave(x.shape[0] // q_global.shape[0], dim=0)  # [W, T, C]
            state = self._token_merge.plan.current()
            state.check_positions(query.shape[1])
            query = take(query, state.merged.representative)
            query = query.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        else:
            query = projected[0]
        bias = relative_bias(self, query, self._token_merge.plan.current().num_patches)
        out = attend(self, query, key, value, position_bias=bias)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MergingGlobalContextBlock(PatchedGridBlock):
    """timm's `GlobalContextVitBlock`."""

    parts = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    reads = ("window_size",)
    replaces = ("forward", "_window_attn")

    def forward(self: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        number = count_windows(x, *self.window_size)
        return self.update_windows(x, self.window_size, lambda tokens: self.update(tokens, number, q_global))

    def update(self: Any, x: Tensor, number: int, q_global: Tensor | None) -> Tensor:
        """Return what attention and MLP add to the tokens of all windows, [W, K, C], of which each image has number."""
        attended = self.per_image(self.drop_path1, self.ls1(self.attn(self.norm1(x), q_global)), number)
        return attended + self.per_image(self.drop_path2, self.ls2(self.mlp(self.norm2(x + attended))), number)


@register_adapter(gcvit.GlobalContextVit)
class GlobalContextVitAdapter(GridAdapter):
    """Everything that timm builds from `GlobalContextVit`."""

    family = "GCViT"
    timm_modules = ("gcvit",)
    example = "gcvit_tiny"
    least_channels = 192
    known_blocks = {gcvit.GlobalContextVitBlock: MergingGlobalContextBlock}
    known_attention = {gcvit.WindowAttentionGlobal: MergingGlobalAttention}

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.stages for block in stage.blocks]
