"""Multiply-adds (MACs): counted from what really runs, and from a closed formula.

Papers on vision transformers call these FLOPs: DeiT-S has 4.6 GMACs. As there, products of matrices and
convolutions count; norms, activations, sums and sorting do not.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from token_merge_plugin.config import MergeConfig, tokens_kept
from token_merge_plugin.method.merging import NEIGHBOURS
from token_merge_plugin.method.reduction import SAMPLED_QUERIES
from token_merge_plugin.patching import apply
from token_merge_plugin.trial.measuring import Use, evaluating, forward


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor, use: Use = forward) -> int:
    """Return the multiply-adds per image of the model's forward pass, by torch's own counter.

    Args:
        model: patched or not. It is run once in eval mode, and left as it was.
        images: [B, C, H, W]; one image is enough.
        use: what is counted: `measuring.features` for all of the model's tokens.
    """
    # Without fused attention, so that its products are counted whatever the kernel is.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        use(model, images)
    return counter.flops // 2 // len(images)


class _Counter(TorchDispatchMode):
    """Counts operations by torch's own table, without `FlopCounterMode`'s account of modules: about twice as fast."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result


def equal_compute(model: nn.Module, image: Tensor, base: MergeConfig, target: int, use: Use = forward) -> MergeConfig:
    """Return a config, with the keep rate that costs as many multiply-adds as asked for.

    Token counts are whole numbers, so the target is met to within a token or so in each stage; or not at all, where the
    config's stages cannot leave so little.

    Args:
        model: a supported model; it is left patched by the config.
        image: [1, C, H, W].
        base: the config, whose keep rate, a float, is the first guess.
        target: multiply-adds per image, as `count_macs` counts them.
        use: for which they are counted.

    Raises:
        ConfigError: the config does not fit the model.
    """

    def macs(rate: float) -> int:
        return count_macs(apply(model, replace(base, keep_rate=rate)), image, use)

    low, high = (0.01, macs(0.01)), (1.0, macs(1.0))  # keep rates below and above, with their multiply-adds
    rate = base.keep_rate if isinstance(base.keep_rate, float) else 0.7
    best = (math.inf, rate)
    for _ in range(12):
        counted = macs(rate)
        best = min(best, (abs(counted - target), rate))
        if best[0] <= 0.001 * target:
            break
        low, high = (low, (rate, counted)) if counted > target else ((rate, counted), high)
        # Nearly linear in the rate; kept off the ends, towards which a straight line would creep.
        share = (target - low[1]) / max(1, high[1] - low[1])
        rate = low[0] + min(0.95, max(0.05, share)) * (high[0] - low[0])
    config = replace(base, keep_rate=best[1])
    apply(model, config)
    return config


def vit_macs(
    *,
    num_patches: int,
    embed_dim: int,
    depth: int,
    schedule: Mapping[int, float] | None = None,
    num_prefix_tokens: int = 1,
    num_class_tokens: int = 1,
    mlp_ratio: float = 4.0,
    patch_dim: int = 3 * 16 * 16,
    num_classes: int = 1000,
) -> int:
    """Return the multiply-adds per image of a plain ViT, patched with the default options, in closed form.

    With T tokens of C channels, prefix tokens included, a block costs T (4 C^2 + 2 r C^2) for its matrices and
    2 T^2 C for its attention. A stage compares N image tokens with each other (N^2 C), computes some rows of attention
    (T C each), and merges M of the tokens into K (K M C). Where a class token is read, the last block leaves out image
    tokens behind its attention. Where none is, the grid is restored: for each of the M tokens, n neighbours are
    compared with each other, with it and with the token that took it (M n (n + 2) C), equations solved in four steps
    (6 M n^2), and 1 + n updates mixed for each of the two (2 M (1 + n) C).

    Args:
        num_patches: image tokens at the input.
        embed_dim: C.
        depth: number of blocks.
        schedule: {block index: keep rate}, as `MergeConfig.amounts` returns it; none for the unpatched model.
        num_prefix_tokens: tokens that are never merged.
        num_class_tokens: of these, class and distillation tokens.
        mlp_ratio: r, hidden channels of the MLP to C.
        patch_dim: numbers in a patch: channels times patch height times patch width.
        num_classes: outputs of the head, which reads one token.
    """
    schedule = schedule or {}
    macs = num_patches * patch_dim * embed_dim + embed_dim * num_classes
    patches = num_patches
    for block in range(depth):
        tokens = num_prefix_tokens + patches
        macs += 4 * tokens * embed_dim**2 + 2 * tokens**2 * embed_dim
        unread = schedule and num_class_tokens and block == depth - 1
        keep = 0 if unread else tokens_kept(patches, schedule.get(block, 1.0))
        if keep < patches and not unread:
            queries = num_class_tokens + SAMPLED_QUERIES
            gone = patches - keep
            macs += (patches**2 + keep * gone + queries * tokens) * embed_dim
            if not num_class_tokens:
                near = min(NEIGHBOURS, keep - 1)
                macs += gone * ((near * (near + 2) + 2 * (1 + near)) * embed_dim + 6 * near**2)
        patches = keep
        macs += round(2 * mlp_ratio * (num_prefix_tokens + patches) * embed_dim**2)
    return macs
