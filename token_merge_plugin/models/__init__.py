"""Models that timm lacks. Importing this package registers them with timm, for `timm.create_model`."""

from token_merge_plugin.models.lvvit import LVViT, lvvit_l, lvvit_m, lvvit_s, lvvit_t

__all__ = ["LVViT", "lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]
