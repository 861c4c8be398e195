"""Schedules, {block: keep rate}, as plain numbers: by rate, by number, small changes of one, the cheapest by prices.

A schedule is a path: the share of the tokens that is left falls from block to block, and what it costs is taken to be
the sum of its falls, each at the price of its block. The path of least cost within a budget follows exactly, by dynamic
programming.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeAlias

from token_merge_plugin.config import at_twelfths, rates_of_numbers

# Each block is tried alone at these, and a path goes through these and what lies between them.
PROBES = (0.8, 0.6, 0.4)
LEVELS = tuple(level / 40 for level in range(40, 7, -1))  # 1 down to 0.2
STRONGEST = 1000.0  # of a shape: beyond that nothing more is merged
# Stages of equal numbers. Which ones move a model least differs: at a third less, a pretrained ViT-S likes odd blocks,
# as its patch tokens tell, a classifier made of it later ones, and the built-in model even ones.
TWELFTHS = ((1, 3, 5, 7, 9), (2, 4, 6, 8), (3, 5, 7, 9), (1, 4, 7), tuple(range(3, 10)))
STEP = 0.15  # of the logarithm of a keep rate, by which a move changes it

# Returns a schedule that merges the more, the larger the number is that it is given; at 0 next to nothing.
Shape: TypeAlias = Callable[[float], dict[int, float]]


def regular(sections: Sequence[range], default: Sequence[int]) -> list[Shape]:
    """Return schedules of equal rates: the default stages, earlier ones, and every first, second, ... block.

    Regular ones: what is lost is a flat function of the schedule, which they cover better than changes of one block.
    """
    blocks = [block for section in sections for block in section]
    earlier = {max(section.start, block - 1) for section in sections for block in section if block in default}
    early = blocks[1 :: max(1, len(blocks) // 8)][:4]  # in the first half
    repeated = [blocks[start::step] for step in range(1, 5) for start in range(min(step + 1, 3))]
    found = dict.fromkeys(tuple(sorted(stages)) for stages in (default, earlier, early, *repeated) if stages)
    return [partial(powers, dict.fromkeys(stages, 0.7)) for stages in found]


def by_number(sections: Sequence[range]) -> list[Shape]:
    """Return schedules by number: of every block and of stages at twelfths of the depth, and late-heavy ones.

    Late-heavy are those whose numbers of merged tokens grow with (block / depth)^2.
    """
    blocks = [block for section in sections for block in section]
    some = [[blocks[index] for index in at_twelfths(len(blocks), twelfths)] for twelfths in TWELFTHS]
    equal = dict.fromkeys(map(tuple, (blocks, *some)))
    late_heavy = (blocks, blocks[1::2] or blocks)
    return [partial(numbers, sections, stages, power) for power, of in ((0, equal), (2, late_heavy)) for stages in of]


def numbers(sections: Sequence[range], stages: Sequence[int], power: float, strength: float) -> dict[int, float]:
    """Return a schedule by number: a stage merges at most half of its tokens, or `strength` times its weight of all.

    Args:
        sections: runs of blocks through which tokens stay fewer; in each they begin as all.
        stages: the blocks that merge tokens.
        power: weights grow with (block / depth)^power, counted from 1; their sum is 1.
        strength: how much is merged, from 0 on.
    """
    total = sum((block + 1) ** power for block in stages)
    schedule: dict[int, float] = {}
    for section in sections:
        weights = [(block + 1) ** power / total if block in stages else 0.0 for block in section]
        schedule.update(zip(section, rates_of_numbers(strength, weights, least=0.5), strict=True))
    return {block: rate for block, rate in schedule.items() if rate < 1}


def powers(schedule: Mapping[int, float], power: float) -> dict[int, float]:
    """Raise rates to a power, and leave out stages that keep nearly everything."""
    rates = {block: max(0.02, rate**power) for block, rate in schedule.items()}
    return {block: rate for block, rate in rates.items() if rate < 0.995}


def moved(schedule: Mapping[int, float], blocks: Sequence[int], draw: random.Random) -> dict[int, float]:
    """Let one stage merge less, and another block more."""
    changed = dict(schedule)
    giver = draw.choice(list(changed))
    taker = draw.choice([block for block in blocks if block != giver] or [giver])
    step = math.exp(STEP * draw.choice((0.5, 1.0, 2.0)))
    changed[giver] = min(1.0, changed[giver] * step)
    changed[taker] = changed.get(taker, 1.0) / step
    return {block: rate for block, rate in changed.items() if rate < 1}


def cheapest(
    sections: Sequence[range],
    prices: Mapping[int, Sequence[tuple[float, float]]],
    savings: Mapping[int, float],
    wanted: float,
) -> dict[int, float]:
    """Return the schedule of least price that saves what is wanted, by bisection on the worth of a saving.

    Args:
        sections: runs of blocks through which tokens stay fewer.
        prices: {block: (share of the tokens merged, how far the output moves) at each probe}, both growing.
        savings: share of the work that is saved for each share of the tokens merged in a block.
        wanted: share of the work that is to be saved.
    """
    cheap, dear = 1e-9, 1e9
    schedule: dict[int, float] = {}
    for _ in range(60):
        worth = math.sqrt(cheap * dear)
        levels = {}
        for section in sections:
            levels.update(_path(section, prices, savings, worth))
        saved = sum(savings[block] * (before - after) for block, (before, after) in levels.items())
        if saved < wanted:
            cheap = worth
        else:
            dear = worth
            schedule = {block: after / before for block, (before, after) in levels.items() if after < before}
    return schedule or {block: PROBES[0] for section in sections for block in section}


def _path(
    section: range,
    prices: Mapping[int, Sequence[tuple[float, float]]],
    savings: Mapping[int, float],
    worth: float,
) -> dict[int, tuple[float, float]]:
    """Return {block: (share of the tokens in front, behind)}, the path through a section of the least total.

    A fall from one share to another at a block costs what merging down to the second costs there, less what merging
    down to the first does; it earns `worth` for each unit of work that it saves.
    """
    best = {1.0: (0.0, [1.0])}  # {share of the tokens: (total, shares so far)}
    for block in section:
        price = {level: _interpolated(prices[block], 1 - level) for level in LEVELS}
        reached: dict[float, tuple[float, list[float]]] = {}
        for before, (total, path) in best.items():
            for after in LEVELS:
                if after <= before:
                    fall = price[after] - price[before] - worth * savings[block] * (before - after)
                    if after not in reached or total + fall < reached[after][0]:
                        reached[after] = (total + fall, [*path, after])
        best = reached
    _, path = min(best.values())
    return {block: (path[i], path[i + 1]) for i, block in enumerate(section)}


def _interpolated(price: Sequence[tuple[float, float]], merged: float) -> float:
    """Return the price of merging a share of the tokens: straight in logarithms between and beyond the probes."""
    if merged <= 0:
        return 0.0
    pairs = list(pairwise(price))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if merged <= pair[1][0]), pairs[-1])
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * (merged / x0) ** (max(1.0, slope) if merged < x0 else slope)
