"""Adapter for timm's hiera.py: attention within mask units, then over all tokens, and pooling between the stages.

Where attention is over all tokens, they may stay fewer up to the end of the stage. Pooling needs all of them. The
model keeps tokens in an order of its own, unrolled by mask units, which merging neither knows nor changes; if whole
mask units are left out, what is there is merged.
"""

from typing import Any

import timm.models.hiera as hiera
from torch import Tensor

from token_merge_plugin.adapters.base import Adapter, PatchedAttention, attend, register_adapter
from token_merge_plugin.adapters.vit import MergingBlock
from token_merge_plugin.errors import UnsupportedModelError


class MergingMaskUnitAttention(PatchedAttention):
    """timm's `MaskUnitAttention`, where it is over all tokens and does not pool."""

    parts = ("qkv", "proj")
    reads = ("heads", "scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(self, query, key, value).transpose(1, 2).flatten(2))


class MergingHieraBlock(MergingBlock):
    """timm's `HieraBlock`, where it does not pool."""

    parts = (*MergingBlock.parts, "proj")
    may_lack = ("proj",)


@register_adapter(hiera.Hiera)
class HieraAdapter(Adapter):
    """Everything that timm builds from `Hiera`."""

    family = "Hiera"
    timm_modules = ("hiera",)
    example = "hiera_tiny_224"
    reduces = "tokens of the stages with global attention"
    restores = "before each pooling and behind the last block"
    in_rows = False
    known_blocks = {hiera.HieraBlock: MergingHieraBlock}
    known_attention = {hiera.MaskUnitAttention: MergingMaskUnitAttention}

    def sections(self, model: Any) -> list[range]:
        """Return the blocks of each stage with attention over all tokens, without the one that pools or widens.

        Raises:
            UnsupportedModelError: there is none.
        """
        blocks: list[Any] = self.blocks(model)
        sections = []
        start = 0
        for index, block in enumerate(blocks):
            if block.do_expand or block.attn.q_stride > 1 or block.attn.use_mask_unit_attn:
                start = index + 1
            if start <= index and (index in model.stage_ends or index == len(blocks) - 1):
                sections.append(range(start, index + 1))
                start = index + 1
        if not sections:
            raise UnsupportedModelError(
                f"Every block of this {type(model).__name__} pools, or attends within mask units, so there is none "
                "through which tokens could stay fewer. Give a model with global attention, such as timm's own."
            )
        return sections

    def default_stages(self, model: Any) -> tuple[int, ...]:
        """Return the blocks at 0, 1/3 and 2/3 of the longest section, well within the network already."""
        section = max(self.sections(model), key=len)
        return tuple(sorted({section[len(section) * third // 3] for third in range(3)}))

    def num_prefix_tokens(self, model: Any) -> int:
        return 0
