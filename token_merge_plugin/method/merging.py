"""The method in pure tensor functions: split tokens into crucial and non-crucial ones, match, merge, restore.

After Bian et al., "Multi-Scale And Token Mergence: Make Your ViT More Efficient" (arXiv 2306.04897): image tokens
are scored, the best K of them are crucial, and every other one is merged into a crucial token, so that nothing is
thrown away. Scored and matched is by what a merge loses: the criterion of Ward's agglomerative clustering.

Tensors have the layout [batch, tokens, channels]. The functions see image tokens only: prefix tokens (class,
distillation, register) are kept apart by the caller. Every shape follows from the shapes given, never from values.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from token_merge_plugin.config import tokens_kept

# So often `assign` looks for the tokens that go. Two rounds lose 2 to 4 % (relative error of a pretrained ViT-S:
# examples/results/dense.md), and a fourth changes next to nothing.
ROUNDS = 3
# More than any merge costs, and yet many times of it are a float.
PROHIBITIVE = 1e30
# So many tokens besides the one that takes it say how the updates of a token would differ. Relative error of a
# pretrained ViT-S's patch tokens: without any 8 to 12 % more, with four 1 to 2 %, with twelve no less
# (examples/results/dense.md).
NEIGHBOURS = 8
# Keeps steps short where neighbours lie closer to the merged token than what is to be made of them.
RIDGE = 0.1


class Assignment(NamedTuple):
    """Which tokens stay, and into which of them the others go, out of T = K + M tokens.

    Attributes:
        crucial: [B, K], indices of the tokens that stay, in their new order.
        rest: [B, M], indices of the others.
        target: [B, M], for each of `rest`, the position in `crucial` of the token that takes it; K if it is dropped.
        neighbours: [B, M, n], for each of `rest`, the positions of those that would take it next; None if nobody asked.
    """

    crucial: Tensor
    rest: Tensor
    target: Tensor
    neighbours: Tensor | None = None


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Take tokens by their indices, image by image: [B, T, ...] and [B, K] -> [B, K, ...]."""
    image = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    if tokens.dim() > 3:
        return tokens[image, index]
    # Copies whole rows, unlike gather; and on a CPU its gradients take a fraction of the time of those of indexing.
    return F.embedding(index + image * tokens.shape[1], tokens.flatten(0, 1))


def cosine_similarity(descriptors: Tensor) -> Tensor:
    """Return the cosine of every pair of descriptors: [B, T, D] -> [B, T, T]."""
    normalised = F.normalize(descriptors, dim=-1)
    return normalised @ normalised.transpose(1, 2)


def merge_cost(descriptors: Tensor, weight: Tensor) -> Tensor:
    """Return what merging each pair of tokens would lose (Ward 1963): [B, T, D] and [B, T] -> [B, T, T], in float32.

    Merging tokens a and b of weights n and m into their mean adds n m / (n + m) |a - b|^2 to the squared error of what
    they stand for. No token merges with itself: the diagonal is prohibitive.

    Args:
        descriptors: what tokens are compared by.
        weight: how much each token counts, such as the number of patches that it stands for; 0 for padding.
    """
    with _without_autocast(descriptors):
        centred = descriptors.float()
        centred = centred - centred.mean(dim=1, keepdim=True)  # smaller numbers lose less in their differences
        square = torch.linalg.vector_norm(centred, dim=2).square()
        half = torch.baddbmm(square.unsqueeze(1), centred, centred.transpose(1, 2), alpha=-1)
    # Of two tokens that are nearest to each other, rounding is not to decide which one goes.
    cost = half + half.transpose(1, 2)
    # In place: matrices of all pairs are made and written as seldom as can be.
    inverse = weight.float().reciprocal()
    cost.clamp_(min=0).div_(inverse.unsqueeze(2) + inverse.unsqueeze(1))
    return without_diagonal(cost)


def _without_autocast(like: Tensor) -> AbstractContextManager:
    device = like.device.type
    # There is no autocast on the meta device.
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def without_diagonal(cost: Tensor) -> Tensor:
    """Make the diagonal of the cost [B, T, T] prohibitive, in place, and return it: no token merges with itself."""
    return cost.add_(torch.eye(cost.shape[1], dtype=torch.float32, device=cost.device), alpha=PROHIBITIVE)


