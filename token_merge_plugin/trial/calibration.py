"""Choose stages and keep rates for one model and a budget, from a few hundred unlabelled images.

Each block is tried alone at several keep rates: how far does the output move, and how much work is saved? A schedule
is then a path: the share of the tokens that is left falls from block to block, and what it costs is taken to be the
sum of its falls, each at the price of its block. The path of least cost within the budget follows exactly, by dynamic
programming. It and schedules of equal rates are measured, and steps of the best one are moved between blocks as long as
that brings the output closer.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import ConfigError, DataError
from token_merge_plugin.patching import apply, remove, stage_choices
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.measuring import evaluating, plan, time_in_turns

# Each block is tried alone at these, and a path goes through these and what lies between them.
PROBES = (0.8, 0.6, 0.4)
LEVELS = tuple(level / 40 for level in range(40, 7, -1))  # 1 down to 0.2
STEP = 0.15  # of the logarithm of a keep rate, by which a move changes it
BUDGETS = ("compute", "latency")

Measured = tuple[dict[int, float], Tensor]  # a schedule, and how far it moves the output of each image


def calibrate(
    model: nn.Module,
    images: Tensor,
    target: float = 0.67,
    *,
    budget: str = "compute",
    moves: int = 24,
    batch_size: int = 50,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> MergeConfig:
    """Return the schedule that moves the model's output the least, of those that cost a share of its work.

    Args:
        model: a supported model. It is unpatched, and in the mode it was in, at the end.
        images: [B, C, H, W], preprocessed, on the model's device: a few hundred, without labels.
        target: share of the unpatched model's work that is to be left, in (0, 1).
        budget: what work is: "compute", multiply-adds, or "latency", the measured time of a batch of `batch_size`.
        moves: how many changes of the schedule are measured at the end.
        batch_size: images a forward pass.
        seed: of the moves. The same seed gives the same schedule; for "latency", as far as times repeat.
        progress: show a bar.
        options: further fields of `MergeConfig`, for "merge".

    Returns:
        A config whose `keep_rate` is a mapping {block: rate}; see `MergeConfig.to_json`.

    Raises:
        ConfigError: an option is not allowed, or no schedule leaves so little.
        DataError: there are no images.
        UnsupportedModelError, PatchStateError: as `apply`.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"budget={budget!r} is not known. Choose one of {', '.join(map(repr, BUDGETS))}.")
    if not isinstance(target, float) or not 0 < target < 1:
        raise ConfigError(f"target={target!r} is not a float in (0, 1). 0.67 leaves two thirds of the work.")
    if len(images) == 0:
        raise DataError("Calibration needs images: given none. A few hundred are enough.")
    base = MergeConfig(1.0, **options)
    if base.method != "merge" or base.stages is not None:
        raise ConfigError("Calibration chooses the stages of method 'merge': leave method and stages out.")
    remove(model)
    sections, default = stage_choices(model)
    with evaluating(model), torch.inference_mode():
        try:
            calibration = _Calibration(model, images, base, batch_size, progress)
            return calibration.run(sections, default, target, budget, moves, seed)
        finally:
            remove(model)


