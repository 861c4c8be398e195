"""Adapter for timm's vision_transformer.py and deit.py, and for what is built from them: hybrids, ViTamin."""

from collections.abc import Callable
from typing import Any, ClassVar

import timm.models.vision_transformer as vit
import torch
from timm.layers import HybridEmbed
from torch import Tensor

from token_merge_plugin.adapters.base import (
    Adapter,
    Patched,
    PatchedAttention,
    PatchedBlock,
    PatchedModel,
    attend,
    classes,
    register_adapter,
)


class MergingAttention(PatchedAttention):
    """timm's `Attention`."""

    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
    reads = ("num_heads", "head_dim", "scale")
    may_lack = ("norm", "gate")

    def merged_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        out = attend(self, query, key, value, attn_mask, is_causal)
        out = out.transpose(1, 2).flatten(2)
        if hasattr(self, "norm"):
            out = self.norm(out)
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def differential_attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attend twice and subtract (Ye et al. 2024, "Differential Transformer").

    Args:
        module: patched `DiffAttention` or `DiffParallelScalingBlock`.
        query, key: [B, N, C], of which each head has two halves.
        value: [B, N, C].
        args, kwargs: masks, as the module was given them.

    Returns:
        [B, N, C], normalised head by head.
    """
    query = module.q_norm(query.unflatten(2, (-1, module.head_dim)).transpose(1, 2))  # [B, 2 * H, N, D]
    key = module.k_norm(key.unflatten(2, (-1, module.head_dim)).transpose(1, 2))
    value = value.unflatten(2, (-1, 2 * module.head_dim)).transpose(1, 2)  # [B, H, N, 2 * D]
    weight = module._compute_lambda().type_as(query)
    out = attend(
        module,
        query,
        key,
        value.repeat_interleave(2, dim=1),
        *args,
        dropout=module.attn_drop_p,
        head_weight=torch.stack((torch.ones_like(weight), -weight)).repeat(module.num_heads),
        **kwargs,
    )
    out = out[:, 0::2] - weight * out[:, 1::2]
    return (module.sub_norm(out) * (1 - module.lambda_init)).transpose(1, 2).flatten(2)


class MergingDiffAttention(PatchedAttention):
    """timm's `DiffAttention`."""

    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "sub_norm", "proj", "proj_drop")
    reads = ("num_heads", "head_dim", "scale", "lambda_init", "attn_drop_p", "_compute_lambda")

    def merged_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        out = differential_attend(self, *self.qkv(x).chunk(3, dim=2), attn_mask, is_causal)
        return self.proj_drop(self.proj(self.norm(out)))


