"""A training-free trial: what each method of reducing tokens saves and costs, on one model and one set of images.

Speed first: each contender in turns with the unpatched model, on one batch. Then accuracy: each batch of the images
goes through all contenders, so that every number is about the same images, and an interrupted trial has one for each.
"""

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from token_merge_plugin import __version__
from token_merge_plugin.config import METHODS, KeepRate, MergeConfig
from token_merge_plugin.errors import ConfigError, DataError, counted
from token_merge_plugin.patching import remove
from token_merge_plugin.trial.accuracy import Comparison
from token_merge_plugin.trial.counting import count_macs, equal_compute
from token_merge_plugin.trial.dense import Head, check_head, describe_head, use_of
from token_merge_plugin.trial.fusion import remember
from token_merge_plugin.trial.images import Images
from token_merge_plugin.trial.journal import Journal
from token_merge_plugin.trial.measuring import Use, check_images, evaluating, plan
from token_merge_plugin.trial.results import UNPATCHED, TrialResult, TrialRow
from token_merge_plugin.trial.speed import Speed


class Contender(NamedTuple):
    """One row of the trial: a method at a setting, or the unpatched model, whose config is None.

    Attributes:
        setting: what is asked for, in short: see `name_of`.
        config: that leaves as many multiply-adds as "merge" at this setting.
        macs: these, per image.
    """

    method: str
    setting: str | None
    config: MergeConfig | None
    macs: int

    @property
    def name(self) -> str:
        return self.method if self.setting is None else f"{self.method} {self.setting}"


def run_trial(
    model: nn.Module,
    data: Images,
    keep_rates: Sequence[KeepRate | MergeConfig] = (0.9, 0.8, 0.7, 0.6, 0.5),
    methods: Sequence[str] = ("merge",),
    *,
    head: Head | None = None,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    accuracy: bool = True,
    trained: bool = True,
    compiled: bool = False,
    rounds: int = 20,
    seconds: float = 8.0,
    log: str | Path | None = None,
    command: str = "",
    progress: bool = False,
    **options: Any,
) -> TrialResult:
    """Compare the unpatched model with methods at keep rates, over the same images.

    At each setting, every method is set to the multiply-adds of "merge" at that setting. Ctrl-C ends the trial early,
    and what was measured by then is returned: `images` is less than `total_images`. Where memory runs out, the batch is
    halved.

    Models without classes, and all models where a head is given, are compared by their tokens instead of by classes:
    see `patch_error`, `class_error` and `head_change` of `TrialRow`. Work and time are then those of
    `forward_features`: to have all tokens takes more than a head that reads the class token does.

    Args:
        model: a supported model on its device; it is unpatched, and in the mode it was in, at the end.
        data: `open_data(...)`, or `Tensors(images, labels)`. Its batch size is that of the timed passes.
        keep_rates: settings: each a keep rate as for `apply`, or a whole config, such as one of `calibrate`.
        methods: of `MergeConfig`.
        head: reads the model's tokens, on its device, as a decoder or a linear probe does: a callable that takes what
            model.forward_features(images) returns, in timm [B, prefix + patch tokens, C], [B, H, W, C] or
            [B, C, H, W], and returns one floating point tensor [B, ...] of any shape. It runs without gradients, under
            the trial's autocast; a module is in eval mode meanwhile, what a function calls is as you left it. None for
            none. Its time is not measured.
        name: the model's, for the report.
        dtype: of the forward passes: other than float32, by autocast.
        accuracy: otherwise only speed is measured, on the first batch.
        trained: whether the weights are: of random ones nothing is said but the speed.
        compiled: measure the speed of models that torch.compile has compiled. Accuracy is that of the same models, not
            compiled.
        rounds, seconds: how long each contender is timed; see `measuring.time_in_turns`.
        log: file to which JSON lines are added as results come in. A trial that finds lines of its own there goes on
            behind them.
        command: what repeats the trial, for the report.
        progress: show bars.
        options: further fields of `MergeConfig`, for "merge".

    Raises:
        ConfigError: a keep rate, method or option is not allowed, the head returns something else, or the log is
            another trial's.
        DataError: there are no images.
        UnsupportedModelError, PatchStateError: as `apply`.
    """
    configs = _checked_configs(keep_rates, methods, options)
    batch, interrupted, use = _full_batch(data), False, use_of(model, head)
    remember(model)
    with evaluating(model), _unpatched_at_the_end(model):
        with _autocast(batch.device, dtype):
            check_images(remove(model), batch[:1])
            check_head(model, head, batch[:1])
        contenders, refused = _contenders(model, batch[:1], configs, methods, use, progress)
        about = _about(model, data, contenders, head, name, batch.device, dtype)
        speed, comparison = Speed(model, batch, rounds, seconds, compiled, use), Comparison(model, data, head)
        plans = {contender.name: contender.config for contender in contenders}
        with Journal(log, about) as journal, _autocast(batch.device, dtype):
            try:
                speed.measure(plans, journal, progress)
                if accuracy:
                    comparison.batch_size = speed.batch_size
                    comparison.measure(plans, journal, progress)
            except KeyboardInterrupt:
                interrupted = True
    return _result(about, contenders, refused, comparison, speed, interrupted, command, trained)


