"""Choose stages, keep rates and options for one model and a budget, from a few hundred unlabelled images.

Each block is tried alone at several keep rates: how far does the output move, and how much work is saved? The schedule
that should be the cheapest by these prices is measured beside regular ones, the best is tried with other options, and
then steps of it are moved between blocks as long as that brings the output closer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import ConfigError, counted
from token_merge_plugin.patching import StageChoices, apply, remove, stage_choices
from token_merge_plugin.trial.accuracy import SURE
from token_merge_plugin.trial.budgets import WORK, Budget, scheduled
from token_merge_plugin.trial.dense import Head, describe_head, evaluating_head, use_of
from token_merge_plugin.trial.distances import Unpatched, paired_difference
from token_merge_plugin.trial.images import AnyImages, collect_images
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import check_images, device_of, evaluating
from token_merge_plugin.trial.schedules import PROBES, STRONGEST, Shape, by_number, cheapest, moved, powers, regular

# Options that are tried with the best schedule, unless the user has given them; with what makes them sure enough, in
# standard errors.
ALTERNATIVES: tuple[tuple[str, Any, float], ...] = (
    ("importance", "class_attention", 1.0),
    ("importance", "uniform", 1.0),
    ("similarity", "tokens", 1.0),
    ("similarity", "mean_keys", 1.0),
    ("proportional_attention", False, SURE),
)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. As a string: sentences for people.

    Attributes:
        config: what it returned.
        budget: "compute" or "latency".
        left: share of the unpatched model's work that the config leaves.
        images: how many the distances are means over: those that the config was chosen by.
        measure: what a distance to the unpatched model is, in words.
        distance: the config's.
        default_distance: the default schedule's at the same share; None if it cannot leave so little.
        difference: `distance` less `default_distance`, and half of its paired 95 % confidence interval; None as above.
    """

    config: MergeConfig
    budget: str
    left: float
    images: int
    measure: str
    distance: float
    default_distance: float | None
    difference: tuple[float, float] | None

    def __str__(self) -> str:
        reached = (
            f"{self.left:.3f} of the {WORK[self.budget]} are left.\n"
            f"Distance to the unpatched model ({self.measure}, mean of the {counted(self.images, 'image')} given): "
            f"{self.distance:.4f}; "
        )
        if self.difference is None:
            return reached + "the default schedule cannot leave so little."
        mean, half = self.difference
        return reached + (
            f"of the default schedule at the same share {self.default_distance:.4f}, a difference of {mean:+.4f} ± "
            f"{half:.4f} (95 %, paired)."
        )