class MergingBlock(PatchedBlock):
    """timm's `Block`."""

    parts: ClassVar[tuple[str, ...]] = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = reduce(x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MergingPreNormBlock(PatchedBlock):
    """A block like timm's `Block`, without LayerScale: VOLO's and DeepSeek's."""

    parts = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = reduce(x + self.drop_path1(self.attn(self.norm1(x), *args, **kwargs)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class MergingResPostBlock(PatchedBlock):
    """timm's `ResPostBlock`: norms behind attention and MLP."""

    parts = ("attn", "norm1", "drop_path1", "mlp", "norm2", "drop_path2")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = reduce(x + self.drop_path1(self.norm1(self.attn(x, *args, **kwargs))))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class MergingParallelThingsBlock(PatchedBlock):
    """timm's `ParallelThingsBlock`: several attention layers side by side, then several MLPs."""

    parts = ("attns", "ffns")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            branches = [b.drop_path(b.ls(b.attn(b.norm(x), *args, **kwargs))) for b in self.attns]
        else:
            branches = [branch(x) for branch in self.attns]
        x = reduce(x + torch.stack(branches).sum(dim=0))
        return x + torch.stack([branch(x) for branch in self.ffns]).sum(dim=0)


class MergingParallelScalingBlock(PatchedBlock):
    """timm's `ParallelScalingBlock`: attention and MLP on the same input, so tokens are reduced behind both."""

    parts = (
        "in_norm",
        "in_proj",
        "q_norm",
        "k_norm",
        "attn_drop",
        "sub_norm",
        "mlp_drop",
        "mlp_act",
        "out_proj",
        "attn_out_proj",
        "mlp_out_proj",
        "ls",
        "drop_path",
    )
    reads: ClassVar[tuple[str, ...]] = ("in_split", "mlp_bias", "num_heads", "scale")
    may_lack: ClassVar[tuple[str, ...]] = ("out_proj", "attn_out_proj", "mlp_out_proj", "sub_norm")

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return reduce(self.later_forward(x, *args, **kwargs))

    def later_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projected = self.in_proj(self.in_norm(x))
        in_front = getattr(self, "qkv_bias", None)  # as timm before 1.0.25 has the two biases
        if in_front is not None:
            projected = projected + torch.cat((in_front, self.mlp_bias))
        hidden, query, key, value = projected.split(self.in_split, dim=-1)
        if in_front is None and self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        out = self.attention(query, key, value, *args, **kwargs)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if getattr(self, "out_proj", None) is not None:
            y = self.out_proj(torch.cat((out, hidden), dim=-1))
        else:
            y = self.attn_out_proj(out) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(y))

    def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend: [B, N, C] -> [B, N, C]."""
        query, key, value = (x.unflatten(2, (self.num_heads, -1)) for x in (query, key, value))
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        out = attend(self, query, key, value.transpose(1, 2), *args, **kwargs)
        return out.transpose(1, 2).flatten(2)


class MergingDiffParallelScalingBlock(MergingParallelScalingBlock):
    """timm's `DiffParallelScalingBlock`."""

    reads = ("in_split", "mlp_bias", "num_heads", "head_dim", "scale", "lambda_init", "attn_drop_p", "_compute_lambda")
    may_lack = ("out_proj", "attn_out_proj", "mlp_out_proj")

    def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return differential_attend(self, query, key, value, *args, **kwargs)


class MergingVisionTransformer(PatchedModel):
    """timm's `VisionTransformer`."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        edge = self._token_merge.plan.edge()
        if edge is not None and x.dim() == 4:  # dynamic image size: [B, height, width, C]
            edge.grid_size = (x.shape[1], x.shape[2])
        elif edge is not None and self.pos_embed is None and isinstance(self.patch_embed, HybridEmbed):
            # ViTamin, which takes images of any size without being asked to.
            height, width = self.patch_embed.grid_size
            if x.shape[1] != height * width:
                edge.grid_size = None
        return super()._pos_embed(x)  # type: ignore[misc]


@register_adapter(vit.VisionTransformer)
class VisionTransformerAdapter(Adapter):
    """Everything that timm builds from `VisionTransformer`, its subclass for the distilled DeiT included."""

    family = "ViT and DeiT"
    timm_modules: ClassVar[tuple[str, ...]] = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
    example = "deit_small_patch16_224"
    compares_mean_keys: ClassVar[bool] = True
    model_mixin: ClassVar[type[Patched]] = MergingVisionTransformer
    known_blocks = {
        vit.Block: MergingBlock,
        vit.ResPostBlock: MergingResPostBlock,
        vit.ParallelThingsBlock: MergingParallelThingsBlock,
        vit.ParallelScalingBlock: MergingParallelScalingBlock,
    } | classes(vit, DiffParallelScalingBlock=MergingDiffParallelScalingBlock)
    known_attention = {vit.Attention: MergingAttention} | classes(vit, DiffAttention=MergingDiffAttention)

    def num_class_tokens(self, model: Any) -> int:
        return int(model.has_class_token) + int(hasattr(model, "dist_token"))

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        return None if getattr(model, "dynamic_img_size", False) else tuple(model.patch_embed.grid_size)

    def layers(self, block: Any) -> list[Any]:
        if isinstance(block, vit.ParallelThingsBlock):
            return [branch.attn for branch in block.attns]
        return [block.attn] if hasattr(block, "attn") else []  # the parallel scaling blocks attend themselves
