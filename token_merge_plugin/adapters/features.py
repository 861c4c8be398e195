"""Adapter for the feature extractors that timm takes a hierarchical model apart for (`features_only=True`).

What is left is the model's stages, without the model. That is enough where each block restores the grid itself.
"""

from collections.abc import Iterator
from typing import Any

from timm.models._features import FeatureDictNet, FeatureHookNet
from torch import nn

from token_merge_plugin.adapters.base import GridAdapter, Patched
from token_merge_plugin.adapters.registry import find_adapter, register_adapter, registered_adapters
from token_merge_plugin.errors import UnsupportedModelError


@register_adapter(FeatureDictNet)
class FeatureNetAdapter(GridAdapter):
    """timm's `FeatureDictNet` and `FeatureListNet`, of the blocks of any family whose blocks restore the grid."""

    family = "features of these"
    model_mixin = Patched  # to find its blocks, all of its modules are gone through: too long for each pass

    def serves(self, model: Any) -> bool:
        return bool(self.blocks(model))

    def blocks(self, model: Any) -> list[nn.Module]:
        return [module for module in model.modules() if _owner(module)]

    def mixins(self, block: Any) -> Iterator[tuple[nn.Module, type[Patched]]]:
        owner = _owner(block)
        assert owner is not None  # or it would not be a block
        return owner.mixins(block)


@register_adapter(FeatureHookNet)
class FeatureHookAdapter(FeatureNetAdapter):
    """timm's `FeatureHookNet`: refused where a hook reads a block behind which tokens may be fewer than the grid."""

    def serves(self, model: Any) -> bool:
        body = dict(model.items()).get("body", model)
        adapter = find_adapter(body)
        if adapter is not None and not adapter.on_entry:
            read = [body.get_submodule(info["module"]) for info in model.feature_info.get_dicts()]
            if any(module in read for module in adapter.blocks(body)):
                raise UnsupportedModelError(
                    f"FeatureHookNet reads {type(body).__name__} by hooks inside of the network, where merged tokens "
                    "are fewer than the grid has patches. Leave feature_cls out, or choose feature_cls='getter'."
                )
        return False  # the model inside is


def _owner(block: nn.Module) -> GridAdapter | None:
    """Return the adapter of the family that a block is of, or None."""
    for adapter in registered_adapters():
        if isinstance(adapter, GridAdapter) and isinstance(block, tuple(adapter.known_blocks)):
            return adapter
    return None
