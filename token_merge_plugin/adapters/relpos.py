"""Adapter for timm's vision_transformer_relpos.py: ViT with relative position bias, from a table or an MLP."""

from typing import Any

import timm.models.vision_transformer_relpos as relpos
from torch import Tensor

from token_merge_plugin.adapters.base import PatchedAttention, attend, register_adapter, relative_bias
from token_merge_plugin.adapters.vit import MergingBlock, MergingResPostBlock, VisionTransformerAdapter


class MergingRelPosAttention(PatchedAttention):
    """timm's `RelPosAttention`: the bias of each pair of tokens is that of their representatives' positions."""

    parts = ("qkv", "q_norm", "k_norm", "rel_pos", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        state = self._token_merge.plan.current()
        position_bias = relative_bias(self, query, state.num_prefix_tokens + state.num_patches, shared_rel_pos)
        out = attend(self, query, key, value, position_bias=position_bias)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@register_adapter(relpos.VisionTransformerRelPos)
class VisionTransformerRelPosAdapter(VisionTransformerAdapter):
    """Everything that timm builds from `VisionTransformerRelPos`."""

    family = "ViT with relative position"
    timm_modules = ("vision_transformer_relpos",)
    example = "vit_relpos_small_patch16_224"
    compares_mean_keys = False
    known_blocks = {relpos.RelPosBlock: MergingBlock, relpos.ResPostRelPosBlock: MergingResPostBlock}
    known_attention = {relpos.RelPosAttention: MergingRelPosAttention}

    def num_class_tokens(self, model: Any) -> int:
        return model.num_prefix_tokens