def assign(cost: Tensor, keep_rate: float, real: Tensor | None = None, neighbours: int = 0) -> Assignment:
    """Decide which tokens stay, and which of them takes each of the others.

    Dispensable is the token whose cheapest merge into a token that stays costs least; it goes into that token. Which
    ones stay is not known beforehand, so tokens are first compared with all that are dearer to merge, and then, as
    often as `ROUNDS` says, with those that would stay by that: a token whose twin goes itself would lose its double.
    That comes close to merging the cheapest pair again and again, in a few operations on matrices.

    Args:
        cost: [B, T, T], of merging each pair; infinite for pairs that are not to be merged.
        keep_rate: K = ceil(keep_rate * T) tokens stay.
        real: [B, T], false for padding; None where all tokens are real. An image then keeps that share of its own
            real tokens, however much padding there is, and padding fills the places that are left.
        neighbours: of so many the assignment tells, or of all where there are fewer; 0 for none.
    """
    tokens = cost.shape[1]
    goes: Tensor | int = tokens - tokens_kept(tokens, keep_rate)
    number = goes
    if real is not None:
        cost = cost.masked_fill(real[:, :, None] != real[:, None, :], math.inf)
        quota = _quota(real, keep_rate)
        goes = real.sum(dim=1, keepdim=True) - quota
    # Two tokens that are nearest to each other cost the same: the first of them is to be cheaper.
    tie = 1 + 1e-6 * torch.arange(tokens, dtype=torch.float32, device=cost.device)
    order = _order(cost, tie, real)
    for round_ in range(ROUNDS):
        place = _inverse(order)
        if round_ > 0:  # a token that stays is compared with dearer ones that do, any other with all that stay
            place = place.masked_fill(place < goes, -1)
        # By arithmetic, for matrices of bools take several times as long; and in place, for a large matrix takes longer
        # to make than to fill.
        dear = place.float() * PROHIBITIVE
        bar = (dear + PROHIBITIVE / 2).unsqueeze(2) - dear.unsqueeze(1)
        order = _order(bar.clamp_(min=cost), tie, real)
    if real is not None:
        place = _inverse(order).masked_fill(~real, -1)
        order = (_with_padding(place, quota, real) * tokens + place).argsort(dim=1)  # and then as before
    rest, stay = order[:, :number], order[:, number:].sort(dim=1).values
    return Assignment(stay, rest, *match(cost, stay, rest, neighbours))


def _order(cost: Tensor, tie: Tensor, real: Tensor | None) -> Tensor:
    """Return the indices of the tokens by what their cheapest merges cost, times `tie` [T], padding last: [B, T]."""
    # OpenVINO 2026.4 joins a reduction and the product with a constant behind it, wrongly from two images on. It does
    # not where the dimension is kept at first.
    cheapest = cost.amin(dim=2, keepdim=True).squeeze(2) * tie
    if real is not None:
        cheapest = cheapest.masked_fill(~real, math.inf)
    return cheapest.argsort(dim=1)


def bipartite(descriptors: Tensor, keep: int, num_prefix_tokens: int) -> Assignment:
    """Decide which tokens are merged by bipartite soft matching (ToMe, Bolya et al. 2023, section 3).

    Tokens at even positions of the whole sequence are matched each to the most similar one at an odd position, and
    the best pairs merge. The new order is that of the paper's algorithm: the even tokens that are left, then the odd
    ones.

    Args:
        descriptors: [B, T, D], of the image tokens.
        keep: K tokens stay, at least half of T.
        num_prefix_tokens: tokens in front, which count as positions and are protected.
    """
    batch, tokens, _ = descriptors.shape
    normalised = F.normalize(descriptors, dim=-1)
    position = torch.arange(tokens, device=descriptors.device).expand(batch, -1)
    first = num_prefix_tokens % 2
    even, odd = position[:, first::2], position[:, 1 - first :: 2]
    similarity = normalised[:, first::2] @ normalised[:, 1 - first :: 2].transpose(1, 2)
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True)
    merged = tokens - keep
    source, unmerged = order[:, :merged], order[:, merged:].sort(dim=1).values
    crucial = torch.cat((even.gather(1, unmerged), odd), dim=1)
    return Assignment(crucial, even.gather(1, source), unmerged.shape[1] + partner.gather(1, source))


