"""Importance of image tokens: pure tensor functions.

None of them builds the full attention matrix: all need a few query rows, so the attention itself can stay fused.
"""

import torch
from torch import Tensor


def query_row_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None = None,
    head_weight: Tensor | None = None,
    logits: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """Return the attention that each of a few queries pays to every token, mean over heads.

    With the class token as the query this is class attention (EViT, Liang et al. 2022, section 3.1).

    Args:
        query: [B, H, Q, D].
        key: [B, H, T, D].
        scale: factor of the logits.
        bias: added to the logits, broadcastable to [B, H, Q, T].
        head_weight: [H], how much each head counts; differential attention subtracts every second one. None for 1.
        logits: [B, H, Q, T], of these queries where they are known already, as those that talking heads mix; None for
            the products of queries and keys.
        value: [B, H', T, D'], with whose norms the attention is multiplied, where H' divides H: what a token adds to
            the queries. None for the attention alone.

    Returns:
        [B, Q, T] in float32, its magnitude where heads subtract each other.
    """
    if logits is None:
        logits = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    attention = logits.softmax(dim=-1, dtype=torch.float32)
    if value is not None:
        norm = torch.linalg.vector_norm(value.float(), dim=3)
        if norm.shape[1] != attention.shape[1]:
            norm = norm.repeat_interleave(attention.shape[1] // norm.shape[1], dim=1)
        attention = attention * norm.unsqueeze(2)
    if head_weight is None:
        return attention.mean(dim=1)
    return (attention * head_weight.float()[:, None, None]).mean(dim=1).abs()


def evenly_spaced(tokens: int, count: int, real: Tensor | None, device: torch.device) -> Tensor:
    """Return positions of `count` tokens, evenly spaced: [1 or B, count]; some several times where tokens are few.

    Args:
        tokens: T.
        count: how many.
        real: [B, T], false for padding, which is passed over: positions are then spaced over an image's own tokens, so
            that they do not depend on how much padding there is. None where all tokens are real.
        device: of the result.
    """
    middle = 2 * torch.arange(count, device=device)[None] + 1
    if real is None:
        return middle * tokens // (2 * count)
    nth = middle * real.sum(dim=1, keepdim=True) // (2 * count)  # [B, count], among the real tokens
    before = real.cumsum(dim=1)[:, None, :] <= nth[:, :, None]  # [B, count, T]
    return before.sum(dim=2).clamp(max=tokens - 1)


def relative_importance(attention: Tensor, size: Tensor, per_patch: bool) -> Tensor:
    """Return the attention that a patch of each token receives, as a multiple of the mean over all patches: [B, Q, T].

    Args:
        attention: [B, Q, T], that tokens receive from each of some queries; not negative.
        size: [B, T], number of patches that each token stands for, 0 for padding.
        per_patch: a token received the attention of all of its patches, as by proportional attention.
    """
    # The constant makes all tokens alike where attention is zero, as a causal mask makes it.
    attention, size = attention + 1e-12, size[:, None]
    if per_patch:
        attention = attention / size.clamp(min=1)
    mean = (attention * size).sum(dim=2, keepdim=True) / size.sum(dim=2, keepdim=True).clamp(min=1)
    return attention / mean.clamp(min=1e-12)
