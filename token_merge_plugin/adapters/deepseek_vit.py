"""Adapter for timm's deepseek_vit.py: the vision encoder of DeepSeek-V4, on its own or in timm's classifier."""

from collections.abc import Callable
from typing import Any

import timm.models.deepseek_vit as deepseek
from timm.layers import AttentionRope
from torch import Tensor

from token_merge_plugin.adapters.base import Adapter, PatchedBlock, register_adapter
from token_merge_plugin.adapters.eva import MergingAttentionRope
from token_merge_plugin.adapters.vit import MergingVisionTransformer


class MergingDeepseekVitBlock(PatchedBlock):
    """timm's `DeepseekVitBlock`."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = reduce(x + self.drop_path1(self.attn(self.norm1(x), *args, **kwargs)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_adapter(deepseek.DeepseekVitEncoder)
class DeepseekVitAdapter(Adapter):
    """Everything that timm builds around `DeepseekVitEncoder`."""

    family = "DeepSeek ViT"
    timm_modules = ("deepseek_vit",)
    example = "deepseek_vit_412m"
    restores = "behind the last block, before the aligner"
    model_mixin = MergingVisionTransformer
    known_blocks = {deepseek.DeepseekVitBlock: MergingDeepseekVitBlock}
    known_attention = {AttentionRope: MergingAttentionRope}
