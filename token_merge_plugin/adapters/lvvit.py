"""Adapter for LV-ViT: of `token_merge_plugin.models`, of the TokenLabeling package (tlt), and of copies of the latter.

The package is served once it is imported. Many projects have a copy of it under another name, which is served by

    from token_merge_plugin.adapters.lvvit import register_lvvit

    register_lvvit(sys.modules["my_models.lvvit"])             # imported already, or
    wrapt.when_imported("my_models.lvvit")(register_lvvit)     # once it is
"""

from collections.abc import Callable
from typing import Any, ClassVar

import wrapt
from timm.models.vision_transformer import Attention
from torch import Tensor

from token_merge_plugin.adapters.base import (
    Adapter,
    Known,
    PatchedBlock,
    PatchedModel,
    PatchedSelfAttention,
    register_adapter,
)
from token_merge_plugin.adapters.vit import MergingAttention


class MergingOriginalAttention(PatchedSelfAttention):
    """`Attention` of the TokenLabeling package."""

    def merged_forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return super().merged_forward(x, None if padding_mask is None else ~padding_mask.bool()[:, None, None, :])


class MergingLVViTBlock(PatchedBlock):
    """`LVViTBlock`, and `Block` of the TokenLabeling package."""

    parts = ("norm1", "attn", "drop_path", "norm2", "mlp")
    reads = ("skip_lam",)

    def stage_forward(self: Any, x: Tensor, reduce: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = reduce(x + self.drop_path(self.attn(self.norm1(x), *args, **kwargs)) / self.skip_lam)
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam


class MergingLVViT(PatchedModel):
    """`LVViT`, and `LV_ViT` of the TokenLabeling package."""

    def head_reads_grid(self) -> bool:
        return True  # the second classifier does

    def forward_tokens(self, *args: Any, **kwargs: Any) -> Any:
        # In training, and in the original's forward, nothing else is around the blocks.
        return self._call(super().forward_tokens, False, args, kwargs)  # type: ignore[misc]


class LVViTAdapter(Adapter):
    """What all LV-ViTs have in common; registered for each by its classes."""

    family = "LV-ViT"
    model_mixin = MergingLVViT

    def num_prefix_tokens(self, model: Any) -> int:
        return 1

    def num_class_tokens(self, model: Any) -> int:
        return 1

    def grid_size(self, model: Any) -> tuple[int, int] | None:
        if hasattr(model.patch_embed, "grid_size"):
            return model.patch_embed.grid_size
        # The original does not say: a square, if it can be one.
        patches = model.pos_embed.shape[1] - 1
        side = round(patches**0.5)
        return (side, side) if side * side == patches else None


# Not imported here, because that would put its models in the place of the package's in timm's registry.
@wrapt.when_imported("token_merge_plugin.models.lvvit")
def _register(module: Any) -> None:
    @register_adapter(module.LVViT)
    class OwnLVViTAdapter(LVViTAdapter):
        timm_modules = ("lvvit",)
        example = "lvvit_s"
        known_blocks: ClassVar[Known] = {module.LVViTBlock: MergingLVViTBlock}
        known_attention: ClassVar[Known] = {Attention: MergingAttention}


@wrapt.when_imported("tlt.models.lvvit")
def register_lvvit(module: Any) -> None:
    """Serve the LV-ViT of the TokenLabeling package, or of a copy of it.

    Args:
        module: defines or imports the package's classes `LV_ViT`, `Block` and `Attention`, unchanged in what they do.
    """

    @register_adapter(module.LV_ViT)
    class OriginalLVViTAdapter(LVViTAdapter):
        known_blocks: ClassVar[Known] = {module.Block: MergingLVViTBlock}
        known_attention: ClassVar[Known] = {module.Attention: MergingOriginalAttention, Attention: MergingAttention}
