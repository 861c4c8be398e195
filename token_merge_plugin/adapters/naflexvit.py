"""Adapter for timm's naflexvit.py: ViTs for batches of images of mixed sizes, padded to one length."""

from typing import Any

import timm.models.naflexvit as naflexvit
from torch import Tensor

from token_merge_plugin.adapters.base import PatchedModel, register_adapter
from token_merge_plugin.adapters.eva import EvaAdapter
from token_merge_plugin.adapters.vit import VisionTransformerAdapter


class MergingNaFlexVit(PatchedModel):
    """timm's `NaFlexVit`."""

    reads = ("embeds", "_forward_embeds")

    @property
    def use_key_only_attn_mask(self) -> bool:
        # Hiding padding from all queries, [B, 1, 1, P + N], is enough: what padding itself attends to is never read.
        # The mask for all pairs would have to be reduced to the tokens at each block.
        return True

    def _forward_embeds(self: Any, x: Tensor, patch_coord: Tensor | None, *args: Any, **kwargs: Any) -> dict:
        edge = self._token_merge.plan.edge()
        if edge is not None and patch_coord is None:  # images of one size, [B, C, H, W]
            edge.grid_size = self.embeds.dynamic_feat_size(x.shape[-2:])
        return super()._forward_embeds(x, patch_coord, *args, **kwargs)  # type: ignore[misc]


@register_adapter(naflexvit.NaFlexVit)
class NaFlexVitAdapter(VisionTransformerAdapter):
    """Everything that timm builds from `NaFlexVit`, of the blocks of vision_transformer.py or of eva.py."""

    family = "NaFlexViT"
    timm_modules = ("naflexvit",)
    example = "naflexvit_base_patch16_gap"
    model_mixin = MergingNaFlexVit
    known_blocks = {**VisionTransformerAdapter.known_blocks, **EvaAdapter.known_blocks}
    known_attention = {**VisionTransformerAdapter.known_attention, **EvaAdapter.known_attention}

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return None
