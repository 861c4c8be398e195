"""Adapter for timm's Swin Transformers: windows that shift from block to block, and patch merging between stages.

Tokens are merged window by window on entry to a block, and every token gets its update back behind it.
"""

import math
from typing import Any, ClassVar

import timm.models.swin_transformer as swin
import timm.models.swin_transformer_v2 as swin_v2
import timm.models.swin_transformer_v2_cr as swin_v2_cr
import torch.nn.functional as F
from torch import Tensor, nn

from token_merge_plugin.adapters.base import (
    GridAdapter,
    PatchedAttention,
    PatchedGridBlock,
    attend,
    project_qkv,
    register_adapter,
)
from token_merge_plugin.method.merging import count_windows, pad_to_windows


class MergingWindowAttention(PatchedAttention):
    """timm's `WindowAttention` of Swin: bias and shift mask of a pair are those of the representatives' positions."""

    parts: ClassVar[tuple[str, ...]] = ("qkv", "attn_drop", "proj", "proj_drop", "softmax")
    reads: ClassVar[tuple[str, ...]] = ("num_heads", "scale", "_get_rel_pos_bias")

    def merged_forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.position_bias()
        if mask is not None:
            bias = bias + mask[:, None]  # [windows, H, T, T]
        query, key, scale = self.scaled(query, key)
        out = attend(self, query, key, value, position_bias=bias, scale=scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def project(self: Any, x: Tensor) -> Tensor:
        """Return query, key and value side by side: [W, T, 3 * C]."""
        return self.qkv(x)

    def position_bias(self: Any) -> Tensor:
        """Return the bias of each pair of positions, [1, H, T, T]."""
        return self._get_rel_pos_bias()

    def scaled(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return query and key as they are to be multiplied, and the factor of their products."""
        return query, key, self.scale


class MergingCosineAttention(MergingWindowAttention):
    """timm's `WindowAttention` of Swin V2."""

    parts = (*MergingWindowAttention.parts, "cpb_mlp")
    reads: ClassVar[tuple[str, ...]] = ("num_heads", "logit_scale", "relative_coords_table", "relative_position_index")

    def project(self: Any, x: Tensor) -> Tensor:
        return project_qkv(self, x)

    def position_bias(self: Any) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.flatten()].unflatten(0, self.relative_position_index.shape)
        return 16 * bias.permute(2, 0, 1)[None].sigmoid()

    def scaled(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float]:
        # 100 is the largest factor that the paper allows.
        factor = self.logit_scale.clamp(max=math.log(100.0)).exp().reshape(-1, 1, 1)
        return F.normalize(query, dim=-1) * factor, F.normalize(key, dim=-1), 1.0


class MergingCrAttention(MergingCosineAttention):
    """timm's `WindowMultiHeadAttention` of the other Swin V2."""

    parts = ("qkv", "attn_drop", "proj", "proj_drop", "meta_mlp")
    reads = ("num_heads", "logit_scale", "_relative_positional_encodings")

    def project(self: Any, x: Tensor) -> Tensor:
        return self.qkv(x)

    def position_bias(self: Any) -> Tensor:
        return self._relative_positional_encodings()


class MergingSwinBlock(PatchedGridBlock):
    """timm's `SwinTransformerBlock`."""

    parts: ClassVar[tuple[str, ...]] = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
    reads: ClassVar[tuple[str, ...]] = ("window_size", "shift_size", "attn_mask")
    replaces: ClassVar[tuple[str, ...]] = ("forward", "_attn")

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        down, right = self.shift_size
        if down or right:
            x = x.roll((-down, -right), (1, 2))
        x, real = pad_to_windows(x, *self.window_size)
        mask = self.get_attn_mask(x) if getattr(self, "dynamic_mask", False) else self.attn_mask
        unseen = None if mask is None else mask < 0  # tokens that do not see each other are not merged
        number = count_windows(x, *self.window_size)
        x = self.update_windows(
            x, self.window_size, lambda tokens: self.update(tokens, number, mask, real), real, unseen
        )
        x = x[:, :height, :width]
        return x.roll((down, right), (1, 2)) if down or right else x

    def update(self: Any, x: Tensor, number: int, mask: Tensor | None, real: Tensor | None) -> Tensor:
        """Return what attention and MLP add to the tokens of all windows, [W, K, C], of which each image has number."""
        attended = self.per_image(self.drop_path1, self.attend(self.norm1(x), mask, real), number)
        return attended + self.per_image(self.drop_path2, self.mlp(self.norm2(x + attended)), number)

    def attend(self: Any, x: Tensor, mask: Tensor | None, real: Tensor | None) -> Tensor:
        """Attend window by window, to zeros where there is padding."""
        return self.attn(self.zero_padding(x, real), mask=mask)


class MergingPostNormSwinBlock(MergingSwinBlock):
    """timm's `SwinTransformerV2Block`."""

    def update(self: Any, x: Tensor, number: int, mask: Tensor | None, real: Tensor | None) -> Tensor:
        attended = self.per_image(self.drop_path1, self.norm1(self.attend(x, mask, real)), number)
        return attended + self.per_image(self.drop_path2, self.norm2(self.mlp(x + attended)), number)


class MergingCrBlock(MergingPostNormSwinBlock):
    """timm's `SwinTransformerV2CrBlock`, some of which normalise the residual stream itself."""

    parts = (*MergingSwinBlock.parts, "norm3")
    replaces = ("forward", "_shifted_window_attn")

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.norm3(super().forward(x))


@register_adapter(swin.SwinTransformer, swin_v2.SwinTransformerV2, swin_v2_cr.SwinTransformerV2Cr)
class SwinTransformerAdapter(GridAdapter):
    """Swin Transformer, and both of timm's Swin Transformers V2."""

    family = "Swin"
    timm_modules = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")
    example = "swin_tiny_patch4_window7_224"
    least_channels = 192
    known_blocks = {
        swin.SwinTransformerBlock: MergingSwinBlock,
        swin_v2.SwinTransformerV2Block: MergingPostNormSwinBlock,
        swin_v2_cr.SwinTransformerV2CrBlock: MergingCrBlock,
    }
    known_attention = {
        swin.WindowAttention: MergingWindowAttention,
        swin_v2.WindowAttention: MergingCosineAttention,
        swin_v2_cr.WindowMultiHeadAttention: MergingCrAttention,
    }

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in _stages(model) for block in stage.blocks]

    def default_stages(self, model: Any) -> tuple[int, ...]:
        # Not those of the network's last stage, as long as there are others. Its few tokens are what the output is made
        # of: on a trained model they cost more accuracy for each multiply-add saved than all others.
        depths = [len(stage.blocks) for stage in _stages(model)]
        last = sum(depths[:-1]) or sum(depths)
        wide = super().default_stages(model)
        return tuple(block for block in wide if block < last) or tuple(range(last))


def _stages(model: Any) -> Any:
    """Return the network's stages, between which patches are merged."""
    return model.stages if hasattr(model, "stages") else model.layers
