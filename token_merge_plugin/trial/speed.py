"""Speed of several configs of one model, each timed in turns with the unpatched model."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.patching import remove
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import Use, forward, halved, peak_memory, plan, time_in_turns
from token_merge_plugin.trial.results import UNPATCHED


@dataclass(frozen=True)
class Timing:
    """Times and memory of a contender, and of the unpatched model beside it.

    Attributes:
        unpatched_seconds: of an image in a full batch, median over the rounds.
        speed_up: median over the rounds of the unpatched model's time, divided by the contender's.
        unpatched_latency: seconds of a batch of one image, median over the rounds.
        latency_speed_up: as `speed_up`, of these.
        memory, unpatched_memory: most bytes of the activations of a full batch.
        speed_up_interval, latency_speed_up_interval: see `median_interval`.
    """

    unpatched_seconds: float
    speed_up: float
    unpatched_latency: float
    latency_speed_up: float
    memory: int
    unpatched_memory: int
    speed_up_interval: tuple[float, float]
    latency_speed_up_interval: tuple[float, float]


class Speed:
    """How fast contenders are, each timed in turns with the unpatched model.

    Attributes:
        images: [B, C, H, W], the batch that is timed, halved where memory runs out.
        timings: {contender: its times so far}, all at this batch size.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        rounds: int,
        seconds: float,
        compiled: bool = False,
        use: Use = forward,
    ):
        self.model, self.images, self.compiled, self.use = model, images, compiled, use
        self.rounds, self.seconds = rounds, seconds
        self.timings: dict[str, Timing] = {}

    @property
    def batch_size(self) -> int:
        return len(self.images)

    def measure(self, configs: Mapping[str, MergeConfig | None], journal: Journal, progress: bool) -> None:
        """Time all contenders at one batch size that fits into memory; those that the journal lacks.

        Args:
            configs: {contender: its config}; None for the unpatched model.
            journal: to which each contender's times are added.
            progress: show a bar.
        """
        while True:
            try:
                return self._measure_at_one_size(configs, journal, progress)
            except torch.OutOfMemoryError:
                self.images = self.images[: halved(self.batch_size)]

    def _measure_at_one_size(self, configs: Mapping[str, MergeConfig | None], journal: Journal, progress: bool) -> None:
        # Speeds at different batch sizes are not to be compared.
        known = [entry for entry in journal.of("speed") if entry["batch_size"] == self.batch_size]
        self.timings = {entry["name"]: _timing(entry["values"]) for entry in known}
        patched = {name: config for name, config in configs.items() if config is not None}
        total, done = len(patched), len(self.timings)
        with tqdm(desc="speed", total=total, initial=done, unit="setting", leave=False, disable=not progress) as bar:
            for name, config in patched.items():
                if name not in self.timings:
                    timing = self.timings[name] = self._timed(config)
                    journal.write("speed", name=name, batch_size=self.batch_size, values=asdict(timing))
                    bar.update()

    def _timed(self, config: MergeConfig) -> Timing:
        throughput, latency = (
            time_in_turns(
                self.model,
                [None, config],
                images,
                rounds=self.rounds,
                seconds=seconds,
                compiled=self.compiled,
                use=self.use,
            )
            for images, seconds in ((self.images, self.seconds), (self.images[:1], self.seconds / 5))
        )
        ratios, latency_ratios = speed_ups(*throughput), speed_ups(*latency)
        return Timing(
            unpatched_seconds=statistics.median(throughput[0]) / self.batch_size,
            speed_up=statistics.median(ratios),
            unpatched_latency=statistics.median(latency[0]),
            latency_speed_up=statistics.median(latency_ratios),
            memory=peak_memory(partial(self.use, plan(self.model, config)), self.images),
            unpatched_memory=peak_memory(partial(self.use, remove(self.model)), self.images),
            speed_up_interval=median_interval(ratios),
            latency_speed_up_interval=median_interval(latency_ratios),
        )

    def fields(self, contender: str, reduction: float) -> dict[str, Any]:
        """Return the fields of a `TrialRow` that were measured: none if the contender was not timed.

        The unpatched model was timed beside each of the others: its times are the median of these. The others' follow
        from it and the speed-up, which is of times side by side: so a row's numbers agree, and rows can be compared
        although the machine's load changes from one to the next.

        Args:
            contender: its name.
            reduction: share of the multiply-adds that it saves.
        """
        if not self.timings or (contender != UNPATCHED and contender not in self.timings):
            return {}
        seconds, latency, memory = (
            statistics.median(getattr(timing, f"unpatched_{name}") for timing in self.timings.values())
            for name in ("seconds", "latency", "memory")
        )
        timing = self.timings.get(contender)
        speed_up, latency_speed_up = (1.0, 1.0) if timing is None else (timing.speed_up, timing.latency_speed_up)
        return {
            "images_per_second": speed_up / seconds,
            "speed_up": speed_up,
            "speed_up_interval": timing and timing.speed_up_interval,
            "ideal_share": speed_up * (1 - reduction),
            "latency": 1e3 * latency / latency_speed_up,
            "latency_speed_up": latency_speed_up,
            "latency_speed_up_interval": timing and timing.latency_speed_up_interval,
            "peak_memory": (memory if timing is None else timing.memory) / 1e6,
        }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a median, from the order of the values alone (the sign test's).

    Of fewer than six values it is their range, which is less sure than that.
    """
    ordered, number = sorted(values), len(values)
    below, cases = 0, 1  # left out at each end; of 2^number equally likely cases, those with the median beyond it
    while cases + math.comb(number, below + 1) <= 0.025 * 2**number:
        below += 1
        cases += math.comb(number, below)
    return ordered[below], ordered[number - 1 - below]


def speed_ups(unpatched: Sequence[float], patched: Sequence[float]) -> list[float]:
    """Return how many times as fast each pass was as the unpatched model's in the same round."""
    return [before / after for before, after in zip(unpatched, patched, strict=True)]


def _timing(values: Mapping[str, Any]) -> Timing:
    """Return a timing from a journal, whose lists were tuples."""
    fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Timing(**fields)
