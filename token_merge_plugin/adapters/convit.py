"""Adapter for timm's convit.py: ConViT.

The first blocks see patches only, and mix attention by content with attention by position. The class token joins
behind them.
"""

from collections.abc import Callable
from typing import Any

import timm.models.convit as convit
import torch
from torch import Tensor

from token_merge_plugin.adapters.base import (
    Adapter,
    PatchedAttention,
    PatchedBlock,
    PatchedSelfAttention,
    attend,
    register_adapter,
)


class MergingGPSA(PatchedAttention):
    """ConViT's `GPSA`, gated positional self-attention (d'Ascoli et al. 2021).

    Positional attention does not depend on the image, so it is that of a token's representative to all patches, each
    of which has the value of the token that holds it. That costs K N C instead of K^2 C multiply-adds, and is exact:
    positions of the tokens alone would not tell where the patches lie that they stand for. It counts every patch
    once, with `proportional_attention` or without.
    """

    parts = ("qk", "v", "attn_drop", "proj", "pos_proj", "proj_drop")
    fused_attn = True  # timm builds the matrix to mix the two; mixing what they return is the same

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        plan = self._token_merge.plan
        state = plan.current()
        query, key = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        value = self.v(x)
        by_patch = plan.restore(state, value)  # [B, N, C]
        value, by_patch = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (value, by_patch))
        gate = torch.sigmoid(self.gating_param)
        content = attend(self, query, key, value, dropout=self.attn_drop.p, head_weight=1 - gate)
        position = self.attn_drop(state.positions(self.positional_attention(state.num_patches))) @ by_patch
        gate = gate[:, None, None]
        out = (1 - gate) * content + gate * position
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def positional_attention(self: Any, num_patches: int) -> Tensor:
        """Return the attention by position among all patches: [H, N, N]."""
        if self.rel_indices.shape[1] != num_patches:  # not made yet: timm makes them on the first call
            self.rel_indices = self.get_rel_indices(num_patches)
        return self.pos_proj(self.rel_indices[0]).permute(2, 0, 1).softmax(dim=-1)


class MergingMHSA(PatchedSelfAttention):
    """ConViT's `MHSA`. It is not fused; on merged tokens it is."""

    fused_attn = True


class MergingConvitBlock(PatchedBlock):
    """ConViT's `Block`."""

    parts = ("norm1", "attn", "drop_path", "norm2", "mlp")

    def num_prefix_tokens(self: Any) -> int:
        return 0 if self.use_gpsa else 1

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        x = reduce(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_adapter(convit.ConVit)
class ConvitAdapter(Adapter):
    """Everything that timm builds from `ConVit`. No class token's attention is there yet where stages usually are."""

    family = "ConViT"
    timm_modules = ("convit",)
    example = "convit_small"
    known_blocks = {convit.Block: MergingConvitBlock}
    known_attention = {convit.GPSA: MergingGPSA, convit.MHSA: MergingMHSA}

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return tuple(model.patch_embed.grid_size)
