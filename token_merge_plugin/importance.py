"""Importance of image tokens: pure tensor functions.

None of them builds the full attention matrix: all need one query row (a few, with several class tokens), so the
attention itself can stay fused.
"""

import torch
from torch import Tensor


def query_row_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None = None,
    head_weight: Tensor | None = None,
    head_mix: Tensor | None = None,
) -> Tensor:
    """Return the attention that a few queries pay to every token, mean over queries and heads.

    With the class token as the query this is class attention (EViT, Liang et al. 2022, section 3.1).

    Args:
        query: [B, H, Q, D].
        key: [B, H, T, D].
        scale: factor of the logits.
        bias: added to the logits, broadcastable to [B, H, Q, T].
        head_weight: [H], how much each head counts; differential attention subtracts every second one. None for 1.
        head_mix: [H, H], by which talking heads mix the logits; None for none.

    Returns:
        [B, T] in float32, its magnitude where heads subtract each other.
    """
    logits = (query * scale) @ key.transpose(-2, -1)
    if head_mix is not None:
        logits = torch.einsum("ij,bjqt->biqt", head_mix, logits)
    if bias is not None:
        logits = logits + bias
    attention = logits.softmax(dim=-1, dtype=torch.float32)
    if head_weight is not None:
        attention = attention * head_weight.float()[:, None, None]
    return attention.mean(dim=(1, 2)).abs()


def mean_query(query: Tensor, size: Tensor | None) -> Tensor:
    """Return the mean of the image tokens' queries, as one query: [B, H, T, D] -> [B, H, 1, D].

    Where the output is a mean over image tokens, their mean query stands in for the class token's.

    Args:
        query: [B, H, T, D], image tokens only.
        size: [B, T]; each token counts as often as the patches it stands for. None for 1.
    """
    if size is None:
        return query.mean(dim=2, keepdim=True)
    weight = (size / size.sum(dim=1, keepdim=True)).to(query.dtype)
    return weight[:, None, None, :] @ query
