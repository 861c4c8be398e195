"""A training-free trial: what each method of reducing tokens saves and costs, on one model and one set of images.

Speed first: each contender in turns with the unpatched model, on one batch. Then accuracy: each batch of the images
goes through all contenders, so that every number is about the same images, and an interrupted trial has one for each.
"""

import math
import platform
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin.config import METHODS, MergeConfig
from token_merge_plugin.errors import ConfigError, DataError
from token_merge_plugin.patching import apply, remove
from token_merge_plugin.trial.counting import count_macs, equal_compute
from token_merge_plugin.trial.images import Batch, Images
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import evaluating, peak_memory, plan, time_in_turns
from token_merge_plugin.trial.results import UNPATCHED, TrialResult, TrialRow


class Contender(NamedTuple):
    """One row of the trial: a method at a keep rate, or the unpatched model, whose config is None."""

    method: str
    keep_rate: float | None
    config: MergeConfig | None
    macs: int

    @property
    def name(self) -> str:
        return self.method if self.keep_rate is None else f"{self.method} {self.keep_rate:g}"


@dataclass
class Counts:
    """Sums over images. `gained`: got right by this contender alone; `lost`: by the unpatched model alone."""

    images: int = 0
    top1: int = 0
    top5: int = 0
    gained: int = 0
    lost: int = 0
    agree: int = 0
    kl: float = 0.0
    cosine: float = 0.0

    def add(self, other: "Counts") -> "Counts":
        return Counts(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


def run_trial(
    model: nn.Module,
    data: Images,
    keep_rates: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5),
    methods: Sequence[str] = ("merge",),
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    accuracy: bool = True,
    rounds: int = 20,
    seconds: float = 8.0,
    log: str | Path | None = None,
    command: str = "",
    progress: bool = False,
    **options: Any,
) -> TrialResult:
    """Compare the unpatched model with methods at keep rates, over the same images.

    At each keep rate, every method is set to the multiply-adds of "merge" at that rate. Ctrl-C ends the trial early,
    and what was measured by then is returned: `images` is less than `total_images`. Where memory runs out, the batch is
    halved.

    Args:
        model: a supported model on its device; it is unpatched, and in the mode it was in, at the end.
        data: `open_data(...)`, or `Tensors(images, labels)`. Its batch size is that of the timed passes.
        keep_rates: floats in (0, 1].
        methods: of `MergeConfig`.
        name: the model's, for the report.
        dtype: of the forward passes: other than float32, by autocast.
        accuracy: otherwise only speed is measured, on the first batch.
        rounds, seconds: how long each contender is timed; see `measuring.time_in_turns`.
        log: file to which JSON lines are added as results come in. A trial that finds lines of its own there goes on
            behind them.
        command: what repeats the trial, for the report.
        progress: show bars.
        options: further fields of `MergeConfig`, for "merge".

    Raises:
        ConfigError: a keep rate, method or option is not allowed, or the log is another trial's.
        DataError: there are no images.
        UnsupportedModelError, PatchStateError: as `apply`.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"method={method!r} is not known. Choose from {', '.join(map(repr, METHODS))}.")
    configs = {rate: MergeConfig(rate, **options) for rate in keep_rates}
    if not all(isinstance(config.keep_rate, float) for config in configs.values()):
        raise ConfigError(
            f"keep_rates={tuple(keep_rates)} are not all floats: a trial compares methods at one keep rate."
        )
    trial = _Trial(model, data, dtype, progress)
    with evaluating(model), _unpatched_at_the_end(model):
        contenders, refused = trial.contenders(configs, methods)
        header = trial.header(name, contenders)
        with Journal(log, header) as journal:
            try:
                trial.speed(contenders, rounds, seconds, journal)
                if accuracy:
                    trial.accuracy(contenders, journal)
            except KeyboardInterrupt:
                trial.interrupted = True
    return trial.result(contenders, refused, header, command)


def evaluate(
    model: nn.Module,
    data: Images,
    config: MergeConfig,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    command: str = "",
    progress: bool = False,
) -> TrialResult:
    """Compare the unpatched model with one config, over the same images, without timing.

    Where torch.distributed is initialised, each process goes through its own images (`open_data(rank=...)`), and all of
    them return the result over all images.

    Args, Raises:
        as `run_trial`.
    """
    trial = _Trial(model, data, dtype, progress)
    with evaluating(model), _unpatched_at_the_end(model):
        image = trial.batch[:1]
        contenders = [
            Contender(UNPATCHED, None, None, count_macs(remove(model), image)),
            Contender(config.method, _rate(config), config, count_macs(apply(model, config), image)),
        ]
        with Journal(None, {}) as journal:
            try:
                trial.accuracy(contenders, journal)
            except KeyboardInterrupt:
                trial.interrupted = True
        trial.gather()
    return trial.result(contenders, {}, trial.header(name, contenders), command)


def _rate(config: MergeConfig) -> float | None:
    return config.keep_rate if isinstance(config.keep_rate, float) and config.r is None else None


class _Trial:
    """A trial under way: what it has measured so far."""

    def __init__(self, model: nn.Module, data: Images, dtype: torch.dtype, progress: bool):
        self.model, self.data, self.progress = model, data, progress
        first = next(iter(data.batches()), None)
        if first is None:
            raise DataError(f"There are no images: {data.description}.")
        self.batch = first.images
        self.device = self.batch.device
        self.batch_size = min(data.batch_size, len(data))
        self.dtype = dtype
        self.total = len(data)
        self.interrupted = False
        self.timing: dict[str, dict[str, float]] = {}
        self.counts: dict[str, Counts] = {}
        self.unreadable: list[str] = []

    def bar(self, total: int, what: str, unit: str, done: int = 0) -> tqdm:
        return tqdm(total=total, initial=done, desc=what, unit=unit, leave=False, disable=not self.progress)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def contenders(
        self, configs: dict[float, MergeConfig], methods: Sequence[str]
    ) -> tuple[list[Contender], dict[str, str]]:
        """Return the unpatched model and each method at each keep rate; and {method: why it is refused}."""
        image = self.batch[:1]
        remove(self.model)
        contenders = [Contender(UNPATCHED, None, None, count_macs(self.model, image))]
        refused: dict[str, str] = {}
        with self.bar(len(configs) * len(methods), "equal multiply-adds", "setting") as bar:
            targets = {rate: count_macs(plan(self.model, config), image) for rate, config in configs.items()}
            for method in methods:
                for rate, config in configs.items():
                    try:
                        if method != "merge":
                            config = equal_compute(self.model, image, MergeConfig(rate, method=method), targets[rate])
                        macs = count_macs(plan(self.model, config), image)
                        contenders.append(Contender(method, rate, config, macs))
                    except ConfigError as error:
                        refused[method] = str(error)
                    bar.update()
        return contenders, refused

    def speed(self, contenders: Sequence[Contender], rounds: int, seconds: float, journal: Journal) -> None:
        """Time each contender in turns with the unpatched model; all at one batch size that fits into memory."""
        batch = self._timed_batch()
        while True:
            for entry in journal.of("speed"):
                if entry["batch_size"] == len(batch):
                    self.timing[entry["name"]] = entry["values"]
            try:
                with self.bar(len(contenders) - 1, "speed", "setting", len(self.timing)) as bar, self.autocast():
                    for contender in contenders[1:]:
                        if contender.name not in self.timing:
                            values = self._timed(contender, batch, rounds, seconds)
                            self.timing[contender.name] = values
                            journal.write("speed", name=contender.name, batch_size=len(batch), values=values)
                            bar.update()
                return
            except torch.OutOfMemoryError:
                # Speeds at different batch sizes are not to be compared.
                self.timing = {}
                batch = batch[: self._halved(len(batch))]

    def _timed_batch(self) -> Tensor:
        """Return one batch of the full size, of the first images, repeated where some could not be read."""
        repeats = math.ceil(self.batch_size / len(self.batch))
        return self.batch.repeat(repeats, 1, 1, 1)[: self.batch_size]

    def _halved(self, batch_size: int) -> int:
        if batch_size == 1:
            raise DataError("Memory runs out with a single image. Choose smaller images or another device.")
        torch.cuda.empty_cache()
        self.batch_size = batch_size // 2
        warnings.warn(f"Out of memory: the batch is halved to {self.batch_size}.", stacklevel=4)
        return self.batch_size

    def _timed(self, contender: Contender, batch: Tensor, rounds: int, seconds: float) -> dict[str, float]:
        def ratio(times: list[list[float]]) -> float:
            return statistics.median(unpatched / mine for unpatched, mine in zip(*times, strict=True))

        configs = [None, contender.config]
        throughput = time_in_turns(self.model, configs, batch, rounds=rounds, seconds=seconds)
        latency = time_in_turns(self.model, configs, batch[:1], rounds=rounds, seconds=seconds / 5)
        return {
            "seconds": statistics.median(throughput[1]) / len(batch),
            "unpatched_seconds": statistics.median(throughput[0]) / len(batch),
            "speed_up": ratio(throughput),
            "latency": statistics.median(latency[1]),
            "unpatched_latency": statistics.median(latency[0]),
            "latency_speed_up": ratio(latency),
            "memory": peak_memory(plan(self.model, contender.config), batch),
            "unpatched_memory": peak_memory(remove(self.model), batch),
        }

    def accuracy(self, contenders: Sequence[Contender], journal: Journal) -> None:
        """Take every batch through all contenders; behind what the journal has already."""
        start = 0
        for entry in journal.of("accuracy"):
            start, self.unreadable = entry["end"], entry["unreadable"]
            self.counts = {name: Counts(*values) for name, values in entry["counts"].items()}
        before = list(self.unreadable)
        with self.bar(len(self.data), "accuracy", "image", start) as bar, self.autocast():
            for batch in self.data.batches(start):
                results = self._compared(contenders, batch)
                for contender, result in zip(contenders, results, strict=True):
                    self.counts[contender.name] = self.counts.get(contender.name, Counts()).add(result)
                bar.update(batch.end - start)
                start = batch.end
                self.unreadable = before + [name for name in self.data.unreadable if name not in before]
                counts = {name: astuple(count) for name, count in self.counts.items()}
                journal.write("accuracy", end=start, unreadable=self.unreadable, counts=counts)

    def _compared(self, contenders: Sequence[Contender], batch: Batch) -> list[Counts]:
        while True:
            try:
                return compare(
                    self.model, [c.config for c in contenders], batch.images, batch.labels, batch_size=self.batch_size
                )
            except torch.OutOfMemoryError:
                self._halved(min(self.batch_size, len(batch.images)))

    def gather(self) -> None:
        """Add up what all processes have counted, if there are several."""
        if not torch.distributed.is_initialized():
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.counts, self.data.unreadable, len(self.data)))
        self.counts = {}
        for counts, _, _ in parts:
            for name, count in counts.items():
                self.counts[name] = self.counts.get(name, Counts()).add(count)
        self.unreadable = [name for _, unreadable, _ in parts for name in unreadable]
        self.total = sum(total for _, _, total in parts)

    def header(self, name: str | None, contenders: Sequence[Contender]) -> dict[str, Any]:
        """Return what the trial is: with another header, it is another one."""
        return {
            "model": name or type(self.model).__name__,
            "data": self.data.description,
            "batch_size": self.data.batch_size,
            "device": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": versions(),
            "contenders": {contender.name: str(contender.config) for contender in contenders},
            "parameters": sum(p.detach().double().sum().item() for p in self.model.parameters()),
        }

    def result(
        self, contenders: Sequence[Contender], refused: dict[str, str], header: dict[str, Any], command: str
    ) -> TrialResult:
        """Return everything that was measured."""
        unreadable = self.unreadable or self.data.unreadable
        images = self.counts[UNPATCHED].images if self.counts else 0
        return TrialResult(
            model=header["model"],
            data=header["data"],
            images=images,
            total_images=self.total - len(unreadable) if self.interrupted else images,
            labelled=self.data.labelled,
            rows=tuple(self.row(contender, contenders[0]) for contender in contenders),
            refused=refused,
            unreadable=tuple(unreadable),
            device=header["device"],
            dtype=header["dtype"],
            batch_size=self.batch_size,
            versions=header["versions"],
            command=command,
        )

    def row(self, contender: Contender, unpatched: Contender) -> TrialRow:
        """Return what was measured of a contender."""
        reduction = 1 - contender.macs / unpatched.macs
        return TrialRow(
            method=contender.method,
            keep_rate=contender.keep_rate,
            gmacs=contender.macs / 1e9,
            reduction=reduction,
            **self._speed_fields(contender, reduction),
            **self._accuracy_fields(contender),
        )

    def _speed_fields(self, contender: Contender, reduction: float) -> dict[str, Any]:
        names = ("images_per_second", "speed_up", "ideal_share", "latency", "latency_speed_up", "peak_memory")
        if contender.config is None:
            # Measured beside each of the others: their median.
            timings = list(self.timing.values())
            if not timings:
                return dict.fromkeys(names)
            seconds, latency, memory = (
                statistics.median(timing[f"unpatched_{field}"] for timing in timings)
                for field in ("seconds", "latency", "memory")
            )
            return dict(zip(names, (1 / seconds, 1.0, 1.0, 1e3 * latency, 1.0, memory / 1e6), strict=True))
        timing = self.timing.get(contender.name)
        if timing is None:
            return dict.fromkeys(names)
        speed_up = timing["speed_up"]
        values = (
            1 / timing["seconds"],
            speed_up,
            speed_up * (1 - reduction),
            1e3 * timing["latency"],
            timing["latency_speed_up"],
            timing["memory"] / 1e6,
        )
        return dict(zip(names, values, strict=True))

    def _accuracy_fields(self, contender: Contender) -> dict[str, Any]:
        fields: dict[str, Any] = dict.fromkeys(
            ("top1", "top5", "top1_difference", "top1_interval", "agreement", "kl", "cosine")
        )
        counts = self.counts.get(contender.name)
        if counts is None or not counts.images:
            return fields
        images = counts.images
        fields["cosine"] = counts.cosine / images
        classes = getattr(self.model, "num_classes", None)
        if classes != 0:
            fields |= {"agreement": counts.agree / images, "kl": counts.kl / images}
            if self.data.labelled:
                fields["top1"] = counts.top1 / images
                fields["top5"] = counts.top5 / images if classes is None or classes > 5 else None
                if contender.config is not None:
                    fields["top1_difference"] = (counts.gained - counts.lost) / images
                    fields["top1_interval"] = paired_interval(counts.gained, counts.lost, images)
        return fields


@torch.inference_mode()
def compare(
    model: nn.Module, configs: Sequence[MergeConfig | None], images: Tensor, labels: Tensor, *, batch_size: int
) -> list[Counts]:
    """Run images through one model under several configs, and compare each with the first.

    Args:
        model: a supported model in eval mode. It is left with the config that came last.
        configs: None for the unpatched model.
        images: [B, C, H, W].
        labels: [B], class indices; -1 where there is none.
        batch_size: images a forward pass, if fewer than B.
    """
    outputs = []
    for config in configs:
        plan(model, config)
        parts = [_with_features(model, part) for part in images.split(batch_size)]
        outputs.append([torch.cat(part) for part in zip(*parts, strict=True)])
    (logits, features), counts = outputs[0], []
    right = logits.argmax(1) == labels
    for mine, my_features in outputs:
        is_right = mine.argmax(1) == labels
        among5 = mine.topk(min(5, mine.shape[1]), dim=1).indices == labels[:, None]
        kl = F.kl_div(mine.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="sum")
        numbers = (
            is_right.sum(),
            among5.any(dim=1).sum(),
            (is_right & ~right).sum(),
            (right & ~is_right).sum(),
            (mine.argmax(1) == logits.argmax(1)).sum(),
        )
        cosine = F.cosine_similarity(my_features, features, dim=1).sum()
        top1, top5, gained, lost, agree = (int(number) for number in numbers)
        counts.append(Counts(len(labels), top1, top5, gained, lost, agree, max(0.0, kl.item()), cosine.item()))
    return counts


def _with_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [B, classes] and what goes into the classifier, flattened [B, D], both in float32."""
    seen: list[Tensor] = []
    head: Any = getattr(model, "get_classifier", lambda: None)()
    if isinstance(head, tuple | list | nn.ModuleList):  # one for each of several class tokens
        head = head[0]
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if isinstance(head, nn.Module) else None
    try:
        output = model(images)
    finally:
        if hook is not None:
            hook.remove()
    output = output.flatten(1).float()
    return output, seen[0].flatten(1).float() if seen else output


def paired_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a difference of shares, measured on the same images.

    Wald's with one image added to each kind of discordance (Bonett and Price 2012, "Adjusted Wald Confidence Interval
    for a Difference of Binomial Proportions Based on Paired Data"): unlike the plain one, it is not empty where nothing
    changed.

    Args:
        gained, lost: images that only the one, or only the other, got right.
        images: all of them.
    """
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / (images + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from token_merge_plugin import __version__

    return {
        "token_merge_plugin": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "wrapt": metadata.version("wrapt"),
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Return what the device is called, and for a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return str(device)


@contextmanager
def _unpatched_at_the_end(model: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        remove(model)
