"""Adapter for timm's gemma4_vit.py: the vision encoder of Gemma 4, on its own or in timm's classifier."""

from collections.abc import Callable
from typing import Any

import timm.models.gemma4_vit as gemma4
from timm.models.gemma4_vit import apply_multidimensional_rope
from torch import Tensor

from token_merge_plugin.adapters.base import (
    Adapter,
    PatchedAttention,
    PatchedBlock,
    PatchedModel,
    attend,
    register_adapter,
)


class MergingGemma4Attention(PatchedAttention):
    """timm's `Gemma4Attention`: each token is rotated by the position of its representative."""

    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "v_norm", "attn_drop", "proj_drop")
    reads = ("head_dim", "num_kv_groups")
    scale = 1.0  # queries and keys are normalised instead

    def merged_forward(
        self: Any, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        plan = self._token_merge.plan
        state = plan.current()
        rope = [state.positions(y.unsqueeze(1)).squeeze(1) for y in (rope_cos, rope_sin)]  # [B, K, D] each
        query, key, value = (
            y.unflatten(2, (-1, self.head_dim)) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        query, key = (
            apply_multidimensional_rope(y, *rope).transpose(1, 2) for y in (self.q_norm(query), self.k_norm(key))
        )
        value = self.v_norm(value).transpose(1, 2)
        if self.num_kv_groups > 1:  # grouped queries
            key, value = (y.repeat_interleave(self.num_kv_groups, dim=1) for y in (key, value))
        out = attend(self, query, key, value, attn_mask)
        return self.proj_drop(self.o_proj(out.transpose(1, 2).flatten(2)))


class MergingGemma4Block(PatchedBlock):
    """timm's `Gemma4Block`: norms before and behind attention and MLP."""

    parts = ("norm1", "attn", "norm2", "norm3", "mlp", "norm4", "drop_path")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = reduce(x + self.drop_path(self.norm2(self.attn(self.norm1(x), *args, **kwargs))))
        return x + self.drop_path(self.norm4(self.mlp(self.norm3(x))))


class MergingGemma4VitEncoder(PatchedModel):
    """timm's `Gemma4VitEncoder`, whose `forward` does not go through `forward_features`."""

    reads = ("patch_size", "_assert_raw_img_conformant")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().forward, False, args, kwargs)

    def _assert_raw_img_conformant(self: Any, x: Tensor) -> None:
        # The first that every method does with its images. Patches that come as a sequence may be of any shape.
        super()._assert_raw_img_conformant(x)  # type: ignore[misc]
        edge = self._token_merge.plan.edge()
        if edge is not None and x.dim() == 4:
            edge.grid_size = (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1])


@register_adapter(gemma4.Gemma4VitEncoder)
class Gemma4VitAdapter(Adapter):
    """Everything that timm builds around `Gemma4VitEncoder`."""

    family = "Gemma 4 ViT"
    timm_modules = ("gemma4_vit",)
    example = "gemma4_vit_167m"
    restores = "behind the last block, before the pooler"
    model_mixin = MergingGemma4VitEncoder
    known_blocks = {gemma4.Gemma4Block: MergingGemma4Block}
    known_attention = {gemma4.Gemma4Attention: MergingGemma4Attention}