def bipartite_rounds(descriptors: Tensor, size: Tensor, keep: int, num_prefix_tokens: int) -> Assignment:
    """Merge by bipartite soft matching until `keep` tokens are left; more than half of them go in several rounds.

    Args:
        descriptors: [B, T, D], of the image tokens.
        size: [B, T], by which the descriptors of merged tokens are weighed in the next round.
        keep, num_prefix_tokens: as in `bipartite`, but any number of tokens may stay.
    """
    tokens = descriptors.shape[1]
    left = max(keep, tokens - tokens // 2)
    first = bipartite(descriptors, left, num_prefix_tokens)
    if left == keep:
        return first
    then = bipartite_rounds(*merge(descriptors, size, first), keep, num_prefix_tokens)
    return Assignment(
        first.crucial.gather(1, then.crucial),
        torch.cat((first.crucial.gather(1, then.rest), first.rest), dim=1),
        torch.cat((then.target, follow(first.target, then)), dim=1),
    )


def keep_best(score: Tensor, keep_rate: float, real: Tensor | None = None, fuse: bool = False) -> Assignment:
    """Keep the tokens with the best scores, and drop the rest, or fuse it (EViT, Liang et al. 2022, section 3.2).

    Args:
        score: [B, T], not negative.
        keep_rate: ceil(keep_rate * T) tokens are kept.
        real: as in `assign`.
        fuse: the rest goes into one more token, the last of the crucial ones, in the place of its best token.
    """
    keep = tokens_kept(score.shape[1], keep_rate)
    if real is not None:
        score = _with_padding(score.masked_fill(~real, -1), _quota(real, keep_rate), real)
    stay, rest = split(score, keep)
    if fuse:
        stay, rest = torch.cat((stay, rest[:, :1]), dim=1), rest[:, 1:]
    return Assignment(stay, rest, torch.full_like(rest, keep))


def _quota(real: Tensor, keep_rate: float) -> Tensor:
    """Return how many tokens an image would keep alone, without its padding: [B, 1]."""
    # In double precision and with the subtrahend of `tokens_kept`.
    return (real.sum(dim=1, keepdim=True).double() * keep_rate - 1e-9).ceil().clamp(min=1).long()


def _with_padding(score: Tensor, quota: Tensor, real: Tensor) -> Tensor:
    """Put the best real tokens, as many as the quota, before padding, and that before the other real tokens."""
    return torch.where(real, (_rank(score) < quota) * 2, 1)


def _rank(score: Tensor) -> Tensor:
    """Return the place of each token in the descending order of the scores: [B, T], from 0."""
    return _inverse(score.argsort(dim=1, descending=True))


def _inverse(order: Tensor) -> Tensor:
    """Return the place of each index in permutations [B, T]: what sorting them again would, but cheaper."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, place)


def split(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Split T tokens by their score [B, T] into the best `keep` and the rest: indices [B, K] and [B, T - K].

    The indices of the crucial tokens ascend, so that tokens stay in the order of the image.
    """
    order = score.argsort(dim=1, descending=True)
    return order[:, :keep].sort(dim=1).values, order[:, keep:]


def windows(grid: Tensor, height: int, width: int) -> Tensor:
    """Cut grids into windows of that size: [B, H, W, C] -> [B * windows, height * width, C]."""
    batch, rows, columns, channels = grid.shape[0], grid.shape[1] // height, grid.shape[2] // width, grid.shape[3]
    grid = grid.reshape(batch, rows, height, columns, width, channels).transpose(2, 3)
    # Not by unflatten, with which torch.onnx.export without Dynamo takes the batch of the example for a constant.
    return grid.reshape(batch * rows * columns, height * width, channels)


def join_windows(x: Tensor, height: int, width: int, grid_size: tuple[int, int]) -> Tensor:
    """Undo `windows`: [B * windows, height * width, C] -> [B, H, W, C], where grid_size is (H, W)."""
    rows, columns = grid_size[0] // height, grid_size[1] // width
    batch, channels = x.shape[0] // (rows * columns), x.shape[2]
    grid = x.reshape(batch, rows, columns, height, width, channels).transpose(2, 3)
    return grid.reshape(batch, rows * height, columns * width, channels)


def count_windows(grid: Tensor, height: int, width: int) -> int:
    """Return how many windows of that size `windows` cuts of each grid [B, H, W, C]."""
    return (grid.shape[1] // height) * (grid.shape[2] // width)


def pad_to_windows(grid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Pad grids [B, H, W, C] below and on the right, so that windows of that size fill them.

    Padding has equal values, so that it is merged into padding.

    Returns:
        The padded grids, and [windows, height * width, 1], which is 0 at padding and 1 elsewhere; None without padding.
    """
    rows, columns = grid.shape[1:3]
    padding = (0, 0, 0, -columns % width, 0, -rows % height)
    if not any(padding):
        return grid, None
    real = windows(F.pad(grid.new_ones(1, rows, columns, 1), padding), height, width)
    return F.pad(grid, padding, value=1.0), real


def cells(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Divide a grid into equal rectangles of about 8x8 tokens: indices of the tokens in each, [cells, T].

    Comparing all tokens of a large window or grid with each other would cost as much as is saved.
    """
    index = torch.arange(height * width, device=device).view(1, height, width, 1)
    return windows(index, cell_side(height), cell_side(width)).squeeze(2)


def cell_side(side: int) -> int:
    """Return the divisor of a side that is closest to 8, or the whole side where none is near."""
    divisors = [d for d in range(4, 17) if side % d == 0]
    return min(divisors, key=lambda d: abs(d - 8)) if divisors else side


def match(cost: Tensor, crucial: Tensor, rest: Tensor, neighbours: int = 0) -> tuple[Tensor, Tensor | None]:
    """Return into which of the crucial tokens each of the rest is merged, and into which it would be next.

    That is where it costs least.

    Args:
        cost: [B, T, T].
        crucial: [B, K], indices.
        rest: [B, M], indices.
        neighbours: n, or K - 1 where that is less.

    Returns:
        positions in `crucial`, [B, M] and [B, M, n]; None in the place of the latter for n = 0.
    """
    rows = take(cost, rest)  # [B, M, T]
    rows = rows.gather(2, crucial[:, None, :].expand(-1, rest.shape[1], -1))
    target = rows.argmin(dim=2)
    return target, _nearest(rows, target, neighbours) if neighbours else None


def _nearest(distance: Tensor, target: Tensor, number: int) -> Tensor:
    """Return the positions of the least distances [B, M, K], that of the target [B, M] excepted: [B, M, n]."""
    distance = distance.scatter(2, target.unsqueeze(2), math.inf)
    return distance.topk(min(number, distance.shape[2] - 1), dim=2, largest=False).indices


def merge(tokens: Tensor, size: Tensor, assignment: Assignment, keep_norms: bool = False) -> tuple[Tensor, Tensor]:
    """Merge the rest into the crucial tokens, by means weighted with the tokens' sizes.

    The weights of the merged tokens are applied as one matrix product: unlike a scatter it is deterministic on
    every device and exports to ONNX. A crucial token that takes no other is left exactly as it is.

    Args:
        tokens: [B, T, C].
        size: [B, T], the number of patches that each token stands for.
        assignment: K tokens that stay and M that go.
        keep_norms: a merged token is as long as the tokens that it is made of are on average, and points where their
            mean does. The mean is shorter, the more they differ, so that what is added to it later counts for more;
            that lengths are to be kept when tokens are merged is known from Kim et al. 2024, "Token Fusion".

    Returns:
        tokens [B, K, C] and sizes [B, K], whose sum is that of the sizes given.
    """
    crucial, rest, target, _ = assignment
    batch, keep = crucial.shape
    # Of a token that is dropped, whose target is K, nothing is taken.
    taken = size.new_zeros(batch, keep + 1, rest.shape[1])
    taken = taken.scatter(1, target.unsqueeze(1), size.gather(1, rest).unsqueeze(1))[:, :keep]  # [B, K, M]
    own = size.gather(1, crucial)
    merged_size = own + taken.sum(dim=2)
    # Only padding has size 0; dividing by 1 then leaves its (unused) token at zero instead of NaN.
    total = merged_size.clamp(min=1)
    share, own_share = taken / total.unsqueeze(2), (own / total).unsqueeze(2)
    stay, go = take(tokens, crucial), take(tokens, rest)
    merged = torch.baddbmm(stay * own_share.to(tokens.dtype), share.to(tokens.dtype), go)
    if keep_norms:
        # Not by a product of matrices, which autocast would round.
        length = own_share * _norms(stay) + (share * _norms(go).transpose(1, 2)).sum(dim=2, keepdim=True)
        longer = length / _norms(merged).clamp(min=1e-12)
        merged = (merged * longer).to(merged.dtype)  # a factor may be more than half precision holds
    return merged, merged_size


def _norms(tokens: Tensor) -> Tensor:
    """Return the norm of each token: [B, T, C] -> [B, T, 1], in float32 at least."""
    return torch.linalg.vector_norm(_wide(tokens), dim=2, keepdim=True)


def _wide(tokens: Tensor) -> Tensor:
    return tokens if tokens.dtype in (torch.float32, torch.float64) else tokens.float()


def drop(tokens: Tensor, size: Tensor, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """Keep the crucial tokens as they are, and forget the rest: `merge` for pruning."""
    return take(tokens, assignment.crucial), size.gather(1, assignment.crucial)


def fuse_rest(tokens: Tensor, size: Tensor, assignment: Assignment, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Fuse all tokens that are not kept into the last crucial one: `merge` for EViT (Liang et al. 2022, equation 5).

    Args:
        tokens, size, assignment: as in `merge`; the assignment by `keep_best(..., fuse=True)`.
        attention: [B, T], of the class token; the fused token is the sum of the others, weighted with it.
    """
    crucial, rest, *_ = assignment
    kept, fused = crucial[:, :-1], torch.cat((crucial[:, -1:], rest), dim=1)
    weight = attention.gather(1, fused)[:, None, :].to(tokens.dtype)
    fused_size = size.gather(1, fused).sum(dim=1, keepdim=True)
    return (
        torch.cat((take(tokens, kept), weight @ take(tokens, fused)), dim=1),
        torch.cat((size.gather(1, kept), fused_size), dim=1),
    )


def pseudo_random(index: Tensor, seed: int) -> Tensor:
    """Return numbers that look drawn at random, each from its index alone: int64 of any shape, in [0, 2^31).

    Integer arithmetic is the same on every device, and exports.
    """
    prime = 2**31 - 1
    number = index + 1000 + 1009 * seed
    for _ in range(4):
        number = number * number % prime
    return number


def follow(token_map: Tensor, assignment: Assignment) -> Tensor:
    """Return the token map after a stage: for each patch, the index of the token that holds it.

    Args:
        token_map: [B, N], in [0, T], where T stands for patches whose token was dropped.
        assignment: of the T tokens.

    Returns:
        [B, N], in [0, K], where K stands for patches whose token was dropped.
    """
    crucial, rest, target, _ = assignment
    keep = crucial.shape[1]
    position = torch.arange(keep, device=target.device).expand_as(crucial)
    moved = torch.cat((position, target), dim=1)
    new_index = torch.empty_like(moved).scatter(1, torch.cat((crucial, rest), dim=1), moved)  # [B, T]
    gone = new_index.new_full((new_index.shape[0], 1), keep)  # not by F.pad, whose value cannot be a symbol
    return torch.cat((new_index, gone), dim=1).gather(1, token_map)


def restore(tokens: Tensor, token_map: Tensor, dropped: bool = False) -> Tensor:
    """Put tokens back on the full patch grid: [B, K, C] -> [B, N, C].

    Args:
        tokens: [B, K, C].
        token_map: [B, N].
        dropped: there may be patches whose token was dropped. They get the mean of the tokens that are left, so that
            average pooling is that of those tokens.
    """
    if dropped:
        tokens = torch.cat((tokens, tokens.mean(dim=1, keepdim=True)), dim=1)
    return take(tokens, token_map)


class Undo(NamedTuple):
    """What it takes to undo a merge behind the blocks that follow it: T = K + M tokens became K.

    Attributes:
        before: [B, T, C], the tokens that were merged.
        after: [B, K, C], what became of them.
        assignment: of the T tokens.
        token_map: [B, N], for each patch the index of the one of the T tokens that held it.
        sources: [B, M, 1 + n], positions among the K tokens: for each of the rest that which took it, then neighbours.
        shares: [B, M, 2, 1 + n], how much of the updates of these it gets, and how much the token that took it; their
            sums are 1.
    """

    before: Tensor
    after: Tensor
    assignment: Assignment
    token_map: Tensor
    sources: Tensor
    shares: Tensor


def interpolation(
    before: Tensor, after: Tensor, assignment: Assignment, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Say of which merged tokens' updates those of the tokens in them are made: `sources` and `shares` of an `Undo`.

    What blocks add to a token depends on where it lies, and for a small way about linearly: what a token has beyond
    its merged token is written as a sum of the ways from there to the nearest other tokens, as in locally linear
    embedding (Roweis and Saul 2000), and the updates differ by the same sum of their differences. In the place of the
    equations' solution stand four steps towards it, from zero, which are the shorter the more the ways overlap.

    Args:
        before: [B, T, C], the tokens that were merged.
        after: [B, K, C], what became of them.
        assignment: of the T tokens; where it does not tell neighbours, they are the nearest ones of the K.
        real: [B, T], false for padding, which is no neighbour of what is none; None where all tokens are real.
    """
    crucial, rest, target, index = assignment
    with _without_autocast(before):
        after = _wide(after)
        own = take(after, target).unsqueeze(2)
        if index is None:
            # Squared distances, less the square of the token itself.
            square = torch.linalg.vector_norm(after, dim=2).square().unsqueeze(1)
            distance = torch.baddbmm(square, _wide(take(before, rest)), after.transpose(1, 2), alpha=-2)
            if real is not None:
                apart = real.gather(1, crucial).unsqueeze(1) != real.gather(1, rest).unsqueeze(2)
                distance = distance.masked_fill(apart, math.inf)
            index = _nearest(distance, target, NEIGHBOURS)
        ways = take(after, index.flatten(1)).reshape(*index.shape, after.shape[2]) - own  # [B, M, n, C]
        if real is not None:
            neighbours = real.gather(1, crucial.gather(1, index.flatten(1))).reshape(index.shape)
            ways = ways.masked_fill((neighbours != real.gather(1, rest).unsqueeze(2)).unsqueeze(3), 0)
        both = torch.stack((take(before, rest), take(before, crucial.gather(1, target))), dim=2)
        beyond = _wide(both) - own  # [B, M, 2, C]
        overlap = ways @ ways.transpose(2, 3)
        ridge = RIDGE * beyond.square().sum(dim=(2, 3), keepdim=True)
        # Steps of twice the inverse and more would not lead to the solution. Divided by, and not multiplied with the
        # inverse: runtimes quantise what goes into products, and inverses are of too many sizes for that.
        size = (overlap.abs().sum(dim=3, keepdim=True) + ridge).clamp(min=1e-12) / 1.5  # [B, M, n, 1]
        shares = (ways @ beyond.transpose(2, 3)) / size  # [B, M, n, 2], the first step
        left = torch.eye(index.shape[2], dtype=after.dtype, device=after.device) - overlap / size  # by a step
        shares = shares + left @ shares
        shares = shares + left @ (left @ shares)
        shares = shares.transpose(2, 3)
        shares = torch.cat((1 - shares.sum(dim=3, keepdim=True), shares), dim=3)
    return torch.cat((target.unsqueeze(2), index), dim=2), shares


def undo(tokens: Tensor, done: Undo) -> Tensor:
    """Give what blocks made of merged tokens back to the tokens that were merged: [B, K, C] -> [B, T, C].

    Each has what it had, and an update: of those that were merged one in between, of others their own.
    """
    crucial, rest, target, _ = done.assignment
    keep, gone = crucial.shape[1], rest.shape[1]
    update = tokens - done.after
    if gone == 0:  # EViT may fuse a token with none
        return done.before + take(update, _inverse(crucial))
    with _without_autocast(update):
        parts = take(update, done.sources.flatten(1)).reshape(*done.sources.shape, update.shape[2])
        mixed = done.shares.to(update.dtype) @ parts  # [B, M, 2, C]
    position, merge = (torch.arange(n, device=tokens.device) for n in (keep, gone))
    # Of a token that took several, the first says what it gets.
    first = ((target.unsqueeze(1) == position.unsqueeze(1)) * (gone - merge)).amax(dim=2)  # [B, K], M less its place
    stayed = torch.where(first > 0, keep + 2 * (gone - first) + 1, position)
    went = (keep + 2 * merge).expand_as(rest)
    place = torch.cat((stayed, went), dim=1).gather(1, _inverse(torch.cat((crucial, rest), dim=1)))
    return done.before + take(torch.cat((update, mixed.flatten(1, 2)), dim=1), place)


def patch_offset(done: Undo) -> Tensor:
    """Return what each patch has beyond the merged token that holds it: [B, N, C]."""
    position = torch.arange(done.before.shape[1], device=done.before.device).expand(done.before.shape[0], -1)
    holder = follow(position, done.assignment)
    return take(done.before - take(done.after, holder), done.token_map)
