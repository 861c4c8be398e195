"""A stage: from what an attention layer saw to fewer tokens. Joins the state of a pass to the pure tensor functions."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from token_merge_plugin.config import DROPPING, Amount, tokens_kept
from token_merge_plugin.errors import ConfigError
from token_merge_plugin.method.importance import evenly_spaced, query_row_attention, relative_importance
from token_merge_plugin.method.merging import (
    NEIGHBOURS,
    Assignment,
    Undo,
    assign,
    bipartite,
    bipartite_rounds,
    cell_side,
    cells,
    cosine_similarity,
    drop,
    follow,
    fuse_rest,
    interpolation,
    keep_best,
    merge,
    merge_cost,
    pseudo_random,
    restore,
    take,
    windows,
    without_diagonal,
)
from token_merge_plugin.method.multiscale import MultiScaleFusion, fuse
from token_merge_plugin.method.state import Evidence, Merged, Pass, Plan, record

# Masks hide by -inf or by a large negative number, such as the smallest of their dtype: -65504 in float16.
HIDDEN = -1e4
# So many image tokens are asked what they attend to. More of them were no better on models trained on Fashion-MNIST.
SAMPLED_QUERIES = 16
# Importance is a power of the attention received, relative to the mean. In large pretrained ViTs attention piles up on
# a few tokens that say little, so it counts for little.
CLASS_POWER = 0.25
IMAGE_POWER, IMAGE_FACTOR = 0.5, 0.7
# PPT prunes the tokens of an image whose scores, with a sum of 1, have a larger variance. As far as is known this is
# the paper's threshold for DeiT-S, which has 196 image tokens.
PPT_THRESHOLD = 6e-5

# Tokens [B, K, C], their sizes [B, K], and where they came from.
Reduced: TypeAlias = tuple[Tensor, Tensor, Assignment]


class Stage(NamedTuple):
    """What a method of reduction is given.

    Attributes:
        plan: the model's plan.
        state: the pass under way.
        block: index of the stage's block.
        tokens: [B, T, C], the image tokens.
        before: where they stand.
        evidence: what the block's attention layers saw.
    """

    plan: Plan
    state: Pass
    block: int
    tokens: Tensor
    before: Merged
    evidence: list[Evidence]

    @property
    def amount(self) -> Amount:
        return self.plan.schedule[self.block]

    @property
    def real(self) -> Tensor | None:
        """Which tokens are no padding, [B, T], or None where all are."""
        return None if self.evidence[0].bias is None else self.before.size > 0


def reduce_tokens(plan: Plan, state: Pass, x: Tensor, block: int) -> Tensor:
    """Reduce image tokens to the count of a stage, and note in the pass where they went.

    Args:
        plan: the model's plan.
        state: the pass under way; takes the new sizes and token map, gives up its evidence.
        x: [B, P + T, C], prefix and image tokens.
        block: index of the stage's block.

    Returns:
        [B, P + K, C].
    """
    prefix = state.num_prefix_tokens
    image_tokens = x[:, prefix:].contiguous()  # once, for all that take of them
    evidence, state.evidence = state.evidence, []
    if tokens_kept(image_tokens.shape[1], plan.schedule[block]) >= image_tokens.shape[1]:
        return x
    with torch.no_grad():
        before = state.merged or _unmerged(state, image_tokens, evidence)
    stage = Stage(plan, state, block, image_tokens, before, evidence)
    tokens, size, assignment = METHODS[plan.config.method](stage)
    if state.reads_grid and plan.config.method not in DROPPING:
        with torch.no_grad():
            sources, shares = interpolation(image_tokens, tokens, assignment, stage.real)
        state.merges = (*state.merges, Undo(image_tokens, tokens, assignment, before.token_map, sources, shares))
    token_map = follow(before.token_map, assignment)
    state.merged = Merged(size, token_map, before.representative.gather(1, assignment.crucial))
    record(block, state)
    return torch.cat((x[:, :prefix], tokens), dim=1)


def fuse_scales(state: Pass, x: Tensor, fusion: MultiScaleFusion) -> Tensor:
    """Fuse learned multi-scale features into the image tokens of x [B, P + N, C], which are still on their full grid.

    Where there is no full grid (patch dropout in training), tokens stay as they are.
    """
    prefix, grid = state.num_prefix_tokens, state.grid_size
    if grid is None or grid[0] * grid[1] != state.num_patches:
        return x
    return torch.cat((x[:, :prefix], fusion(x[:, prefix:], grid)), dim=1)


def _merge(stage: Stage) -> Reduced:
    """Merge the tokens with which the least is lost, weighed by their importance."""
    with torch.no_grad():
        weight = stage.before.size * _importance(stage)
        neighbours = NEIGHBOURS if stage.state.reads_grid else 0
        assignment = assign(merge_cost(_descriptors(stage), weight), stage.amount, stage.real, neighbours)
    return *merge(stage.tokens, stage.before.size, assignment, keep_norms=True), assignment


def _tome(stage: Stage) -> Reduced:
    """Merge as ToMe does, by the keys' mean over heads."""
    _check_no_mask(stage)
    tokens = stage.tokens.shape[1]
    keep = max(tokens_kept(tokens, stage.amount), tokens - tokens // 2)
    with torch.no_grad():
        assignment = bipartite(_mean_keys(stage), keep, stage.state.num_prefix_tokens)
    return *merge(stage.tokens, stage.before.size, assignment), assignment


def _evit(stage: Stage) -> Reduced:
    """Keep the tokens that the class token attends to, and fuse the rest into one."""
    with torch.no_grad():
        attention = _class_attention(stage)
        assignment = keep_best(attention, stage.amount, stage.real, fuse=True)
    return *fuse_rest(stage.tokens, stage.before.size, assignment, attention), assignment


def _ppt(stage: Stage) -> Reduced:
    """Drop or merge, image by image, as told by the variance of the tokens' scores (PPT, Wu et al. 2023).

    As understood from the paper: a score is the class token's attention, mean over heads, times the norm of the token's
    value over all heads, and the scores of an image have a sum of 1. Where their variance is large, the tokens'
    importance is well told apart, and those with the lowest scores are dropped; where it is small, tokens are merged
    as in ToMe. Both leave the same number. Of the paper's schedules only three stages are taken; the order of the
    tokens that are kept, and merging in several rounds where more than half are to go, are not from it.
    """
    _check_no_mask(stage)
    keep, prefix = tokens_kept(stage.tokens.shape[1], stage.amount), stage.state.num_prefix_tokens
    with torch.no_grad():
        pool = bipartite_rounds(_mean_keys(stage), stage.before.size, keep, prefix)
        values = torch.cat([seen.value[:, :, prefix:] for seen in stage.evidence], dim=1)
        score = _class_attention(stage) * torch.linalg.vector_norm(values.float(), dim=(1, 3))
        score = score / score.sum(dim=1, keepdim=True)
        prune = keep_best(score, stage.amount)
        apart = score.var(dim=1, keepdim=True) > PPT_THRESHOLD
        assignment = Assignment(*(torch.where(apart, *parts) for parts in zip(prune[:3], pool[:3], strict=True)))
    return *merge(stage.tokens, stage.before.size, assignment), assignment  # a dropped token is merged into none


def _prune(stage: Stage) -> Reduced:
    """Keep the tokens that the class token attends to, and drop the rest."""
    with torch.no_grad():
        assignment = keep_best(_class_attention(stage), stage.amount, stage.real)
    return *drop(stage.tokens, stage.before.size, assignment), assignment


def _random(stage: Stage) -> Reduced:
    """Keep tokens in a pseudo-random order of the patches, and drop the rest."""
    score = pseudo_random(stage.before.representative, stage.block)
    assignment = keep_best(score, stage.amount, stage.real)
    return *drop(stage.tokens, stage.before.size, assignment), assignment


# What each method does with a stage, by its name in `MergeConfig`.
METHODS: dict[str, Callable[[Stage], Reduced]] = {
    "merge": _merge,
    "tome": _tome,
    "late_tome": _tome,
    "evit": _evit,
    "ppt": _ppt,
    "prune": _prune,
    "random": _random,
}


def merge_within(
    tokens: Tensor, grid_size: tuple[int, int], keep_rate: float, apart: Tensor | None = None
) -> tuple[Tensor, Merged]:
    """Merge tokens on entry to a block, cell by cell, chosen by their similarity alone.

    What attention is about to see is not known yet. Norms of the tokens, their distance from the mean of the window
    and stand-ins for attention were tried as importance, and were no better.

    Args:
        tokens: [W, T, C], windows of the grid, or whole grids.
        grid_size: (height, width) of a window, whose product is T.
        keep_rate: share of the tokens of each cell that stays.
        apart: [w, T, T], true for pairs that are not to be merged, where w divides W: the windows of an image.

    Returns:
        [W, K, C], and where the tokens went.
    """
    count, _, channels = tokens.shape
    index = cells(*grid_size, device=tokens.device)  # [n, t]
    number, inside = index.shape
    tokens = windows(tokens.reshape(count, *grid_size, channels), *map(cell_side, grid_size))  # [W * n, t, C]
    with torch.no_grad():
        cost = 1 - cosine_similarity(tokens)
        if apart is not None:
            pairs = apart[:, index[:, :, None], index[:, None, :]].flatten(0, 1)  # [w * n, t, t]
            images = cost.shape[0] // pairs.shape[0]
            by_image = cost.reshape(images, pairs.shape[0], inside, inside)
            cost = by_image.masked_fill(pairs, 2).reshape(cost.shape)
        assignment = assign(without_diagonal(cost), keep_rate)
    size = torch.ones(tokens.shape[0], inside, dtype=torch.float32, device=tokens.device)
    merged_tokens, size = merge(tokens, size, assignment)
    keep = size.shape[1]
    cell = torch.arange(number, device=tokens.device)[:, None]
    token_map = follow(torch.arange(inside, device=tokens.device).expand(tokens.shape[0], -1), assignment)
    token_map = (token_map.reshape(count, number, inside) + cell * keep).reshape(count, number * inside)
    token_map = token_map[:, index.flatten().argsort()]
    representative = index[cell, assignment.crucial.reshape(count, number, keep)].reshape(count, number * keep)
    return (
        merged_tokens.reshape(count, number * keep, channels),
        Merged(size.reshape(count, number * keep), token_map, representative),
    )


def _unmerged(state: Pass, image_tokens: Tensor, evidence: list[Evidence]) -> Merged:
    """Return the state before any merge: each patch its own token, of size 0 where it is padding."""
    batch, patches, _ = image_tokens.shape
    device = image_tokens.device
    size = torch.ones(batch, patches, dtype=torch.float32, device=device)
    bias = evidence[0].bias
    if bias is not None:
        sees = bias > HIDDEN  # [1 or B, 1 or H, 1 or P + N, P + N]
        real = sees.any(dim=2)
        if sees.shape[2] > 1:
            itself = sees.diagonal(dim1=2, dim2=3).clone()
            sees.diagonal(dim1=2, dim2=3).fill_(False)
            # Where a mask lets every token see itself, padding sees no other. The last patch of a causal mask does.
            forced = itself.all(dim=2, keepdim=True) & ~sees.any(dim=3)
            real = sees.any(dim=2) | (itself & ~forced)
        size = size * real.any(dim=1)[:, state.num_prefix_tokens :]
    identity = torch.arange(patches, device=device).expand(batch, -1)
    return Merged(size, identity, identity)


def _importance(stage: Stage) -> Tensor:
    """Return the importance of the image tokens [B, T], relative to the mean of the image, in float32.

    It is the larger of two powers: of the attention of the class token (1 where there is none), and of that of some
    image tokens. That these attend to a token is a reason to keep it, but that they do not is none to merge it.
    """
    plan, size = stage.plan, stage.before.size
    kind, classes = plan.config.importance, plan.num_class_tokens
    if kind == "uniform":
        return torch.ones_like(size)
    rows = _class_rows(stage)
    if kind == "auto":
        rows = torch.cat((rows.expand(size.shape[0], -1), _image_rows(stage).expand(size.shape[0], -1)), dim=1)
    received = _attention_received(stage, rows, values=True)
    groups = [group.mean(dim=1) for group in (received[:, :classes], received[:, classes:]) if group.shape[1]]
    relative = relative_importance(torch.stack(groups, dim=1), size, plan.config.proportional_attention)
    importance = relative[:, 0] ** CLASS_POWER if classes else torch.ones_like(size)
    if kind == "auto":
        importance = torch.maximum(importance, IMAGE_FACTOR * relative[:, -1] ** IMAGE_POWER)
    if plan.config.multi_scale == "importance":
        return _multi_scale(stage, importance[:, :, None])[:, :, 0]
    return importance


def _class_attention(stage: Stage) -> Tensor:
    """Return the attention that the image tokens receive from the class tokens: [B, T], in float32."""
    return _attention_received(stage, _class_rows(stage)).mean(dim=1)


def _class_rows(stage: Stage) -> Tensor:
    """Return the positions of the class tokens: [1, Q]."""
    return torch.arange(stage.plan.num_class_tokens, device=stage.tokens.device)[None]


def _image_rows(stage: Stage) -> Tensor:
    """Return the positions of some image tokens, evenly spaced: [1 or B, Q]."""
    tokens = stage.tokens
    return stage.state.num_prefix_tokens + evenly_spaced(tokens.shape[1], SAMPLED_QUERIES, stage.real, tokens.device)


def _attention_received(stage: Stage, rows: Tensor, values: bool = False) -> Tensor:
    """Return the attention that the image tokens receive [B, Q, T], in float32.

    Args:
        stage: the stage.
        rows: [1 or B, Q], positions of the tokens from which.
        values: count it by the norms of the values.
    """
    plan, state = stage.plan, stage.state
    prefix, batch = state.num_prefix_tokens, stage.tokens.shape[0]
    rows = rows.expand(batch, -1)
    log_size = plan.log_size(state)
    scores = []
    for seen in stage.evidence:
        queries, bias = take(seen.query.transpose(1, 2), rows).transpose(1, 2), seen.bias  # [B, H, Q, D]
        if bias is None and log_size is not None:
            bias = log_size[:, None, None, :]
        elif bias is not None and bias.shape[2] > 1:
            bias = take(bias.expand(batch, -1, -1, -1).transpose(1, 2), rows).transpose(1, 2)
        logits = None if seen.logits is None else take(seen.logits.transpose(1, 2), rows).transpose(1, 2)
        value = seen.value if values else None
        scores.append(query_row_attention(queries, seen.key, seen.scale, bias, seen.head_weight, logits, value))
    received = scores[0] if len(scores) == 1 else torch.stack(scores).mean(dim=0)
    return received[:, :, prefix:]


def _check_no_mask(stage: Stage) -> None:
    if stage.evidence[0].bias is not None:
        method = stage.plan.config.method
        raise ConfigError(f"method={method!r} is not defined with an attention mask. Choose method='merge'.")


def _mean_keys(stage: Stage) -> Tensor:
    """Return the keys' mean over heads, by which ToMe compares tokens: [B, T, D]."""
    prefix = stage.state.num_prefix_tokens
    return torch.cat([seen.key[:, :, prefix:].mean(dim=1) for seen in stage.evidence], dim=2)


def _descriptors(stage: Stage) -> Tensor:
    """Return what tokens are compared by: [B, T, D]."""
    kind = stage.plan.similarity
    if kind == "tokens":
        descriptors = stage.tokens
    elif kind == "mean_keys":
        descriptors = _mean_keys(stage)
    else:
        layers = [seen.key if kind == "keys" else seen.value for seen in stage.evidence]
        prefix = stage.state.num_prefix_tokens
        descriptors = torch.cat([x[:, :, prefix:].transpose(1, 2).flatten(2) for x in layers], dim=2)
    return _multi_scale(stage, descriptors) if stage.plan.config.multi_scale == "descriptors" else descriptors


def _multi_scale(stage: Stage, features: Tensor) -> Tensor:
    """Fuse features [B, T, D] over the scales of the patch grid.

    Where there is no full grid (patch dropout in training), features stay as they are.
    """
    grid, before = stage.state.grid_size, stage.before
    if grid is None or grid[0] * grid[1] != stage.state.num_patches:
        return features
    return take(fuse(restore(features, before.token_map), grid), before.representative)
