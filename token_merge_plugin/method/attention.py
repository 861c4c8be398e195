"""Attention over tokens that stand for several patches each: pure tensor functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    log_size: Tensor | None = None,
    dropout: float = 0.0,
    fused: bool = True,
    softmax: Callable[[Tensor], Tensor] | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return scaled dot-product attention, proportional to the tokens' sizes where these are given.

    Proportional attention adds log(size) of each key to the logits (ToMe, Bolya et al. 2023, section 3), which is
    the attention over all patches whose keys and values equal their token's.

    Args:
        query, key, value: [B, H, T, D]; the value's D may differ.
        scale: factor of the logits.
        bias: added to the logits, broadcastable to [B, H, T, T].
        log_size: [B, T], log of the number of patches that each token stands for.
        dropout: probability with which fused kernels drop an attention weight.
        fused: use torch's fused kernels; otherwise the attention matrix is built, as timm does on request.
        softmax, drop: what turns the logits into the attention matrix, and drops of it, where that is built; None for
            a plain softmax, and for nothing.

    Returns:
        [B, H, T, D] of the value.
    """
    if fused and log_size is not None and bias is None and query.is_cuda:
        # Flash attention takes no mask on CUDA. On the CPU it does, and there the mask is cheaper.
        query, key, value, channels = _size_as_channel(query, key, value, scale, log_size)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
        return out[..., :channels]
    if log_size is not None:
        log_size = log_size[:, None, None, :].to(query.dtype)
        bias = log_size if bias is None else bias + log_size
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    logits = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    weight = logits.softmax(dim=-1) if softmax is None else softmax(logits)
    return (weight if drop is None else drop(weight)) @ value


def _size_as_channel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, log_size: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Move log(size) into one more channel of the keys, against a constant one of the queries.

    Returns:
        query, key, value, padded to a common multiple of 8 channels, as flash attention asks, and the number of
        channels that the value had.
    """
    head_dim, channels = query.shape[-1], value.shape[-1]
    width = (max(head_dim + 1, channels) + 7) // 8 * 8
    one = query.new_full((1, 1, 1, 1), 1 / scale).expand(*query.shape[:3], 1)
    logs = log_size[:, None, :, None].to(key.dtype).expand(*key.shape[:3], 1)
    query = F.pad(torch.cat((query, one), dim=-1), (0, width - head_dim - 1))
    key = F.pad(torch.cat((key, logs), dim=-1), (0, width - head_dim - 1))
    return query, key, F.pad(value, (0, width - channels)), channels


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an attention mask as numbers to add: a bool mask (True: attend) becomes 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def causal_mask(tokens: int, device: torch.device) -> Tensor:
    """Return the bool mask [T, T] in which each token attends to itself and to those before it."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
