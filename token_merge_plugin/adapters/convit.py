"""Adapter for timm's convit.py: ConViT.

The first blocks see patches only, and mix attention by content with attention by position. The class token joins
behind them.
"""

from collections.abc import Callable
from typing import Any

import timm.models.convit as convit
import torch
import torch.nn.functional as F
from torch import Tensor

from token_merge_plugin.adapters.base import (
    Adapter,
    PatchedAttention,
    PatchedBlock,
    PatchedSelfAttention,
    register_adapter,
)
from token_merge_plugin.method.state import Evidence


class MergingGPSA(PatchedAttention):
    """ConViT's `GPSA`, gated positional self-attention (d'Ascoli et al. 2021).

    Positional attention does not depend on the image, so it is that of a token's representative to all patches, each
    of which has the value of the token that holds it. Attention by content is shared out among the patches of a token,
    so that the two can be mixed. That costs K N C instead of K^2 C multiply-adds, and is exact: positions of the
    tokens alone would not tell where the patches lie that they stand for. By position every patch counts once, with
    `proportional_attention` or without.
    """

    parts = ("qk", "v", "attn_drop", "proj", "pos_proj", "proj_drop")
    reads = ("num_heads", "scale", "gating_param", "rel_indices", "get_rel_indices")
    replaces = ("forward", "get_attention")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        plan, block = self._token_merge
        state = plan.current()
        query, key = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        value = self.v(x)
        gate = torch.sigmoid(self.gating_param)
        if block in plan.schedule:
            heads = value.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            state.evidence.append(Evidence(query, key, heads, self.scale, head_weight=1 - gate))
        gate = gate[:, None, None]
        content = self.attention_by_content(query, key)
        position = state.positions(self.positional_attention(state.num_patches))  # [1 or B, H, K, N]
        weight = self.attn_drop((1 - gate) * content + gate * position)
        by_patch = plan.on_patches(state, value).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, D]
        return self.proj_drop(self.proj((weight @ by_patch).transpose(1, 2).flatten(2)))

    def attention_by_content(self: Any, query: Tensor, key: Tensor) -> Tensor:
        """Return the attention of each token to each patch by what they look like: [B, H, K, N]."""
        plan = self._token_merge.plan
        state = plan.current()
        logits = (query * self.scale) @ key.transpose(-2, -1)
        log_size = plan.log_size(state)
        if log_size is not None:
            logits = logits + log_size[:, None, None, :].to(logits.dtype)
        weight = logits.softmax(dim=-1)
        if state.merged is None:
            return weight
        size, token_map = state.merged.size[:, None, None, :].to(weight.dtype), state.merged.token_map
        # Patches whose token was dropped get nothing.
        share = F.pad(weight / size, (0, 1))  # [B, H, K, K + 1]
        return share.gather(3, token_map[:, None, None, :].expand(*weight.shape[:3], -1))

    def positional_attention(self: Any, num_patches: int) -> Tensor:
        """Return the attention by position among all patches: [1, H, N, N]."""
        if self.rel_indices.shape[1] != num_patches:  # not made yet: timm makes them on the first call
            self.rel_indices = self.get_rel_indices(num_patches)
        return self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)


class MergingMHSA(PatchedSelfAttention):
    """ConViT's `MHSA`."""


class MergingConvitBlock(PatchedBlock):
    """ConViT's `Block`."""

    parts = ("norm1", "attn", "drop_path", "norm2", "mlp")
    reads = ("use_gpsa",)

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

    def num_prefix_tokens(self, model: Any) -> int:
        return getattr(model, "num_prefix_tokens", 1)

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return tuple(model.patch_embed.grid_size)
