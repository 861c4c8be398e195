"""Adapter for timm's maxxvit.py: convolutions, and attention in windows and in spread groups, or over the whole grid.

A window of the grid partition has the spread tokens of one group, and they are merged as those of any other window.
Tokens are merged window by window on entry to a transformer block, and every token gets its update back behind it.
Convolution blocks stay as they are.
"""

from typing import Any, ClassVar

import timm.models.maxxvit as maxxvit
import torch
from timm.models.maxxvit import Downsample2d, grid_partition, grid_reverse, window_partition, window_reverse
from torch import Tensor, nn

from token_merge_plugin.adapters.base import (
    GridAdapter,
    PatchedAttention,
    PatchedGridBlock,
    attend,
    register_adapter,
    relative_bias,
)
from token_merge_plugin.method.merging import count_windows


class MergingPartitionAttention(PatchedAttention):
    """timm's `AttentionCl`: bias of a pair is that of the representatives' positions."""

    parts = ("qkv", "rel_pos", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "dim_head", "head_first", "scale")

    def merged_forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self.proj_drop(self.proj(self.attended(self.qkv(x), shared_rel_pos)))

    def attended(self: Any, projected: Tensor, shared_rel_pos: Tensor | None) -> Tensor:
        """Return what the heads read, [W, K, H * D], from query, key and value, [W, K, 3 * H * D]."""
        if self.head_first:
            parts = projected.unflatten(2, (self.num_heads, 3, self.dim_head)).permute(3, 0, 2, 1, 4)
        else:
            parts = projected.unflatten(2, (3, self.num_heads, self.dim_head)).permute(2, 0, 3, 1, 4)
        query, key, value = parts  # [W, H, K, D]
        patches = self._token_merge.plan.current().num_patches
        bias = relative_bias(self, query, patches, shared_rel_pos)
        out = attend(self, query, key, value, position_bias=bias)
        return out.transpose(1, 2).flatten(2)


class MergingAttention2d(MergingPartitionAttention):
    """timm's `Attention2d`, of an image [W, C, 1, K]."""

    def attended(self: Any, projected: Tensor, shared_rel_pos: Tensor | None) -> Tensor:
        return _image(super().attended(_tokens(projected), shared_rel_pos))


class MergingBlock(PatchedGridBlock):
    """What the blocks below have in common."""

    parts: ClassVar[tuple[str, ...]] = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    def update(self: Any, x: Tensor, attended: Tensor, number: int = 1) -> Tensor:
        """Return what attention and MLP add to the tokens of all windows.

        Args:
            x: [W, K, C], or [W, C, 1, K] where the block's layers are those of images.
            attended: the output of attention, of the same shape.
            number: of windows of each image.
        """
        attended = self.per_image(self.drop_path1, self.ls1(attended), number)
        return attended + self.per_image(self.drop_path2, self.ls2(self.mlp(self.norm2(x + attended))), number)

    def merged_alike(self: Any, x: Tensor) -> Tensor:
        """Merge what belongs to the tokens as they were merged: [W, T, D] -> [W, K, D].

        Means are far closer to the unpatched model than what the representatives alone have.
        """
        merged = self._token_merge.plan.current().merged
        token = torch.arange(merged.size.shape[1], device=x.device)
        holds = merged.token_map[:, None, :] == token[:, None]  # [W, K, T]
        return (holds / merged.size[:, :, None]).to(x.dtype) @ x


class MergingPartitionBlock(MergingBlock):
    """timm's `PartitionAttentionCl`."""

    reads = ("partition_block", "partition_size")

    replaces = ("forward", "_partition_attn")

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size = self.partition_size
        number = count_windows(x, *size)
        partition = window_partition if self.partition_block else grid_partition
        reverse = window_reverse if self.partition_block else grid_reverse
        tokens = self.update_fewer(partition(x, size).flatten(1, 2), size, lambda x: self.token_update(x, number))
        return reverse(tokens, size, (height, width))

    def token_update(self: Any, x: Tensor, number: int) -> Tensor:
        """Return what the block adds to the tokens of all windows, [W, K, C], of which each image has that number."""
        return self.update(x, self.attn(self.norm1(x)), number)


