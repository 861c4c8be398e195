"""Adapter for timm's tnt.py: a transformer over the pixels of each patch, inside of one over the patches.

A token is merged together with its pixels on entry to a block, cell by cell, and each gets its update back behind it.
The class token, which has no pixels, sees the merged tokens in between.
"""

from typing import Any

import timm.models.tnt as tnt
import torch
import torch.nn.functional as F
from torch import Tensor

from token_merge_plugin.adapters.base import GridAdapter, PatchedAttention, PatchedGridBlock, attend, register_adapter


class MergingTNTAttention(PatchedAttention):
    """timm's `Attention` of TNT, between patches."""

    parts = ("qk", "v", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "scale")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        query, key = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        value = self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = attend(self, query, key, value)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MergingTNTBlock(PatchedGridBlock):
    """timm's `Block` of TNT."""

    parts = (
        "norm_in",
        "attn_in",
        "norm_mlp_in",
        "mlp_in",
        "norm1_proj",
        "proj",
        "norm2_proj",
        "norm_out",
        "attn_out",
        "drop_path",
        "norm_mlp",
        "mlp",
    )
    may_lack = ("norm2_proj",)

    def forward(self: Any, pixel_embed: Tensor, patch_embed: Tensor) -> tuple[Tensor, Tensor]:
        channels = patch_embed.shape[2]
        class_token, patches = patch_embed[:, :1], patch_embed[:, 1:]
        pixels = pixel_embed.reshape(*patches.shape[:2], *pixel_embed.shape[1:])  # [B, N, pixels, c]
        updates = []  # of the class token, which is computed with the others

        def update(tokens: Tensor) -> Tensor:
            patches, pixels = tokens.split((channels, tokens.shape[2] - channels), dim=2)
            pixels = pixels.reshape(*pixels.shape[:2], *pixel_embed.shape[1:])
            inner = self.update_pixels(pixels.flatten(0, 1)).view(pixels.shape)
            outer = self.update_patches(torch.cat((class_token, patches), dim=1), pixels + inner)
            updates.append(outer[:, :1])
            return torch.cat((outer[:, 1:], inner.flatten(2)), dim=2)

        tokens = torch.cat((patches, pixels.flatten(2)), dim=2)
        tokens = self.update_fewer(tokens, self._token_merge.plan.grid_size, update)
        patch_embed = torch.cat((class_token + updates[0], tokens[:, :, :channels]), dim=1)
        return tokens[:, :, channels:].reshape(pixel_embed.shape), patch_embed

    def update_pixels(self: Any, x: Tensor) -> Tensor:
        """Return what the inner transformer adds to the pixels [B * K, pixels, c]."""
        attended = self.drop_path(self.attn_in(self.norm_in(x)))
        return attended + self.drop_path(self.mlp_in(self.norm_mlp_in(x + attended)))

    def update_patches(self: Any, x: Tensor, pixels: Tensor) -> Tensor:
        """Return what the outer transformer, and the pixels [B, K, pixels, c], add to the tokens [B, 1 + K, C]."""
        if getattr(self, "legacy", True):
            inner = self.proj(self.norm1_proj(pixels).flatten(2))
        else:
            inner = self.norm2_proj(self.proj(self.norm1_proj(pixels.flatten(2))))
        inner = F.pad(inner, (0, 0, 1, 0))  # nothing for the class token
        self._token_merge.plan.current().num_prefix_tokens = 1  # from here on, with the class token
        x = x + inner
        attended = self.drop_path(self.attn_out(self.norm_out(x)))
        return inner + attended + self.drop_path(self.mlp(self.norm_mlp(x + attended)))


@register_adapter(tnt.TNT)
class TNTAdapter(GridAdapter):
    """Everything that timm builds from `TNT`."""

    family = "TNT"
    timm_modules = ("tnt",)
    reduces = "image tokens with their pixels, in both transformers"
    example = "tnt_s_patch16_224"
    known_blocks = {tnt.Block: MergingTNTBlock}
    known_attention = {tnt.Attention: MergingTNTAttention}

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return tuple(model.pixel_embed.grid_size)

    def layers(self, block: Any) -> list[Any]:
        return [block.attn_out]
