"""Adapters: one file a family, registered once the module that defines the family is imported."""

import importlib
import re

import timm
import wrapt

from token_merge_plugin.adapters.base import Adapter
from token_merge_plugin.adapters.registry import find_adapter, missing, register_adapter, registered_adapters
from token_merge_plugin.errors import first_line

# {module that defines the family: module of its adapter}. By import hooks, so that one of another package is served
# without importing that package here.
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


# {module of timm: oldest timm by which the family is served}, where that is not the oldest that the package takes.
NEEDS_TIMM = {
    "timm.models.naflexvit": "1.0.18",
    "timm.models.gemma4_vit": "1.0.27",
    "timm.models.qwen3_vit": "1.0.30",
    "timm.models.deepseek_vit": "1.0.30",
    "timm.models.gcvit": "1.0.31",  # gives images each other's global queries before
    "timm.models.nest": "1.0.21",
    "timm.models.xcit": "1.0.21",
}


def numbers(version: str) -> list[int]:
    """Return the numbers of a version, by which versions compare: 1.0.31.dev0 -> [1, 0, 31]."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _serve(family: str, adapter: str) -> None:
    """Import the adapter of a family, once the module that defines the family is; or note why that cannot be."""

    def register(_: object) -> None:
        try:
            importlib.import_module(f"{__name__}.{adapter}")
        except (ImportError, AttributeError) as error:
            missing[family] = f"timm {timm.__version__} is not as it is known here: {first_line(error)}."

    needs = NEEDS_TIMM.get(family)
    if needs is not None and numbers(timm.__version__) < numbers(needs):
        missing[family] = f"It needs timm {needs} or newer, and this is {timm.__version__}."
    else:
        wrapt.register_post_import_hook(register, family)


for _family, _adapter in FAMILIES.items():
    _serve(_family, _adapter)

__all__ = ["Adapter", "find_adapter", "missing", "numbers", "register_adapter", "registered_adapters"]