class MergingPartitionBlock2d(MergingPartitionBlock):
    """timm's `PartitionAttention2d`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def token_update(self: Any, x: Tensor, number: int) -> Tensor:
        return _tokens(super().token_update(_image(x), number))


class MergingParallelBlock(MergingBlock):
    """timm's `ParallelPartitionAttention`.

    Tokens that are merged in a window are of different groups. So attention in the groups sees all tokens, and what
    it finds for them is merged.
    """

    parts = ("attn_block", "attn_grid", *MergingBlock.parts)
    reads = ("partition_size",)
    may_lack = ("attn",)
    replaces = ("forward", "_partition_attn")

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size = self.partition_size
        number = count_windows(x, *size)
        in_groups = self.attn_grid(grid_partition(self.norm1(x), size))
        in_groups = grid_reverse(in_groups, size, (height, width))
        in_groups = window_partition(in_groups, size).flatten(1, 2)  # [W, T, C / 2]

        def update(x: Tensor) -> Tensor:
            attended = torch.cat((self.attn_block(self.norm1(x)), self.merged_alike(in_groups)), dim=2)
            return self.update(x, attended, number)

        return self.update_windows(x, size, update)


class MergingTransformerBlock2d(MergingBlock):
    """timm's `TransformerBlock2d`, whose one window is the grid.

    Where it pools, tokens are merged as the shortcut pools them, and what is pooled on the way to attention alike.
    """

    parts = ("shortcut", *MergingBlock.parts)

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        normed = None
        if isinstance(self.shortcut, Downsample2d):
            normed = self.norm1(x).flatten(2).transpose(1, 2)
        x = self.shortcut(x)

        def update(tokens: Tensor) -> Tensor:
            x = _image(tokens)
            attends = self.norm1(x) if normed is None else _image(self.merged_alike(normed))
            return _tokens(self.update(x, self.attn(attends, shared_rel_pos=shared_rel_pos)))

        grid_size = (x.shape[2], x.shape[3])
        tokens = self.update_fewer(x.flatten(2).transpose(1, 2), grid_size, update)
        return tokens.transpose(1, 2).unflatten(2, grid_size)


def _image(tokens: Tensor) -> Tensor:
    """Lay out tokens as an image of one row, for 1x1 convolutions and their norms: [W, K, C] -> [W, C, 1, K]."""
    return tokens.transpose(1, 2).unsqueeze(2)  # strides of channels_last, which one column would not have


def _tokens(image: Tensor) -> Tensor:
    """Undo `_image`: [W, C, 1, K] -> [W, K, C]."""
    return image.squeeze(2).transpose(1, 2)


@register_adapter(maxxvit.MaxxVit)
class MaxxVitAdapter(GridAdapter):
    """Everything that timm builds from `MaxxVit`. Its convolution blocks are not counted."""

    family = "MaxViT and CoAtNet"
    timm_modules = ("maxxvit",)
    example = "maxvit_tiny_tf_224"
    least_channels = 192
    reduces = "tokens of each window or group, or of each cell of the grid, in attention and MLP"
    known_blocks = {
        maxxvit.PartitionAttentionCl: MergingPartitionBlock,
        maxxvit.PartitionAttention2d: MergingPartitionBlock2d,
        maxxvit.ParallelPartitionAttention: MergingParallelBlock,
        maxxvit.TransformerBlock2d: MergingTransformerBlock2d,
    }
    known_attention = {
        maxxvit.AttentionCl: MergingPartitionAttention,
        maxxvit.Attention2d: MergingAttention2d,
    }

    def blocks(self, model: Any) -> list[nn.Module]:
        kinds = tuple(self.known_blocks)
        return [module for module in model.stages.modules() if isinstance(module, kinds)]

    def layers(self, block: Any) -> list[Any]:
        return [block.attn_block if isinstance(block, maxxvit.ParallelPartitionAttention) else block.attn]
