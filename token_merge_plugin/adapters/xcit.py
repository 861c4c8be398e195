"""Adapter for timm's xcit.py: attention between channels, over all tokens, and convolutions between patches.

The convolutions need the full grid, and cost little. Tokens are merged for the attention before them, and once more
for the MLP behind them, when the neighbours of each patch have had their say.
"""

from typing import Any

import timm.models.xcit as xcit
import torch.nn.functional as F
from torch import Tensor

from token_merge_plugin.adapters.base import (
    GridAdapter,
    PatchedAttention,
    PatchedGridBlock,
    attend_by_parts,
    register_adapter,
)


class MergingXCA(PatchedAttention):
    """timm's `XCA`, whose products of channels are sums over the tokens."""

    parts = ("qkv", "attn_drop", "proj", "proj_drop")
    reads = ("num_heads", "temperature")

    def merged_forward(self: Any, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, K, 3, H, D]
        query, key, value = qkv.permute(2, 0, 3, 4, 1)  # [B, H, D, K]
        plan = self._token_merge.plan
        if plan.config.proportional_attention:
            # The root, because it comes into each product twice, and squared into the norms: a token then counts as
            # often as the patches that it stands for.
            root = plan.current().merged.size.sqrt()[:, None, None, :].to(x.dtype)
            query, key = query * root, key * root
        query, key = F.normalize(query, dim=-1) * self.temperature, F.normalize(key, dim=-1)
        out = attend_by_parts(self, query, key, value, scale=1.0)
        return self.proj_drop(self.proj(out.permute(0, 3, 1, 2).flatten(2)))


class MergingXCABlock(PatchedGridBlock):
    """timm's `XCABlock`."""

    parts = ("norm1", "attn", "drop_path1", "norm3", "local_mp", "drop_path3", "norm2", "mlp", "drop_path2")
    reads = ("gamma1", "gamma2", "gamma3")

    def forward(self: Any, x: Tensor, H: int, W: int) -> Tensor:
        x = self.update_fewer(x, (H, W), lambda x: self.drop_path1(self.gamma1 * self.attn(self.norm1(x))))
        x = x + self.drop_path3(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        return self.update_fewer(
            x, (H, W), lambda x: self.drop_path2(self.gamma2 * self.mlp(self.norm2(x))), attends=False
        )


@register_adapter(xcit.Xcit)
class XcitAdapter(GridAdapter):
    """Everything that timm builds from `Xcit`; its class attention sees the full grid."""

    family = "XCiT"
    timm_modules = ("xcit",)
    example = "xcit_tiny_12_p16_224"
    reduces = "tokens, in cross-covariance attention and MLP"
    restores = "behind each of the two"
    known_blocks = {xcit.XCABlock: MergingXCABlock}
    known_attention = {xcit.XCA: MergingXCA}