def calibrate(
    model: nn.Module,
    images: AnyImages,
    target: float = 0.67,
    *,
    budget: str = "compute",
    head: Head | None = None,
    num_images: int | None = 300,
    moves: int = 24,
    batch_size: int = 50,
    seed: int = 0,
    progress: bool = False,
    log: str | Path | None = None,
    report: Callable[[Calibration], Any] | None = None,
    **options: Any,
) -> MergeConfig:
    """Return the config that moves the model's output the least, of those that leave a share of its work.

    How far the output moves is the root of the KL divergence of the predictions; for a model without classes the
    relative error of its patch tokens, or of what a head makes of them. Schedules by rate and by number are measured,
    and the best is tried with each importance, with tokens and mean keys compared, and without proportional attention,
    which is switched off only where that surely helps.

    Args:
        model: a supported model. It is unpatched, and in the mode it was in, at the end.
        images: preprocessed, without labels, on any device: a tensor [B, C, H, W], a DataLoader, another iterable of
            batches (tensors, or tuples, lists or dicts with one), or what a trial takes. They are kept in memory, on
            the CPU unless they are one tensor.
        target: share of the unpatched model's work that is to be left, in (0, 1).
        budget: what work is: "compute", multiply-adds, or "latency", the measured time of a batch of `batch_size`.
        head: what a dense model's features are for, on the model's device: it takes what `forward_features` returns.
        num_images: how many images are used, the first ones; an iterable is read no further. None for all.
        moves: how many changes of the schedule are measured at the end.
        batch_size: images a forward pass.
        seed: of the moves. The same seed gives the same schedule; for "latency", as far as times repeat.
        progress: show a bar.
        log: file to which what was measured is added as JSON lines. A calibration that finds lines of its own there
            goes on from them, to the same schedule.
        report: called with what was reached, a `Calibration`. `report=print` prints it.
        options: further fields of `MergeConfig`, for "merge". An option that is given is not chosen.

    Returns:
        A config whose `keep_rate` is a mapping {block: rate}; see `MergeConfig.to_json`.

    Raises:
        ConfigError: an option is not allowed, no schedule leaves so little, or the log is another calibration's.
        DataError: there are no images, or they are not what the model takes.
        UnsupportedModelError, PatchStateError: as `apply`.
    """
    _check_request(target, budget, batch_size=batch_size, num_images=num_images, moves=moves)
    base = MergeConfig.of(1.0, **options)
    if base.method != "merge" or base.stages is not None:
        raise ConfigError("Calibration chooses the stages of method 'merge': leave method and stages out.")
    remove(model)
    choices = stage_choices(model)
    batches = collect_images(images, num_images).split(batch_size)
    with evaluating(model), evaluating_head(head), torch.inference_mode():
        try:
            first = batches[0].to(device_of(model))
            check_images(model, first[:1])
            about = {
                "model": type(model).__name__,
                "parameters": sum(p.detach().double().sum().item() for p in model.parameters()),
                "images": [sum(map(len, batches)), *first.shape[1:], sum(b.double().sum().item() for b in batches)],
                "asked": [target, budget, moves, batch_size, seed, base.to_json(), head and describe_head(head)],
                "device": str(first.device),
                "torch": torch.__version__,
            }
            alternatives = [alternative for alternative in ALTERNATIVES if alternative[0] not in options]
            with Journal(log, about) as journal:
                work = Budget(model, first, budget, target, journal, use_of(model, head))
                _check_target(work, base, [choices.blocks, choices.equal_rates])
                search = _Search(Unpatched(model, batches, head), work, choices, journal)
                found = search.run(base, alternatives, moves, seed, progress)
        finally:
            remove(model)
    if report is not None:
        report(found)
    return found.config


def _check_request(target: object, budget: object, **numbers: object) -> None:
    if budget not in WORK:
        raise ConfigError(f"budget={budget!r} is not known. Choose one of {', '.join(map(repr, WORK))}.")
    if not isinstance(target, float) or not 0 < target < 1:
        raise ConfigError(f"target={target!r} is not a float in (0, 1). 0.67 leaves two thirds of the work.")
    for name, number in numbers.items():
        least = 0 if name == "moves" else 1
        if name == "num_images" and number is None:
            continue
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise ConfigError(f"{name}={number!r} is not a whole number of at least {least}.")


def _check_target(work: Budget, base: MergeConfig, stages: Sequence[Sequence[int]]) -> None:
    """Refuse at once a target that is out of reach: stages that merge nearly everything leave more.

    Raises:
        ConfigError: as said.
    """
    least = min(work.compute_left(base, powers(dict.fromkeys(blocks, 0.5), STRONGEST)) for blocks in stages)
    if work.target < least:
        raise ConfigError(
            f"No schedule leaves {work.target:g} of this model's multiply-adds: the least is {least:.3f}. Choose a "
            "larger target."
        )


class _Measured(NamedTuple):
    """A schedule, the config that its other options are from, and how far it moves the output of each image."""

    schedule: dict[int, float]
    base: MergeConfig
    distances: Tensor

    @property
    def distance(self) -> float:
        return self.distances.mean().item()


