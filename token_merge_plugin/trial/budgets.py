"""What schedules leave of a model's work, multiply-adds or time, and schedules made to leave what is asked for."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from torch import Tensor, nn

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.patching import apply, remove
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import Use, forward, time_in_turns
from token_merge_plugin.trial.schedules import STRONGEST, Shape

WORK = {"compute": "multiply-adds", "latency": "time"}


class Budget:
    """A share of a model's work.

    Args:
        model: a supported model in eval mode. It is left patched, by whatever was looked at last.
        images: [B, C, H, W], one batch on the model's device.
        kind: "compute", multiply-adds, or "latency", the measured time of that batch.
        target: share of the unpatched model's work that is to be left.
        journal: keeps measured times, and gives them back in the same order when the same work is done again.
        use: what the model is run for.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        kind: str,
        target: float,
        journal: Journal | None = None,
        use: Use = forward,
    ):
        self.model, self.images, self.kind, self.target, self.use = model, images, kind, target, use
        self.journal = Journal(None, {}) if journal is None else journal
        self._known_times = deque(self.journal.of("time"))
        self.full = count_macs(remove(model), images[:1], use)

    def compute_left(self, base: MergeConfig, schedule: Mapping[int, float]) -> float:
        """Return the share of the multiply-adds that a schedule leaves, with the other options of `base`."""
        return count_macs(apply(self.model, scheduled(base, schedule)), self.images[:1], self.use) / self.full

    def time_left(self, base: MergeConfig, schedules: Sequence[Mapping[int, float]]) -> list[float]:
        """Return the share of the time that each schedule leaves."""
        configs = [scheduled(base, schedule) for schedule in schedules]
        names = [config.to_json() for config in configs]
        if self._known_times and self._known_times[0]["configs"] == names:
            return self._known_times.popleft()["left"]
        unpatched, *mine = time_in_turns(self.model, [None, *configs], self.images, use=self.use)
        left = [median(b / a for a, b in zip(unpatched, times, strict=True)) for times in mine]
        self.journal.write("time", configs=names, left=left)
        return left

    def left(self, base: MergeConfig, schedule: Mapping[int, float]) -> float:
        """Return the share of the work that a schedule leaves."""
        return self.time_left(base, [schedule])[0] if self.kind == "latency" else self.compute_left(base, schedule)

    def met(
        self, base: MergeConfig, shapes: Sequence[Shape], compute: float | None = None
    ) -> dict[int, dict[int, float]]:
        """Return the schedule of each shape that leaves the target, by the shape's place: {place: schedule}.

        Those that cannot leave so little are missing.

        Args:
            base: the other options.
            shapes: of schedules.
            compute: share of the multiply-adds at which the search begins for a budget of time; None for the target.
        """
        wanted = dict.fromkeys(range(len(shapes)), self.target if compute is None else compute)
        found = self._all_with_compute(base, shapes, wanted)
        for _ in range(3 if self.kind == "latency" else 0):
            times = self.time_left(base, [*found.values()])
            for place, time in zip(found, times, strict=True):
                wanted[place] = min(0.99, max(0.05, wanted[place] + self.target - time))
            found = self._all_with_compute(base, shapes, {place: wanted[place] for place in found})
        return found

    def _all_with_compute(
        self, base: MergeConfig, shapes: Sequence[Shape], wanted: Mapping[int, float]
    ) -> dict[int, dict[int, float]]:
        found = {place: self.with_compute(base, shapes[place], share) for place, share in wanted.items()}
        return {place: schedule for place, schedule in found.items() if schedule is not None}

    def with_compute(self, base: MergeConfig, shape: Shape, share: float) -> dict[int, float] | None:
        """Return the schedule of a shape that leaves that share of the multiply-adds; None if none does."""
        low, high = (0.0, 1.0), (1.0, self.compute_left(base, shape(1.0)))
        while high[1] > share:
            if high[0] > STRONGEST:
                return None
            low, high = high, (2 * high[0], self.compute_left(base, shape(2 * high[0])))
        strength, best, seen = high[0], (math.inf, high[0]), [low[1]]
        for _ in range(12):
            left = self.compute_left(base, shape(strength))
            best = min(best, (abs(left - share), strength))
            seen.append(left)
            if best[0] <= 0.001 or seen.count(left) > 2:  # tokens are whole: there may be nothing closer
                break
            low, high = ((strength, left), high) if left > share else (low, (strength, left))
            position = (low[1] - share) / max(1e-9, low[1] - high[1])
            strength = low[0] + min(0.9, max(0.1, position)) * (high[0] - low[0])
        return shape(best[1])


def scheduled(base: MergeConfig, schedule: Mapping[int, float]) -> MergeConfig:
    """Return a config with this schedule and the other options of `base`."""
    return replace(base, keep_rate=dict(sorted(schedule.items())))
