"""Token pruning-and-merging for timm vision transformers: faster, without training.

    import timm, token_merge_plugin

    model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    token_merge_plugin.apply(model, keep_rate=0.7)

After Bian et al., "Multi-Scale And Token Mergence: Make Your ViT More Efficient" (arXiv 2306.04897).
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import timm

from token_merge_plugin.adapters import Adapter, register_adapter
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import (
    ConfigError,
    DataError,
    ExportError,
    MissingExtraError,
    PatchStateError,
    TokenMergeError,
    UnsupportedModelError,
)
from token_merge_plugin.patching import (
    apply,
    config_of,
    full_grid,
    is_patched,
    remove,
    restore,
    supported_models,
)
from token_merge_plugin.pipelines import install, patch_timm, uninstall

if TYPE_CHECKING:
    from token_merge_plugin import trial
    from token_merge_plugin.trial import calibrate, export, summary

# Registers LV-ViT with timm, unless another package has: its models are served as well.
if not timm.is_model("lvvit_s"):
    import token_merge_plugin.models  # noqa: F401

# Pickles of models patched by version 0.1.0 name these modules by where they were then.
for _name in ("state", "multiscale"):
    sys.modules[f"{__name__}.{_name}"] = importlib.import_module(f"{__name__}.method.{_name}")

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "ConfigError",
    "DataError",
    "ExportError",
    "MergeConfig",
    "MissingExtraError",
    "PatchStateError",
    "TokenMergeError",
    "UnsupportedModelError",
    "apply",
    "calibrate",
    "config_of",
    "export",
    "full_grid",
    "install",
    "is_patched",
    "patch_timm",
    "register_adapter",
    "remove",
    "restore",
    "summary",
    "supported_models",
    "trial",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    """Import the trial only when it is asked for: a model in production needs none of it."""
    if name not in ("trial", "calibrate", "export", "summary"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trial = importlib.import_module(f"{__name__}.trial")
    return trial if name == "trial" else getattr(trial, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
