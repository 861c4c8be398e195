"""Token pruning-and-merging for timm vision transformers: faster, without training.

    import timm, token_merge_plugin

    model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    token_merge_plugin.apply(model, keep_rate=0.7)

After Bian et al., "Multi-Scale And Token Mergence: Make Your ViT More Efficient" (arXiv 2306.04897).
"""

import timm

from token_merge_plugin.adapters import Adapter, register_adapter
from token_merge_plugin.calibration import calibrate
from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    PatchStateError,
    TokenMergeError,
    UnsupportedModelError,
)
from token_merge_plugin.patching import apply, remove, supported_models
from token_merge_plugin.pipelines import install, patch_timm, uninstall

# Registers LV-ViT with timm, unless another package has: its models are served as well.
if not timm.is_model("lvvit_s"):
    import token_merge_plugin.models  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "ConfigError",
    "DataError",
    "MergeConfig",
    "MissingExtraError",
    "PatchStateError",
    "TokenMergeError",
    "UnsupportedModelError",
    "apply",
    "calibrate",
    "install",
    "patch_timm",
    "register_adapter",
    "remove",
    "supported_models",
    "uninstall",
]
