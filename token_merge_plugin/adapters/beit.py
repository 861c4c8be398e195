"""Adapter for timm's beit.py: BEiT and BEiT-2."""

from typing import Any

import timm.models.beit as beit
from torch import Tensor

from token_merge_plugin.adapters.base import PatchedAttention, attend, project_qkv, register_adapter
from token_merge_plugin.adapters.eva import MergingEvaBlock
from token_merge_plugin.adapters.vit import VisionTransformerAdapter


class MergingBeitAttention(PatchedAttention):
    """BEiT's `Attention`: the bias of each pair of tokens is that of their representatives' positions."""

    parts = ("qkv", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "scale", "relative_position_bias_table", "_get_rel_pos_bias")

    def merged_forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        qkv = project_qkv(self, x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        position_bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            position_bias = self._get_rel_pos_bias()
            if shared_rel_pos_bias is not None:
                position_bias = position_bias + shared_rel_pos_bias
        out = attend(self, *qkv.unbind(0), position_bias=position_bias)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@register_adapter(beit.Beit)
class BeitAdapter(VisionTransformerAdapter):
    """Everything that timm builds from `Beit`."""

    family = "BEiT"
    timm_modules = ("beit",)
    example = "beit_base_patch16_224"
    compares_mean_keys = False
    known_blocks = {beit.Block: MergingEvaBlock}
    known_attention = {beit.Attention: MergingBeitAttention}

    def num_class_tokens(self, model: Any) -> int:
        return 1