class _Search:
    """Looks for the config that moves the outputs the least within the budget."""

    def __init__(self, unpatched: Unpatched, budget: Budget, choices: StageChoices, journal: Journal):
        self.unpatched, self.budget, self.sections, self.journal = unpatched, budget, choices.sections, journal
        self.known = {entry["config"]: torch.tensor(entry["distances"]) for entry in journal.of("distances")}
        self.blocks = choices.blocks
        self.shapes: list[Shape] = [
            lambda strength: choices.default(max(0.01, 0.7**strength)),
            *regular(self.sections, choices.equal_rates),
            *by_number(self.sections),
        ]

    def run(
        self,
        base: MergeConfig,
        alternatives: Sequence[tuple[str, Any, float]],
        moves: int,
        seed: int,
        progress: bool,
    ) -> Calibration:
        total = len(self.blocks) * len(PROBES) + len(self.shapes) + 1 + len(alternatives) + moves
        with tqdm(total=total, desc="calibration", unit="schedule", leave=False, disable=not progress) as self.bar:
            candidates = self._candidates(base, [*self.shapes, partial(powers, self._cheapest(base))])
            default_one = candidates.get(0)
            first = next(iter(candidates.values()))
            best = better(first, min(candidates.values(), key=lambda candidate: candidate.distance))
            for option, value, errors in alternatives:
                best = self._with_option(best, option, value, errors)
            best = self._moved(best, moves, random.Random(seed))
        return self._result(best, default_one)

    def _candidates(self, base: MergeConfig, shapes: Sequence[Shape]) -> dict[int, _Measured]:
        """Measure the schedules that meet the budget: {place: measured}, without the shapes that cannot."""
        met = self.budget.met(base, shapes)
        if not met:
            raise ConfigError(
                f"No schedule leaves {self.budget.target:.2f} of this model's work. Choose a larger target."
            )
        return {place: self._measured(schedule, base) for place, schedule in met.items()}

    def _measured(self, schedule: dict[int, float], base: MergeConfig) -> _Measured:
        config = scheduled(base, schedule)
        apply(self.budget.model, config)  # also where it is known: a model may refuse an option
        distances = self.known.get(config.to_json())
        if distances is None:
            distances = self.unpatched.distances()
            self.journal.write("distances", config=config.to_json(), distances=distances.tolist())
        self.bar.update()
        return _Measured(schedule, base, distances)

    def _with_option(self, best: _Measured, option: str, value: Any, errors: float) -> _Measured:
        """Try the best schedule with another option; models that do not take it keep what they have."""
        base, schedule = replace(best.base, **{option: value}), best.schedule
        try:
            if option == "similarity":  # comparing longer descriptors is work as well
                compute = self.budget.compute_left(best.base, schedule)
                changed = self.budget.with_compute(base, partial(powers, schedule), compute)
                if changed is None:
                    return best
                schedule = changed
            return better(best, self._measured(schedule, base), errors)
        except ConfigError:
            return best

    def _cheapest(self, base: MergeConfig) -> dict[int, float]:
        """Return the schedule that should move the output the least, by what each block does alone."""
        prices, savings = {}, {}
        for block in self.blocks:
            price, largest = [], 1e-12
            for rate in PROBES:  # both grow: that is what a price must do
                largest = max(largest * 1.001, self._measured({block: rate}, base).distance)
                price.append((1 - rate, largest))
            prices[block] = price
            savings[block] = (1 - self.budget.compute_left(base, {block: PROBES[1]})) / (1 - PROBES[1])
        return cheapest(self.sections, prices, savings, 1 - self.budget.target)

    def _moved(self, best: _Measured, moves: int, draw: random.Random) -> _Measured:
        """Change the best schedule, at equal multiply-adds, and keep each change that is better."""
        compute = self.budget.compute_left(best.base, best.schedule)
        for _ in range(moves):
            shape = partial(powers, moved(best.schedule, self.blocks, draw))
            changed = self.budget.with_compute(best.base, shape, compute)
            if changed is not None:
                best = better(best, self._measured(changed, best.base))
        if self.budget.kind == "latency":
            met = self.budget.met(best.base, [partial(powers, best.schedule)], compute)
            best = self._measured(met.get(0, best.schedule), best.base)
        return best

    def _result(self, best: _Measured, default: _Measured | None) -> Calibration:
        difference = None
        if default is not None:
            mean, error = paired_difference(best.distances, default.distances)
            difference = (mean, SURE * error)
        return Calibration(
            config=scheduled(best.base, best.schedule),
            budget=self.budget.kind,
            left=self.budget.left(best.base, best.schedule),
            images=len(best.distances),
            measure=self.unpatched.measure,
            distance=best.distance,
            default_distance=None if default is None else default.distance,
            difference=difference,
        )


def better(best: _Measured, other: _Measured, errors: float = 1.0) -> _Measured:
    """Return another candidate if it moves the outputs less, by more than so many standard errors.

    Otherwise the best of many schedules would be the one that happens to suit these images. A single image has no
    standard error: there, less is less.
    """
    mean, error = paired_difference(other.distances, best.distances)
    return other if mean < (-errors * error if len(best.distances) > 1 else 0.0) else best
