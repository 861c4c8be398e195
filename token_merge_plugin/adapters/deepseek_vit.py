"""Adapter for timm's deepseek_vit.py: the vision encoder of DeepSeek-V4, on its own or in timm's classifier."""

import timm.models.deepseek_vit as deepseek
from timm.layers import AttentionRope

from token_merge_plugin.adapters.base import Adapter, register_adapter
from token_merge_plugin.adapters.eva import MergingAttentionRope
from token_merge_plugin.adapters.vit import MergingPreNormBlock, MergingVisionTransformer


@register_adapter(deepseek.DeepseekVitEncoder)
class DeepseekVitAdapter(Adapter):
    """Everything that timm builds around `DeepseekVitEncoder`."""

    family = "DeepSeek ViT"
    timm_modules = ("deepseek_vit",)
    example = "deepseek_vit_412m"
    restores = "behind the last block, before the aligner"
    model_mixin = MergingVisionTransformer
    known_blocks = {deepseek.DeepseekVitBlock: MergingPreNormBlock}
    known_attention = {AttentionRope: MergingAttentionRope}
