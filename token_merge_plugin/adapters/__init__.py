"""Adapters: one file a family, registered once the module that defines the family is imported."""

import importlib

import wrapt

from token_merge_plugin.adapters.base import (
    Adapter,
    find_adapter,
    register_adapter,
    registered_adapters,
)

# {module that defines the family: module of its adapter}. By import hooks, so that a family that an older timm lacks
# is simply not there, and one of another package is served without importing that package here.
FAMILIES = {"timm.models.vision_transformer": "token_merge_plugin.adapters.vit"}


def _import_when_imported(adapter: str, family: str) -> None:
    wrapt.register_post_import_hook(lambda _: importlib.import_module(adapter), family)


for _family, _adapter in FAMILIES.items():
    _import_when_imported(_adapter, _family)

__all__ = ["Adapter", "find_adapter", "register_adapter", "registered_adapters"]
