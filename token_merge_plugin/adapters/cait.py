"""Adapter for timm's cait.py: CaiT.

Its talking-heads blocks see patches only. Behind them, class-attention blocks let a class token read the patches,
which they leave as they are: over the restored grid, a patch counts as often there as proportional attention would
have it, so these blocks run unpatched.
"""

from collections.abc import Callable
from typing import Any

import timm.models.cait as cait
import torch.nn.functional as F
from torch import Tensor

from token_merge_plugin.adapters.base import Adapter, PatchedAttention, PatchedBlock, register_adapter
from token_merge_plugin.method.state import Evidence


class MergingTalkingHeadAttn(PatchedAttention):
    """CaiT's `TalkingHeadAttn`: heads mix their logits, and their attention (Shazeer et al. 2020).

    Sizes count behind the first mixture, right before the softmax. The second one has a bias, a weight that every
    patch gets whatever it looks like: so it mixes the attention that each of a token's patches gets.
    """

    parts = ("qkv", "attn_drop", "proj", "proj_l", "proj_w", "proj_drop")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        plan, block = self._token_merge
        state = plan.current()
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        logits = mix_heads(self.proj_l, (query * self.scale) @ key.transpose(-2, -1))
        if block in plan.schedule:
            state.evidence.append(Evidence(query, key, value, self.scale, logits=logits))
        log_size = plan.log_size(state)
        if log_size is None:
            weight = mix_heads(self.proj_w, logits.softmax(dim=-1))
        else:
            logits = logits + log_size[:, None, None, :].to(logits.dtype)
            size = F.pad(state.merged.size, (state.num_prefix_tokens, 0), value=1)[:, None, None, :].to(logits.dtype)
            weight = mix_heads(self.proj_w, logits.softmax(dim=-1) / size) * size
        out = self.attn_drop(weight) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def mix_heads(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a linear layer over the heads: [B, H, T, T] -> [B, H, T, T]."""
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MergingLayerScaleBlock(PatchedBlock):
    """CaiT's `LayerScaleBlock`."""

    parts = ("norm1", "attn", "drop_path", "norm2", "mlp")
    reads = ("gamma_1", "gamma_2")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        x = reduce(x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x))))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


@register_adapter(cait.Cait)
class CaitAdapter(Adapter):
    """Everything that timm builds from `Cait`. Stages count the talking-heads blocks."""

    family = "CaiT"
    timm_modules = ("cait",)
    example = "cait_s24_224"
    restores = "behind the last talking-heads block, before class attention"
    known_blocks = {cait.LayerScaleBlock: MergingLayerScaleBlock}
    known_attention = {cait.TalkingHeadAttn: MergingTalkingHeadAttn}

    def num_prefix_tokens(self, model: Any) -> int:
        return 0  # the class token joins behind these blocks

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return tuple(model.patch_embed.grid_size)
