"""Adapter for timm's vision_transformer_sam.py: attention within windows, in a few blocks over the whole grid.

The neck needs the full grid. Tokens are merged on entry to a block, and every token gets its update back behind it.
Windows that reach beyond the grid are padded for attention alone, so there tokens are merged once more for the MLP.
"""

from typing import Any

import timm.models.vision_transformer_sam as sam
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor

from token_merge_plugin.adapters.base import (
    GridAdapter,
    PatchedAttention,
    PatchedGridBlock,
    attend_by_parts,
    register_adapter,
)
from token_merge_plugin.method.merging import count_windows, pad_to_windows


class MergingSamAttention(PatchedAttention):
    """timm's `Attention` of SAM: a token has the position of its representative."""

    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "rope")
    reads = ("num_heads", "scale", "use_rel_pos")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        plan = self._token_merge.plan
        state = plan.current()
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        bias = None
        if self.use_rel_pos:
            bias = self.position_bias(query, state.grid_size, state.merged.representative)
        elif self.rope is not None:
            rope = state.positions(self.rope.get_embed())
            query = apply_rot_embed_cat(query, rope).type_as(value)
            key = apply_rot_embed_cat(key, rope).type_as(value)
        out = attend_by_parts(
            self,
            query,
            key,
            value,
            scale=self.scale,
            bias=bias,
            log_size=plan.log_size(state),
            drop=self.drop,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def drop(self: Any, weight: Tensor) -> Tensor:
        """Drop of an attention matrix [W, H, K, K], which timm has as [W * H, K, K]."""
        return self.attn_drop(weight.flatten(0, 1)).unflatten(0, weight.shape[:2])

    def position_bias(self: Any, query: Tensor, grid_size: tuple[int, int], position: Tensor) -> Tensor:
        """Return the bias of each pair of tokens, the sum of one by rows and one by columns: [W, H, K, K].

        Args:
            query: [W, H, K, D].
            grid_size: (height, width) of a window.
            position: [W, K], of each token in the window.
        """
        height, width = grid_size
        by_rows = axis_bias(query, get_rel_pos(height, height, self.rel_pos_h), position // width)
        by_columns = axis_bias(query, get_rel_pos(width, width, self.rel_pos_w), position % width)
        return by_rows.add_(by_columns)  # in place: these are the largest tensors of the model


def axis_bias(query: Tensor, relative: Tensor, position: Tensor) -> Tensor:
    """Return the products of the queries with the embeddings of relative positions along one axis: [W, H, K, K].

    Args:
        query: [W, H, K, D].
        relative: [S, S, D], the embedding of each pair of positions.
        position: [W, K], of each token on the axis.
    """
    products = torch.einsum("whkd,wksd->whks", query, relative[position])  # [W, H, K, S], not of all patches
    return products.gather(3, position[:, None, None].expand(*products.shape[:3], -1))


class MergingSamBlock(PatchedGridBlock):
    """timm's `Block` of SAM."""

    parts = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    reads = ("window_size",)

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        grid_size, side = (height, width), self.window_size
        window_size = (side, side) if side else grid_size
        x, real = pad_to_windows(x, *window_size)
        if real is None:
            number = count_windows(x, *window_size)
            return self.update_windows(x, window_size, lambda tokens: self.update(tokens, number))
        x = self.update_windows(x, window_size, lambda tokens: self.attend(tokens, real), real)[:, :height, :width]
        return self.update_windows(x, grid_size, lambda tokens: self.feed(tokens, 1), attends=False)

    def update(self: Any, x: Tensor, number: int) -> Tensor:
        """Return what attention and MLP add to the tokens of all windows, [W, K, C], of which each image has number."""
        attended = self.attend(x)
        return attended + self.feed(x + attended, number)

    def attend(self: Any, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Return what attention adds, to zeros where there is padding."""
        return self.drop_path1(self.ls1(self.attn(self.zero_padding(self.norm1(x), real))))

    def feed(self: Any, x: Tensor, number: int) -> Tensor:
        """Return what the MLP adds. Unlike attention's, its path is dropped for whole images, not for windows."""
        return self.per_image(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), number)


@register_adapter(sam.VisionTransformerSAM)
class VisionTransformerSAMAdapter(GridAdapter):
    """Everything that timm builds from `VisionTransformerSAM`."""

    family = "SAM"
    timm_modules = ("vision_transformer_sam",)
    example = "samvit_base_patch16_224"
    reduces = "tokens of each window, or of the whole grid, in attention and MLP"
    known_blocks = {sam.Block: MergingSamBlock}
    known_attention = {sam.Attention: MergingSamAttention}
