"""Adapter for timm's crossvit.py: two branches of ViT blocks, whose class tokens look at each other's patches.

In each multi-scale block, tokens stay fewer through the blocks of the branch with the large patches. The branch with
the small ones has a single block there: comparing its many tokens would cost what is saved.
"""

from typing import Any

import timm.models.crossvit as crossvit
import timm.models.vision_transformer as vit
from torch import nn

from token_merge_plugin.adapters.base import Adapter, PatchedModel, register_adapter
from token_merge_plugin.adapters.vit import MergingAttention, MergingBlock


class MergingCrossVit(PatchedModel):
    """timm's `CrossVit`."""

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Not to be noted in the plan: multi-scale blocks go as a whole, and so do the sections in them.
        return super(PatchedModel, self).prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]


@register_adapter(crossvit.CrossVit)
class CrossVitAdapter(Adapter):
    """Everything that timm builds from `CrossVit`; blocks are counted branch by branch within a multi-scale block."""

    family = "CrossViT"
    timm_modules = ("crossvit",)
    example = "crossvit_small_240"
    reduces = "image tokens of a branch, within each multi-scale block"
    restores = "before the branches meet"
    in_rows = False  # each branch has its own grid
    model_mixin = MergingCrossVit
    known_blocks = {vit.Block: MergingBlock}
    known_attention = {vit.Attention: MergingAttention}

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for multi_scale in model.blocks for branch in multi_scale.blocks for block in branch]

    def sections(self, model: Any) -> list[range]:
        sections, start = [], 0
        for multi_scale in model.blocks:
            for branch in multi_scale.blocks:
                sections.append(range(start, start + len(branch)))
                start += len(branch)
        return sections

    def default_stages(self, model: Any) -> tuple[int, ...]:
        sections = [section for section in self.sections(model) if len(section) > 1]
        return tuple(block for section in sections for block in (section[0], section[len(section) // 2]))

    def num_prefix_tokens(self, model: Any) -> int:
        return 1

    def num_class_tokens(self, model: Any) -> int:
        return 1