def evaluate(
    model: nn.Module,
    data: Images,
    config: MergeConfig,
    *,
    head: Head | None = None,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    log: str | Path | None = None,
    command: str = "",
    progress: bool = False,
) -> TrialResult:
    """Compare the unpatched model with one config, over the same images, without timing.

    Where torch.distributed is initialised, each process goes through its own images (`open_data(rank=...)`), with a log
    of its own, and all of them return the result over all images.

    Args, Raises:
        as `run_trial`.
    """
    image, interrupted, use = _first_images(data)[:1], False, use_of(model, head)
    remember(model)
    comparison = Comparison(model, data, head)
    with evaluating(model), _unpatched_at_the_end(model):
        with _autocast(image.device, dtype):
            check_images(remove(model), image)
            check_head(model, head, image)
        contenders = [
            Contender(UNPATCHED, None, None, count_macs(remove(model), image, use)),
            Contender(config.method, name_of(config), config, count_macs(plan(model, config), image, use)),
        ]
        about = _about(model, data, contenders, head, name, image.device, dtype)
        with Journal(log, about) as journal, _autocast(image.device, dtype):
            try:
                comparison.measure({contender.name: contender.config for contender in contenders}, journal, progress)
            except KeyboardInterrupt:
                interrupted = True
        interrupted = comparison.gather(interrupted)
    return _result(about, contenders, {}, comparison, None, interrupted, command, trained)


def name_of(config: MergeConfig) -> str:
    """Return a config's setting in short: "0.7", "0.9, 0.8, 0.7" for one rate a stage, "r = 13"."""
    rate = config.keep_rate
    if config.r is not None:
        return f"r = {config.r}"
    if isinstance(rate, float):
        return f"{rate:.12g}"
    rates = [*rate.values()] if isinstance(rate, Mapping) else [*rate]
    if len(rates) <= 4:
        return ", ".join(f"{rate:.3g}" for rate in rates)
    return f"{len(rates)} stages, {max(rates):.2g} to {min(rates):.2g}"


def _checked_configs(
    settings: Sequence[KeepRate | MergeConfig], methods: Sequence[str], options: Mapping[str, Any]
) -> dict[str, MergeConfig]:
    """Return {setting: its config}."""
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"method={method!r} is not known. Choose from {', '.join(map(repr, METHODS))}.")
    configs: dict[str, MergeConfig] = {}
    for setting in settings:
        config = MergeConfig.of(setting, **options)
        if config not in configs.values():
            name = name_of(config)
            same = sum(other.partition(" (")[0] == name for other in configs)
            configs[f"{name} ({same + 1})" if same else name] = config
    return configs


def _first_images(data: Images) -> Tensor:
    first = next(iter(data.batches()), None)
    if first is None:
        raise DataError(f"There are no images: {data.description}.")
    return first.images


def _full_batch(data: Images) -> Tensor:
    """Return one batch of the full size, of the first images, repeated where some could not be read."""
    images, batch_size = _first_images(data), min(data.batch_size, len(data))
    return images.repeat(math.ceil(batch_size / len(images)), 1, 1, 1)[:batch_size]


