"""Speed of several configs of one model, each timed in turns with the unpatched model."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.patching import remove
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import halved, peak_memory, plan, time_in_turns
from token_merge_plugin.trial.results import UNPATCHED


@dataclass(frozen=True)
class Timing:
    """Times and memory of a contender, and of the unpatched model beside it.

    Attributes:
        seconds, unpatched_seconds: of an image in a full batch, median over the rounds.
        speed_up: median over the rounds of the unpatched model's time, divided by the contender's.
        latency, unpatched_latency: seconds of a batch of one image, median over the rounds.
        latency_speed_up: as `speed_up`, of these.
        memory, unpatched_memory: most bytes of the activations of a full batch.
    """

    seconds: float
    unpatched_seconds: float
    speed_up: float
    latency: float
    unpatched_latency: float
    latency_speed_up: float
    memory: int
    unpatched_memory: int


class Speed:
    """How fast contenders are, each timed in turns with the unpatched model.

    Attributes:
        images: [B, C, H, W], the batch that is timed, halved where memory runs out.
        timings: {contender: its times so far}, all at this batch size.
    """

    def __init__(self, model: nn.Module, images: Tensor, rounds: int, seconds: float):
        self.model, self.images = model, images
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
        self.timings = {entry["name"]: Timing(**entry["values"]) for entry in known}
        patched = {name: config for name, config in configs.items() if config is not None}
        total, done = len(patched), len(self.timings)
        with tqdm(desc="speed", total=total, initial=done, unit="setting", leave=False, disable=not progress) as bar:
            for name, config in patched.items():
                if name not in self.timings:
                    timing = self.timings[name] = self._timed(config)
                    journal.write("speed", name=name, batch_size=self.batch_size, values=asdict(timing))
                    bar.update()

    def _timed(self, config: MergeConfig) -> Timing:
        configs = [None, config]
        throughput = time_in_turns(self.model, configs, self.images, rounds=self.rounds, seconds=self.seconds)
        latency = time_in_turns(self.model, configs, self.images[:1], rounds=self.rounds, seconds=self.seconds / 5)
        return Timing(
            seconds=statistics.median(throughput[1]) / self.batch_size,
            unpatched_seconds=statistics.median(throughput[0]) / self.batch_size,
            speed_up=_speed_up(*throughput),
            latency=statistics.median(latency[1]),
            unpatched_latency=statistics.median(latency[0]),
            latency_speed_up=_speed_up(*latency),
            memory=peak_memory(plan(self.model, config), self.images),
            unpatched_memory=peak_memory(remove(self.model), self.images),
        )

    def fields(self, contender: str, reduction: float) -> dict[str, float]:
        """Return the fields of a `TrialRow` that were measured: none if the contender was not timed.

        Args:
            contender: its name. The unpatched model was timed beside each of the others: its times are their median.
            reduction: share of the multiply-adds that it saves.
        """
        if contender == UNPATCHED and self.timings:
            seconds, latency, memory = (
                statistics.median(getattr(timing, f"unpatched_{name}") for timing in self.timings.values())
                for name in ("seconds", "latency", "memory")
            )
            speed_up = latency_speed_up = 1.0
        elif contender in self.timings:
            timing = self.timings[contender]
            seconds, latency, memory = timing.seconds, timing.latency, timing.memory
            speed_up, latency_speed_up = timing.speed_up, timing.latency_speed_up
        else:
            return {}
        return {
            "images_per_second": 1 / seconds,
            "speed_up": speed_up,
            "ideal_share": speed_up * (1 - reduction),
            "latency": 1e3 * latency,
            "latency_speed_up": latency_speed_up,
            "peak_memory": memory / 1e6,
        }


def _speed_up(unpatched: Sequence[float], patched: Sequence[float]) -> float:
    return statistics.median(before / after for before, after in zip(unpatched, patched, strict=True))
