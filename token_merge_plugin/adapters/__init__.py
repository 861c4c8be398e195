"""Adapters: one file a family. Importing this package has timm's families registered as soon as timm is imported."""

import importlib

import wrapt

from token_merge_plugin.adapters.base import (
    Adapter,
    find_adapter,
    register_adapter,
    registered_adapters,
)

# {module that defines the family: module of its adapter}. A hook for each, so that importing this package imports
# no library that the user does not use, and a family that an older timm lacks is simply not there.
FAMILIES = {"timm.models.vision_transformer": "token_merge_plugin.adapters.vit"}


def _import_when_imported(adapter: str, family: str) -> None:
    wrapt.register_post_import_hook(lambda _: importlib.import_module(adapter), family)


for _family, _adapter in FAMILIES.items():
    _import_when_imported(_adapter, _family)

__all__ = ["Adapter", "find_adapter", "register_adapter", "registered_adapters"]
