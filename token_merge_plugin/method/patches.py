"""What is known of patches, for the tokens that hold them: masks, position biases and position embeddings.

A token has the position of its representative, the patch of the crucial token that the others were merged into.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from token_merge_plugin.method.merging import take


class Merged(NamedTuple):
    """Where the image tokens of a batch stand: K tokens for N patches.

    Attributes:
        size: [B, K] float32, patches that each token stands for (0 for padding).
        token_map: [B, N], for each patch the index of the token that holds it; K if that was dropped.
        representative: [B, K], for each token the patch it stood for at the start.
    """

    size: Tensor
    token_map: Tensor
    representative: Tensor


def embedding_of_tokens(embedding: Tensor, merged: Merged) -> Tensor:
    """Take from a position embedding of the patches what belongs to the image tokens.

    Args:
        embedding: [N, D], [H, N, D] or [B, 1 or H, N, D].
        merged: where the image tokens stand.

    Returns:
        [B, 1 or H, K, D].
    """
    index = merged.representative
    if embedding.dim() == 2:
        return embedding[index].unsqueeze(1)
    if embedding.dim() == 3:
        return embedding[:, index].transpose(0, 1)
    image = torch.arange(index.shape[0], device=index.device)[:, None]
    return embedding.expand(index.shape[0], -1, -1, -1)[image, :, index].transpose(1, 2)


def position_bias_of_tokens(bias: Tensor, prefix: int, merged: Merged) -> Tensor:
    """Take from a position bias of all patches what belongs to the tokens, as queries and as keys.

    Args:
        bias: [w, H, P + N, P + N], where w divides B: the windows of an image, or 1.
        prefix: P.
        merged: where the image tokens stand.

    Returns:
        [B, H, P + K, P + K].
    """
    index = _with_prefix(merged.representative, prefix)
    tokens = bias.shape[-1]
    pair = index[:, :, None] * tokens + index[:, None, :]  # [B, P + K, P + K]
    if bias.shape[0] > 1:
        window = torch.arange(index.shape[0], device=index.device) % bias.shape[0]
        pair = pair + window[:, None, None] * tokens**2
    # One lookup in rows of heads, which lie together.
    return bias.permute(0, 2, 3, 1).flatten(0, 2)[pair].permute(0, 3, 1, 2)


def fold_mask(mask: Tensor, prefix: int, merged: Merged, proportional: bool) -> Tensor:
    """Reduce a mask over patches to the tokens that hold them.

    A query token has its representative's row. A key token counts each patch that it stands for by the mask of that
    patch: log of the sum of exp(mask), which is log(size) where the mask is 0. Without proportional attention it has
    its representative's column.

    Args:
        mask: [1 or B, 1 or H, 1 or P + N, 1 or P + N], added to the logits.
        prefix: P.
        merged: where the image tokens stand.
        proportional: count tokens by their sizes.

    Returns:
        [B, 1 or H, 1 or P + K, P + K].
    """
    batch = merged.size.shape[0]
    mask = mask.expand(batch, -1, -1, prefix + merged.token_map.shape[1])
    heads, rows = mask.shape[1], mask.shape[2]
    index = _with_prefix(merged.representative, prefix)  # [B, P + K]
    if rows > 1:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    if not proportional:
        return mask.gather(3, index[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    tokens = index.shape[1]
    holder = _with_prefix(merged.token_map, prefix)
    held = (holder[:, :, None] == torch.arange(tokens, device=index.device)).float()  # [B, P + N, P + K]
    largest = mask.float().amax(dim=3, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weight = (mask.float() - largest).exp() @ held[:, None]
    return (weight.log() + largest).to(mask.dtype)


def take_representatives(x: Tensor, prefix: int, merged: Merged) -> Tensor:
    """Take prefix tokens and one patch of each image token: [B, P + N, C] -> [B, P + K, C]."""
    return torch.cat((x[:, :prefix], take(x[:, prefix:], merged.representative)), dim=1)


def _with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Turn indices of patches [B, T] into indices of the whole sequence, prefix tokens first: [B, P + T]."""
    return torch.cat((torch.arange(prefix, device=index.device).expand(index.shape[0], -1), prefix + index), dim=1)
