"""Adapter for timm's qwen3_vit.py: the vision encoder of Qwen3-VL and its successors, on its own or in a classifier."""

import timm.models.qwen3_vit as qwen3
from timm.layers import AttentionRope
from timm.models.eva import EvaBlock

from token_merge_plugin.adapters.base import Adapter, register_adapter
from token_merge_plugin.adapters.eva import MergingAttentionRope, MergingEvaBlock
from token_merge_plugin.adapters.vit import MergingVisionTransformer


@register_adapter(qwen3.Qwen3VitEncoder)
class Qwen3VitAdapter(Adapter):
    """Everything that timm builds around `Qwen3VitEncoder`."""

    family = "Qwen3 ViT"
    timm_modules = ("qwen3_vit",)
    example = "qwen3_vit_88m"
    restores = "behind the last block, before the patch merger"
    model_mixin = MergingVisionTransformer
    known_blocks = {EvaBlock: MergingEvaBlock}
    known_attention = {AttentionRope: MergingAttentionRope}
