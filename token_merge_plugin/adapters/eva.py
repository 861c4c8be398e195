"""Adapter for timm's eva.py: EVA, EVA-02, RoPE ViTs, DINOv3, Perception Encoder, Sapiens."""

from collections.abc import Callable
from typing import Any

import timm.layers
import timm.models.eva as eva
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from token_merge_plugin.adapters.base import (
    PatchedAttention,
    PatchedBlock,
    attend,
    classes,
    project_qkv,
    register_adapter,
)
from token_merge_plugin.adapters.vit import MergingResPostBlock, VisionTransformerAdapter


class MergingAttentionRope(PatchedAttention):
    """timm's `AttentionRope` and `EvaAttention`: each token is rotated by the position of its representative."""

    parts = ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
    reads = ("num_heads", "num_prefix_tokens", "scale")
    may_lack = ("q_norm", "k_norm", "gate")

    def merged_forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        projected = self.project(x)
        head_dim = projected[0].shape[2] // self.num_heads
        query, key, value = (y.unflatten(2, (-1, head_dim)).transpose(1, 2) for y in projected)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            plan = self._token_merge.plan
            rope = plan.current().positions(rope)
            prefix = self.num_prefix_tokens
            options = {"half": True} if getattr(self, "rotate_half", False) else {}
            query, key = (
                torch.cat((y[:, :, :prefix], apply_rot_embed_cat(y[:, :, prefix:], rope, **options)), dim=2).type_as(
                    value
                )
                for y in (query, key)
            )
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # grouped queries
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = attend(self, query, key, value, attn_mask, is_causal)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def project(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Return query, key and value, with all heads side by side: [B, T, H * D]."""
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return project_qkv(self, x).chunk(3, dim=2)


class MergingEvaBlock(PatchedBlock):
    """timm's `EvaBlock`, and BEiT's `Block`."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
    reads = ("gamma_1", "gamma_2")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        update = self.attn(self.norm1(x), *args, **kwargs)
        x = reduce(x + self.drop_path1(update if self.gamma_1 is None else self.gamma_1 * update))
        update = self.mlp(self.norm2(x))
        return x + self.drop_path2(update if self.gamma_2 is None else self.gamma_2 * update)


class MergingEvaBlockPostNorm(MergingResPostBlock):
    """timm's `EvaBlockPostNorm`."""


@register_adapter(eva.Eva)
class EvaAdapter(VisionTransformerAdapter):
    """Everything that timm builds from `Eva`."""

    family = "EVA and DINOv3"
    timm_modules = ("eva",)
    example = "vit_small_patch16_dinov3"
    compares_mean_keys = False
    known_blocks = {eva.EvaBlock: MergingEvaBlock, eva.EvaBlockPostNorm: MergingEvaBlockPostNorm}
    known_attention = {eva.EvaAttention: MergingAttentionRope} | classes(
        timm.layers, AttentionRope=MergingAttentionRope
    )

    def num_class_tokens(self, model: Any) -> int:
        return int(model.cls_token is not None)