class _Calibration:
    """A model, images, what it makes of them unpatched, and what its blocks cost."""

    def __init__(self, model: nn.Module, images: Tensor, base: MergeConfig, batch_size: int, progress: bool):
        self.model, self.batches, self.base, self.progress = model, images.split(batch_size), base, progress
        self.full = count_macs(model, images[:1])
        self.expected = [self._output(batch) for batch in self.batches]

    def _output(self, batch: Tensor) -> Tensor:
        output = self.model(batch).flatten(1).float()
        return output if getattr(self.model, "num_classes", None) == 0 else output.log_softmax(1)

    def config(self, schedule: Mapping[int, float]) -> MergeConfig:
        return replace(self.base, keep_rate=dict(sorted(schedule.items())))

    def moved(self, schedule: Mapping[int, float]) -> Tensor:
        """Return how far the output of each image moves: the root of the KL divergence to the unpatched one.

        For a model without classes, of 1 - the cosine of the outputs.
        """
        plan(self.model, self.config(schedule))
        distances = []
        for batch, expected in zip(self.batches, self.expected, strict=True):
            output = self._output(batch)
            if getattr(self.model, "num_classes", None) == 0:
                distance = 1 - F.cosine_similarity(output, expected)
            else:
                distance = F.kl_div(output, expected, log_target=True, reduction="none").sum(dim=1)
            # The root, or a few images that move far would decide for all the others.
            distances.append(distance.clamp(min=0).sqrt())
        return torch.cat(distances)

    def share(self, schedule: Mapping[int, float]) -> float:
        """Return the share of the multiply-adds that a schedule leaves."""
        return count_macs(apply(self.model, self.config(schedule)), self.batches[0][:1]) / self.full

    def time_shares(self, schedules: Sequence[Mapping[int, float]]) -> list[float]:
        """Return the share of the time that each schedule leaves."""
        configs = [self.config(schedule) for schedule in schedules]
        unpatched, *mine = time_in_turns(self.model, [None, *configs], self.batches[0])
        return [median(b / a for a, b in zip(unpatched, times, strict=True)) for times in mine]

    def run(
        self, sections: Sequence[range], default: Sequence[int], target: float, budget: str, moves: int, seed: int
    ) -> MergeConfig:
        blocks = [block for section in sections for block in section]
        patterns = _patterns(sections, default)
        total = len(blocks) * len(PROBES) + len(patterns) + 1 + moves
        with tqdm(total=total, desc="calibration", unit="schedule", leave=False, disable=not self.progress) as bar:
            prices = {block: self._price(block, bar) for block in blocks}
            savings = {block: (1 - self.share({block: PROBES[1]})) / (1 - PROBES[1]) for block in blocks}

            schedules = [*patterns, _cheapest(sections, prices, savings, 1 - target)]
            found = self._all_fitted(schedules, target, budget, target)
            if not found:
                raise ConfigError(f"No schedule leaves {target:.2f} of this model's work. Choose a larger target.")
            measured = [(schedule, self._measured(schedule, bar)) for schedule in found]
            best = _better(measured[0], min(measured, key=lambda pair: pair[1].mean().item()))
            share = self.share(best[0])
            draw = random.Random(seed)
            for _ in range(moves):
                changed = self._fitted(_moved(best[0], blocks, draw), share)
                if changed is not None:
                    best = _better(best, (changed, self._measured(changed, bar)))
            schedule = best[0]
            if budget == "latency":  # moves were fitted by multiply-adds
                schedule = next(iter(self._all_fitted([schedule], target, budget, share)), schedule)
        return self.config(schedule)

    def _all_fitted(
        self, schedules: Sequence[Mapping[int, float]], target: float, budget: str, start: float
    ) -> list[dict[int, float]]:
        """Return the schedules that can leave that share of the work, changed so that they do.

        For a budget of time, the search begins at the share `start` of the multiply-adds; else it is the target.
        """

        def fitted(wanted: Iterable[tuple[float, Mapping[int, float]]]) -> list[tuple[float, dict[int, float]]]:
            found = ((share, self._fitted(schedule, share)) for share, schedule in wanted)
            return [(share, schedule) for share, schedule in found if schedule is not None]

        fits = fitted((start, schedule) for schedule in schedules)
        for _ in range(3 if budget == "latency" else 0):
            times = self.time_shares([schedule for _, schedule in fits])
            fits = fitted(
                (min(0.99, max(0.05, share + target - time)), schedule)
                for (share, schedule), time in zip(fits, times, strict=True)
            )
        return [schedule for _, schedule in fits]

    def _measured(self, schedule: Mapping[int, float], bar: tqdm) -> Tensor:
        bar.update()
        return self.moved(schedule)

    def _price(self, block: int, bar: tqdm) -> list[tuple[float, float]]:
        """Return (share of the tokens merged, how far the output moves) for a block alone, both growing."""
        price, largest = [], 1e-12
        for rate in PROBES:
            largest = max(largest * 1.001, self._measured({block: rate}, bar).mean().item())
            price.append((1 - rate, largest))
        return price

    def _fitted(self, schedule: Mapping[int, float], share: float) -> dict[int, float] | None:
        """Raise all rates to one power, so that the schedule leaves that share of the work; None if it cannot."""
        low, high = (0.0, 1.0), (1.0, self.share(schedule))
        while high[1] > share:
            if high[0] > 1000:
                return None
            low, high = high, (2 * high[0], self.share(_powers(schedule, 2 * high[0])))
        power, best = high[0], (math.inf, high[0])
        for _ in range(12):
            left = self.share(_powers(schedule, power))
            best = min(best, (abs(left - share), power))
            if best[0] <= 0.001:
                break
            low, high = ((power, left), high) if left > share else (low, (power, left))
            position = (low[1] - share) / max(1e-9, low[1] - high[1])
            power = low[0] + min(0.9, max(0.1, position)) * (high[0] - low[0])
        return _powers(schedule, best[1])


def _better(best: Measured, other: Measured) -> Measured:
    """Return another schedule if it moves the outputs less, by more than the standard error of the paired differences.

    Otherwise the best of many schedules would be the one that happens to suit these images.
    """
    difference = other[1] - best[1]
    error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return other if difference.mean().item() < -error else best


def _patterns(sections: Sequence[range], default: Sequence[int]) -> list[dict[int, float]]:
    """Return schedules of equal rates: the default stages, earlier ones, and every first, second, ... block.

    Regular ones: what is lost is a flat function of the schedule, which they cover better than changes of one block.
    """
    blocks = [block for section in sections for block in section]
    earlier = {max(section.start, block - 1) for section in sections for block in section if block in default}
    early = blocks[1 :: max(1, len(blocks) // 8)][:4]  # in the first half
    regular = [blocks[start::step] for step in range(1, 5) for start in range(min(step + 1, 3))]
    found = dict.fromkeys(tuple(sorted(stages)) for stages in (default, earlier, early, *regular) if stages)
    return [dict.fromkeys(stages, 0.7) for stages in found]


def _powers(schedule: Mapping[int, float], power: float) -> dict[int, float]:
    """Raise rates to a power, and leave out stages that keep nearly everything."""
    rates = {block: max(0.02, rate**power) for block, rate in schedule.items()}
    return {block: rate for block, rate in rates.items() if rate < 0.995}


def _moved(schedule: Mapping[int, float], blocks: Sequence[int], draw: random.Random) -> dict[int, float]:
    """Let one stage merge less, and another block more."""
    changed = dict(schedule)
    giver = draw.choice(list(changed))
    taker = draw.choice([block for block in blocks if block != giver] or [giver])
    step = math.exp(STEP * draw.choice((0.5, 1.0, 2.0)))
    changed[giver] = min(1.0, changed[giver] * step)
    changed[taker] = changed.get(taker, 1.0) / step
    return {block: rate for block, rate in changed.items() if rate < 1}


def _cheapest(
    sections: Sequence[range],
    prices: Mapping[int, Sequence[tuple[float, float]]],
    savings: Mapping[int, float],
    wanted: float,
) -> dict[int, float]:
    """Return the schedule of least price that saves what is wanted, by bisection on the worth of a saving.

    Args:
        sections: runs of blocks through which tokens stay fewer.
        prices: see `_Calibration._price`.
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