def _contenders(
    model: nn.Module,
    image: Tensor,
    configs: Mapping[str, MergeConfig],
    methods: Sequence[str],
    use: Use,
    progress: bool,
) -> tuple[list[Contender], dict[str, str]]:
    """Return the unpatched model and each method at each setting; and {method: why it is refused}."""
    contenders = [Contender(UNPATCHED, None, None, count_macs(remove(model), image, use))]
    refused: dict[str, str] = {}
    total = len(configs) * len(methods)
    with tqdm(desc="equal multiply-adds", total=total, unit="setting", leave=False, disable=not progress) as bar:
        targets = {setting: count_macs(plan(model, config), image, use) for setting, config in configs.items()}
        for method in methods:
            for setting, config in configs.items():
                try:
                    if method != config.method:
                        rate = config.keep_rate if isinstance(config.keep_rate, float) else 0.7
                        config = equal_compute(model, image, MergeConfig(rate, method=method), targets[setting], use)
                    contenders.append(Contender(method, setting, config, count_macs(plan(model, config), image, use)))
                except ConfigError as error:
                    refused[method] = str(error)
                bar.update()
    return contenders, refused


def _about(
    model: nn.Module,
    data: Images,
    contenders: Sequence[Contender],
    head: Head | None,
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return what the trial is: with another one of these, it is another trial."""
    return {
        "model": name or type(remove(model)).__name__,
        "data": data.description,
        "batch_size": data.batch_size,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "contenders": {contender.name: str(contender.config) for contender in contenders},
        "parameters": sum(p.detach().double().sum().item() for p in model.parameters()),
        **({} if head is None else {"head": describe_head(head)}),
    }


def _result(
    about: Mapping[str, Any],
    contenders: Sequence[Contender],
    refused: dict[str, str],
    comparison: Comparison,
    speed: Speed | None,
    interrupted: bool,
    command: str,
    trained: bool,
) -> TrialResult:
    """Return everything that was measured."""
    unreadable = comparison.unreadable or comparison.data.unreadable
    return TrialResult(
        model=about["model"],
        data=about["data"],
        images=comparison.images,
        total_images=comparison.total - len(unreadable) if interrupted else comparison.images,
        labelled=comparison.data.labelled,
        rows=tuple(_row(contender, contenders[0], comparison, speed) for contender in contenders),
        refused=refused,
        unreadable=tuple(unreadable),
        device=about["device"],
        dtype=about["dtype"],
        batch_size=comparison.batch_size if speed is None else min(comparison.batch_size, speed.batch_size),
        versions=about["versions"],
        command=command,
        trained=trained,
        num_classes=getattr(comparison.model, "num_classes", None) or None,
        warnings=tuple(getattr(comparison.data, "warnings", ())),
        rounds=None if speed is None else speed.rounds,
        date=time.strftime("%Y-%m-%d"),
        compiled=speed is not None and speed.compiled,
    )


def _row(contender: Contender, unpatched: Contender, comparison: Comparison, speed: Speed | None) -> TrialRow:
    """Return what was measured of a contender: None for what was not."""
    reduction = 1 - contender.macs / unpatched.macs
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(TrialRow))
    keep_rate, setting = _keep_rate(contender)
    values |= {
        "method": contender.method,
        "keep_rate": keep_rate,
        "setting": setting,
        "config": contender.config and contender.config.to_json(),
        "gmacs": contender.macs / 1e9,
        "reduction": reduction,
    }
    if speed is not None:
        values |= speed.fields(contender.name, reduction)
    return TrialRow(**values | comparison.fields(contender.name))


def _keep_rate(contender: Contender) -> tuple[float | None, str | None]:
    """Return the setting as a number, or else as text."""
    try:
        return float(contender.setting or ""), None
    except ValueError:
        return None, contender.setting


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
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
        return f"{_cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"
    return str(device)


def _cpu_name() -> str:
    """Return the processor's name, as Linux knows it; elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.processor() or platform.machine()} CPU"


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def _unpatched_at_the_end(model: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        remove(model)
