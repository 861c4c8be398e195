"""Adapter for timm's pit.py: pooling-based vision transformers, three ViTs in a row with a convolution between them."""

from typing import Any

import timm.models.pit as pit
import timm.models.vision_transformer as vit
from torch import Tensor, nn

from token_merge_plugin.adapters.base import Adapter, register_adapter
from token_merge_plugin.adapters.vit import MergingAttention, MergingBlock


class MergingPitBlock(MergingBlock):
    """timm's `Block` in PiT, whose patch grid shrinks from section to section."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan, block = self._token_merge
        edge = plan.edge()
        if edge is not None and block in plan.spans and block == plan.spans[block].start:
            edge.grid_size = _pooled(plan.grid_size, x.shape[1] - plan.num_prefix_tokens)
        return super().forward(x, *args, **kwargs)


def _pooled(grid_size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Return (height, width) of the pooled grid with that many patches."""
    height, width = grid_size
    while height * width > patches:
        height, width = (height + 1) // 2, (width + 1) // 2  # kernel size 3, stride 2, padding 1
    return height, width


@register_adapter(pit.PoolingVisionTransformer)
class PitAdapter(Adapter):
    """Everything that timm builds from `PoolingVisionTransformer`."""

    family = "PiT"
    timm_modules = ("pit",)
    example = "pit_s_224"
    restores = "in front of each pooling, and behind the last block"
    known_blocks = {vit.Block: MergingPitBlock}
    known_attention = {vit.Attention: MergingAttention}

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for transformer in model.transformers for block in transformer.blocks]

    def sections(self, model: Any) -> list[range]:
        sections: list[range] = []
        for transformer in model.transformers:
            start = sections[-1].stop if sections else 0
            sections.append(range(start, start + len(transformer.blocks)))
        return sections

    def default_stages(self, model: Any) -> tuple[int, ...]:
        # In the last block of a section only the MLP would be left to gain, less than it costs to compare the many
        # tokens of the first.
        last = [section.stop - 1 for section in self.sections(model)]
        return tuple(block for block in super().default_stages(model) if block not in last)

    def num_prefix_tokens(self, model: Any) -> int:
        return model.num_tokens

    def num_class_tokens(self, model: Any) -> int:
        return model.num_tokens

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return model.patch_embed.grid_size
