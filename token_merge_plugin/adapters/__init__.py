"""Adapters: one file a family, registered once the module that defines the family is imported."""

import importlib

import wrapt

from token_merge_plugin.adapters.base import Adapter
from token_merge_plugin.adapters.registry import find_adapter, register_adapter, registered_adapters

# {module that defines the family: module of its adapter}. By import hooks, so that a family that an older timm lacks
# is simply not there, and one of another package is served without importing that package here.
FAMILIES = {
    # Token sequences: tokens stay fewer through a section of the network.
    "timm.models.vision_transformer": "vit",
    "timm.models.eva": "eva",
    "timm.models.beit": "beit",
    "timm.models.vision_transformer_relpos": "relpos",
    "timm.models.naflexvit": "naflexvit",
    "timm.models.cait": "cait",
    "timm.models.convit": "convit",
    "timm.models.gemma4_vit": "gemma4_vit",
    "timm.models.qwen3_vit": "qwen3_vit",
    "timm.models.deepseek_vit": "deepseek_vit",
    "token_merge_plugin.models.lvvit": "lvvit",
    "tlt.models.lvvit": "lvvit",
    "timm.models.volo": "volo",
    "timm.models.pit": "pit",
    "timm.models.hiera": "hiera",
    "timm.models.crossvit": "crossvit",
    # Grids: each block restores the tokens that it merged.
    "timm.models.swin_transformer_v2_cr": "swin",
    "timm.models.maxxvit": "maxxvit",
    "timm.models.davit": "davit",
    "timm.models.gcvit": "gcvit",
    "timm.models.nest": "nest",
    "timm.models.vision_transformer_sam": "sam",
    "timm.models.tnt": "tnt",
    "timm.models.twins": "twins",
    "timm.models.xcit": "xcit",
    "timm.models._features": "features",
}


def _import_when_imported(adapter: str, family: str) -> None:
    wrapt.register_post_import_hook(lambda _: importlib.import_module(f"{__name__}.{adapter}"), family)


for _family, _adapter in FAMILIES.items():
    _import_when_imported(_adapter, _family)

__all__ = ["Adapter", "find_adapter", "register_adapter", "registered_adapters"]
