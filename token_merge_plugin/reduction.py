"""A stage: from what an attention layer saw to fewer tokens. Joins the state of a pass to the pure tensor functions."""

import torch
from torch import Tensor

from token_merge_plugin.config import tokens_kept
from token_merge_plugin.importance import mean_query, query_row_attention
from token_merge_plugin.merging import (
    Assignment,
    cosine_similarity,
    follow,
    match,
    merge,
    restore,
    select,
    split,
    take,
)
from token_merge_plugin.multiscale import fuse
from token_merge_plugin.state import Evidence, Merged, Pass, Plan


def reduce_tokens(plan: Plan, state: Pass, x: Tensor, block: int) -> Tensor:
    """Merge image tokens down to the count of a stage, and note in the pass where they went.

    Args:
        plan: the model's plan.
        state: the pass under way; takes the new sizes and token map, gives up its evidence.
        x: [B, P + T, C], prefix and image tokens.
        block: index of the stage's block.

    Returns:
        [B, P + K, C].
    """
    prefix = plan.num_prefix_tokens
    image_tokens = x[:, prefix:]
    keep = tokens_kept(image_tokens.shape[1], plan.schedule[block])
    evidence, state.evidence = state.evidence, []
    if keep >= image_tokens.shape[1]:
        return x
    with torch.no_grad():
        before = state.merged or _unmerged(plan, image_tokens, evidence)
        assignment = _assign(plan, state, before, image_tokens, evidence, keep)
    merged_tokens, size = merge(image_tokens, before.size, assignment)
    token_map = follow(before.token_map, assignment)
    state.merged = Merged(size, token_map, before.representative.gather(1, assignment.crucial))
    return torch.cat((x[:, :prefix], merged_tokens), dim=1)


def _unmerged(plan: Plan, image_tokens: Tensor, evidence: list[Evidence]) -> Merged:
    """Return the state before any merge: each patch its own token, of size 0 where no other token may see it."""
    batch, patches, _ = image_tokens.shape
    device = image_tokens.device
    size = torch.ones(batch, patches, device=device)
    bias = evidence[0].bias
    if bias is not None:
        visible = (bias > float("-inf")).expand(-1, -1, bias.shape[-1], -1).clone()
        visible.diagonal(dim1=2, dim2=3).fill_(False)
        size = size * visible.any(dim=2).any(dim=1)[:, plan.num_prefix_tokens :]
    identity = torch.arange(patches, device=device).expand(batch, -1)
    return Merged(size, identity, identity)


def _assign(
    plan: Plan, state: Pass, before: Merged, image_tokens: Tensor, evidence: list[Evidence], keep: int
) -> Assignment:
    """Decide which image tokens stay, and which of them takes each of the others."""
    similarity = cosine_similarity(_descriptors(plan, state, before, image_tokens, evidence))
    importance = _importance(plan, state, before, evidence).masked_fill(before.size == 0, -1)
    crucial, rest = select(similarity, importance, keep) if plan.config.distinctiveness else split(importance, keep)
    return Assignment(crucial, rest, match(similarity, crucial, rest, before.size))


def _importance(plan: Plan, state: Pass, before: Merged, evidence: list[Evidence]) -> Tensor:
    """Return the importance of the image tokens [B, T], in float32."""
    if not plan.class_queries and not plan.mean_query:
        return torch.ones_like(before.size)
    prefix = plan.num_prefix_tokens
    log_size = plan.log_size(state)
    scores = []
    for seen in evidence:
        queries, bias = seen.query[:, :, : plan.class_queries], seen.bias
        if bias is None and log_size is not None:
            bias = log_size[:, None, None, :]
        elif bias is not None and bias.shape[2] > 1:
            # What no query may see, the mean query does not see either.
            bias = torch.cat((bias[:, :, : plan.class_queries], bias.amax(dim=2, keepdim=True)), dim=2)
            bias = bias if plan.mean_query else bias[:, :, :-1]
        if plan.mean_query:
            mean = mean_query(seen.query[:, :, prefix:], before.size if state.merged else None)
            queries = torch.cat((queries, mean), dim=2)
        scores.append(query_row_attention(queries, seen.key, seen.scale, bias, seen.head_weight))
    score = torch.stack(scores).mean(dim=0)[:, prefix:]
    score = _multi_scale("importance", plan, state, before, score[:, :, None])[:, :, 0]
    # The root keeps the few tokens on which attention piles up from outweighing distinctiveness. The constant lets
    # distinctiveness decide where attention is zero, as a causal mask makes it.
    return (score + 1e-12).sqrt()


def _descriptors(plan: Plan, state: Pass, before: Merged, image_tokens: Tensor, evidence: list[Evidence]) -> Tensor:
    """Return what tokens are compared by: [B, T, D]."""
    kind = plan.config.similarity
    if kind == "tokens":
        descriptors = image_tokens
    else:
        layers = [seen.key if kind == "keys" else seen.value for seen in evidence]
        descriptors = torch.cat([x[:, :, plan.num_prefix_tokens :].transpose(1, 2).flatten(2) for x in layers], dim=2)
    return _multi_scale("descriptors", plan, state, before, descriptors)


def _multi_scale(where: str, plan: Plan, state: Pass, before: Merged, features: Tensor) -> Tensor:
    """Fuse features [B, T, D] over the scales of the patch grid, if the config asks for it here.

    Where there is no full grid (patch dropout in training), features stay as they are.
    """
    grid = state.grid_size
    if plan.config.multi_scale != where or grid is None or grid[0] * grid[1] != state.num_patches:
        return features
    return take(fuse(restore(features, before.token_map), grid), before.representative)
