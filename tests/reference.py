"""A slow reference: a ViT's forward pass with token merging, image by image and token by token, in double precision.

It shares no code with the package. Linear layers, norms, MLPs, the patch embedding and the head are those of an
unpatched timm model; attention, choosing, merging and restoring are loops over Python numbers and rows of numpy.
"""

import math
from fractions import Fraction

import numpy as np
import torch

DEFAULTS = {
    "keep_rate": 0.7,
    "method": "merge",
    "r": None,
    "stages": None,
    "schedule": None,
    "importance": "auto",
    "similarity": None,
    "multi_scale": "off",
    "proportional_attention": True,
}
COUNTING = ("merge", "tome", "late_tome", "ppt")  # attend in proportion to sizes
FORGETTING = ("ppt", "prune", "random")  # drop tokens for good


# How many tokens go where.


def schedule(depth, options):
    """Return {block: share that stays (a float), or number that goes (an int)}, without blocks that keep all."""
    options = DEFAULTS | options
    rate, stages, method = options["keep_rate"], options["stages"], options["method"]
    quarters = sorted({depth * quarter // 4 for quarter in (1, 2, 3)})
    if isinstance(rate, dict):
        amounts = dict(rate)
    elif options["r"] is not None:
        amounts = dict.fromkeys(range(depth) if stages is None else stages, options["r"])
    elif isinstance(rate, tuple):
        amounts = dict(zip(quarters if stages is None else stages, rate, strict=True))
    elif stages is None and method in ("tome", "late_tome"):
        weights = [(block + 1) ** 2 if method == "late_tome" else 1 for block in range(depth)]
        rates = of_equal_work(dict.fromkeys(quarters, rate), weights, 0.5)
        amounts = {block: max(0.5, share) for block, share in enumerate(rates)}
    elif options["schedule"] == "equal_numbers" or (
        (options["schedule"], stages, method) == (None, None, "merge")
        and rate < 0.8
        and options["multi_scale"] != "learned"
    ):
        own = stages
        if own is None:
            own = {depth * twelfth // 12 for twelfth in (1, 3, 5, 7)} - {depth - 1} or {0}
        weights = [float(block in own) for block in range(depth)]
        if stages is None and len(own) > 1:
            weights[min(own)] = 1 / 3
        rates = of_equal_work(dict.fromkeys(quarters, rate), weights, 0.8)
        amounts = dict(enumerate(rates))
    else:
        amounts = dict.fromkeys(quarters if stages is None else stages, rate)
    return {block: amount for block, amount in sorted(amounts.items()) if amount != (0 if type(amount) is int else 1)}


def work(rates):
    """Return the work of blocks: a third with the tokens in front of them, two thirds with those that are left."""
    total, tokens = 0.0, 1.0
    for rate in rates:
        total += tokens / 3 + tokens * rate * 2 / 3
        tokens *= rate
    return total


def of_equal_work(stages, weights, least):
    """Return rates of blocks that merge numbers in proportion to weights, with as much work as the stages leave."""
    target = work([stages.get(block, 1.0) for block in range(len(weights))])

    def by_number(number, least):
        rates, tokens = [], 1.0
        for weight in weights:
            rates.append(max(least, 1 - number * weight / tokens) if weight else 1.0)
            tokens *= rates[-1]
        return rates

    def bisect(rates_of, low, high):
        """Find the parameter at which the work, which falls, is that of the stages."""
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if work(rates_of(middle)) > target else (low, middle)
        return rates_of(low)

    if work(by_number(math.inf, least)) > target:
        return bisect(lambda cut: by_number(math.inf, 1 - cut), 1 - least, 1 - 1e-6)
    return bisect(lambda number: by_number(number, least), 0.0, 1.0)


def stay(tokens, amount):
    """Return how many of the tokens stay."""
    if type(amount) is int:
        return tokens - min(amount, tokens // 2)
    return math.ceil(Fraction(amount).limit_denominator(10**9) * tokens)


# A pass.


class Close:
    """Notes how close to each other numbers were whose order decided something, relative to their size."""

    def __init__(self):
        self.least = math.inf

    def order(self, numbers, key, cut=None):
        """Return the indices, sorted; the first `cut` of them are a set, so only the gap behind those counts."""
        indices = sorted(numbers, key=key)
        for place in range(1, len(indices)) if cut is None else [cut]:
            if 0 < place < len(indices):
                self.note(key(indices[place - 1]), key(indices[place]))
        return indices

    def note(self, a, b):
        if math.isfinite(a) and math.isfinite(b):
            self.least = min(self.least, abs(a - b) / max(abs(a), abs(b), 1e-300))


class Tokens:
    """Where an image stands: rows of tokens, which patches each holds, and which patch it was at first."""

    def __init__(self, rows):
        self.rows = [np.array(row) for row in rows]
        self.holds = [[patch] for patch in range(len(rows))]
        self.first = list(range(len(rows)))
        self.patches = len(rows)
        self.beyond = [np.zeros_like(row) for row in self.rows]  # what each patch has beyond its token
        self.merges = []  # (rows before, rows after, groups, neighbours) of each merge that forgot nothing

    def sizes(self):
        return [float(len(held)) for held in self.holds]

    def restored(self):
        """Return the full grid, [N, C]. Patches that were dropped have the mean of the tokens that are left."""
        grid = [np.mean(self.rows, axis=0)] * self.patches
        for row, held in zip(self.rows, self.holds, strict=True):
            for patch in held:
                grid[patch] = row + self.beyond[patch]
        return np.array(grid)

    def undone(self):
        """Return the full grid as the last block gives it: tokens that were merged have updates in between."""
        rows = self.rows
        for before, after, groups, nearest in reversed(self.merges):
            updates = [row - was for row, was in zip(rows, after, strict=True)]
            rows = [None] * len(before)
            for own, (stayed, *gone) in enumerate(groups):
                for i in (stayed, *gone):
                    rows[i] = before[i] + updates[own]
                    if gone:
                        went = gone[0] if i == stayed else i
                        beyond = {j: before[j] - after[own] for j in (stayed, went)}
                        ways = np.array([after[j] - after[own] for j in nearest[went]])
                        ridge = 0.1 * sum(way @ way for way in beyond.values())
                        shares = self.steps(ways, beyond[i], ridge) if len(ways) else []
                        for share, j in zip(shares, nearest[went], strict=True):
                            rows[i] = rows[i] + share * (updates[j] - updates[own])
        return np.array(rows)

    @staticmethod
    def steps(ways, beyond, ridge):
        """Go four steps from zero towards the shares of the ways that are closest to what is beyond."""
        overlap = ways @ ways.T
        shares = np.zeros(len(ways))
        for _ in range(4):
            slope = ways @ beyond - overlap @ shares
            shares = shares + 1.5 * slope / np.maximum(np.abs(overlap).sum(axis=1) + ridge, 1e-12)
        return shares


@torch.no_grad()
def run(model, image, options, num_prefix_tokens, num_class_tokens, grid_size):
    """Return the tokens behind each block [P + N, C], and how close to each other numbers were that decided something.

    Args:
        model: an unpatched timm ViT of plain blocks, in double precision.
        image: [3, H, W].
        options: of `MergeConfig`, as a dict; None for no merging at all.
        num_prefix_tokens, num_class_tokens, grid_size: of the model.
    """
    amounts = {} if options is None else schedule(len(model.blocks), options)
    options = DEFAULTS | (options or {})
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0].numpy()
    prefix, tokens, close, behind = x[:num_prefix_tokens], Tokens(x[num_prefix_tokens:]), Close(), []
    for index, block in enumerate(model.blocks):
        x = np.concatenate((prefix, tokens.rows))
        logs = [0.0] * len(prefix)
        counts = options["proportional_attention"] and options["method"] in COUNTING
        logs += [math.log(size) if counts else 0.0 for size in tokens.sizes()]
        seen = attend(block, x, logs)
        x = x + through(lambda y, block=block: block.ls1(block.attn.proj(y)), seen["output"])
        prefix, tokens.rows = x[: len(prefix)], list(x[len(prefix) :])
        if index in amounts and stay(len(tokens.rows), amounts[index]) < len(tokens.rows):
            image_tokens = {name: value[:, len(prefix) :] for name, value in seen.items() if name in ("key", "value")}
            seen |= {"keys": image_tokens["key"], "values": image_tokens["value"], "counts": counts}
            seen |= {"prefix": len(prefix), "class tokens": num_class_tokens, "block": index, "grid": grid_size}
            reduce(tokens, amounts[index], options, seen, close)
        x = np.concatenate((prefix, tokens.rows))
        x = x + through(lambda y, block=block: block.ls2(block.mlp(block.norm2(y))), x)
        prefix, tokens.rows = x[: len(prefix)], list(x[len(prefix) :])
        last = index == len(model.blocks) - 1 and tokens.merges
        behind.append(np.concatenate((prefix, tokens.undone() if last else tokens.restored())))
    return behind, close.least


def through(layer, x):
    return layer(torch.from_numpy(x)[None])[0].numpy()


def attend(block, x, logs):
    """Return the output of the attention of a timm block [T, C], and its queries, keys, values and weights by head."""
    layer = block.attn
    qkv = layer.qkv(block.norm1(torch.from_numpy(x)[None]))[0]
    query, key, value = qkv.reshape(len(x), 3, layer.num_heads, layer.head_dim).permute(1, 2, 0, 3)  # [H, T, D]
    query, key, value = layer.q_norm(query).numpy(), layer.k_norm(key).numpy(), value.numpy()
    weights, output = [], []
    for q, k, v in zip(query, key, value, strict=True):
        logits = q @ k.T * layer.scale + np.array(logs)
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        weights.append(weight)
        output.append(weight @ v)
    return {"output": np.concatenate(output, axis=1), "key": key, "value": value, "weights": weights}


def reduce(tokens, amount, options, seen, close):
    """Reduce the tokens of an image, in place."""
    method = options["method"]
    keep = stay(len(tokens.rows), amount)
    groups = {
        "merge": by_cost,
        "tome": by_halves,
        "late_tome": by_halves,
        "evit": by_class_attention,
        "prune": by_class_attention,
        "ppt": by_variance,
        "random": by_lot,
    }[method](tokens, keep, options, seen, close)
    sizes = tokens.sizes()
    rows, holds, first = [], [], []
    for group in groups:
        if method == "evit" and group is groups[-1]:
            received = attention(seen, range(seen["class tokens"]))
            row = sum(received[i] * tokens.rows[i] for i in group)
        else:
            row = sum(sizes[i] * tokens.rows[i] for i in group) / sum(sizes[i] for i in group)
        if method == "merge":  # as long as the tokens are on average
            length = sum(sizes[i] * math.hypot(*tokens.rows[i]) for i in group) / sum(sizes[i] for i in group)
            row = row * length / math.hypot(*row)
        if method not in FORGETTING:
            for i in group:
                for patch in tokens.holds[i]:
                    tokens.beyond[patch] = tokens.beyond[patch] + tokens.rows[i] - row
        rows.append(row)
        holds.append([patch for i in group for patch in tokens.holds[i]])
        first.append(tokens.first[group[0]])
    if method not in FORGETTING:
        nearest = {}
        for own, group in enumerate(groups):
            for i in group[1:]:
                far = {j: float(((tokens.rows[i] - rows[j]) ** 2).sum()) for j in range(len(rows))}
                if method == "merge":
                    far = {j: seen["cost"][i][other[0]] for j, other in enumerate(groups)}
                del far[own]
                nearest[i] = close.order(far, far.get, 8)[:8]
        tokens.merges.append((tokens.rows, rows, groups, nearest))
    tokens.rows, tokens.holds, tokens.first = rows, holds, first


def attention(seen, queries, norms=False):
    """Return the attention that image tokens receive from tokens of the whole sequence, mean over heads and queries."""
    received = []
    for i in range(seen["prefix"], len(seen["output"])):
        terms = []
        for weight, value in zip(seen["weights"], seen["value"], strict=True):
            factor = np.linalg.norm(value[i]) if norms else 1.0
            terms += [float(weight[query, i]) * float(factor) for query in queries]
        received.append(sum(terms) / len(terms))
    return received


def importance(tokens, options, seen):
    sizes = tokens.sizes()

    def relative(queries):
        received = [a + 1e-12 for a in attention(seen, queries, norms=True)]
        if seen["counts"]:
            received = [a / size for a, size in zip(received, sizes, strict=True)]
        mean = sum(a * size for a, size in zip(received, sizes, strict=True)) / sum(sizes)
        return [a / mean for a in received]

    if options["importance"] == "uniform":
        return [1.0] * len(sizes)
    by_class = [1.0] * len(sizes)
    if seen["class tokens"]:
        by_class = [a**0.25 for a in relative(range(seen["class tokens"]))]
    if options["importance"] == "auto":
        spaced = [seen["prefix"] + (2 * i + 1) * len(sizes) // 32 for i in range(16)]
        by_class = [max(c, 0.7 * a**0.5) for c, a in zip(by_class, relative(spaced), strict=True)]
    if options["multi_scale"] == "importance":
        by_class = [row[0] for row in blurred(tokens, [np.array([a]) for a in by_class], seen["grid"])]
    return by_class


def blurred(tokens, features, grid):
    """Return the mean of features and of their means over squares of 3 and 5 patches, at each token's first patch."""
    height, width = grid
    at = {patch: feature for held, feature in zip(tokens.holds, features, strict=True) for patch in held}
    result = []
    for patch in tokens.first:
        y, x = divmod(patch, width)
        means = [at[patch]]
        for reach in (1, 2):
            square = [
                at[row * width + column]
                for row in range(max(0, y - reach), min(height, y + reach + 1))
                for column in range(max(0, x - reach), min(width, x + reach + 1))
            ]
            means.append(sum(square) / len(square))
        result.append(sum(means) / 3)
    return result


def by_cost(tokens, keep, options, seen, close):
    """The package's own: those go whose cheapest merge into one that stays costs least, by three rounds."""
    count, goes = len(tokens.rows), len(tokens.rows) - keep
    weights = [size * factor for size, factor in zip(tokens.sizes(), importance(tokens, options, seen), strict=True)]
    if options["similarity"] in (None, "tokens"):  # models of many patches are not run here
        compared = tokens.rows
    elif options["similarity"] == "mean_keys":
        compared = list(seen["keys"].mean(axis=0))
    else:
        compared = list(np.concatenate(list(seen[options["similarity"]]), axis=1))
    if options["multi_scale"] == "descriptors":
        compared = blurred(tokens, compared, seen["grid"])
    cost = [[math.inf] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            lost = weights[i] * weights[j] / (weights[i] + weights[j]) * ((compared[i] - compared[j]) ** 2).sum()
            cost[i][j] = cost[j][i] = float(lost)

    def cheapest(i, others):
        return min((cost[i][j] for j in others if j != i), default=math.inf) * (1 + 1e-6 * i)

    every, going = range(count), set()
    order = sorted(every, key=lambda i: cheapest(i, every))
    for _ in range(3):
        place = {i: -1 if i in going else order.index(i) for i in every}
        price = {i: cheapest(i, [j for j in every if place[j] > place[i]]) for i in every}
        order = close.order(every, price.get, goes)
        going = set(order[:goes])
    groups = {i: [i] for i in every if i not in going}
    for i in order[:goes]:
        nearest = close.order(groups, cost[i].__getitem__, 1)
        groups[nearest[0]].append(i)
    for _, *gone in groups.values():
        close.order(gone, price.get, 1)
    seen["cost"] = cost
    return list(groups.values())


def by_halves(tokens, keep, options, seen, close):
    """ToMe: tokens at even positions go into the most similar ones at odd positions, the most similar pairs first."""
    descriptors = seen["keys"].mean(axis=0)
    keep = max(keep, len(descriptors) - len(descriptors) // 2)
    return halves(descriptors, keep, seen["prefix"], close)


def halves(descriptors, keep, prefix, close):
    normalised = [row / np.linalg.norm(row) for row in descriptors]
    even = [i for i in range(len(normalised)) if (prefix + i) % 2 == 0]
    odd = [i for i in range(len(normalised)) if (prefix + i) % 2 == 1]
    groups, best = {j: [j] for j in odd}, {}
    for i in even:
        unlike = {j: -float(normalised[i] @ normalised[j]) for j in odd}
        partner = close.order(odd, unlike.get, 1)[0]
        best[i] = (unlike[partner], partner)
    going = close.order(even, lambda i: best[i][0], len(normalised) - keep)[: len(normalised) - keep]
    for i in going:
        groups[best[i][1]].append(i)
    for _, *gone in groups.values():
        close.order(gone, lambda i: best[i][0], 1)
    return [[i] for i in even if i not in going] + list(groups.values())


def by_class_attention(tokens, keep, options, seen, close):
    """EViT and pruning: the class token's favourites stay; in EViT one more token, the last, has all the others."""
    received = attention(seen, range(seen["class tokens"]))
    groups, rest = favourites(received, keep, close)
    if options["method"] == "evit":
        for cut in (1, 2):
            close.order(rest, lambda i: -received[i], cut)
        groups.append(rest)
    return groups


def favourites(score, keep, close):
    order = close.order(range(len(score)), lambda i: -score[i], keep)
    return [[i] for i in sorted(order[:keep])], order[keep:]


def by_variance(tokens, keep, options, seen, close):
    """PPT: prune where scores vary, pool where they do not."""
    received, values = attention(seen, range(seen["class tokens"])), np.concatenate(list(seen["values"]), axis=1)
    score = [a * np.linalg.norm(value) for a, value in zip(received, values, strict=True)]
    score = [a / sum(score) for a in score]
    variance = np.var(score, ddof=1)
    close.note(variance, 6e-5)
    if variance > 6e-5:
        return favourites(score, keep, close)[0]
    groups, rows, sizes = [[i] for i in range(len(score))], list(seen["keys"].mean(axis=0)), tokens.sizes()
    while len(groups) > keep:
        merged = halves(rows, max(keep, len(groups) - len(groups) // 2), seen["prefix"], close)
        rows = [sum(sizes[i] * rows[i] for i in group) / sum(sizes[i] for i in group) for group in merged]
        sizes = [sum(sizes[i] for i in group) for group in merged]
        groups = [[member for i in group for member in groups[i]] for group in merged]
    return groups


def by_lot(tokens, keep, options, seen, close):
    """A pseudo-random order of the patches."""
    lots = []
    for patch in tokens.first:
        lot = patch + 1000 + 1009 * seen["block"]
        for _ in range(4):
            lot = lot * lot % (2**31 - 1)
        lots.append(lot)
    return favourites(lots, keep, Close())[0]  # whole numbers: exact
