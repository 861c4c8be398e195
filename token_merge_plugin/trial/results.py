"""The results of a trial: what was measured, of what, and how; as JSON and CSV."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from token_merge_plugin.errors import DataError

UNPATCHED = "unpatched"
_INTERVALS = ("top1_interval", "speed_up_interval", "latency_speed_up_interval")


@dataclass(frozen=True)
class TrialRow:
    """What a trial measured of one contender: the unpatched model, or a method at a keep rate. Shares are in [0, 1].

    Attributes:
        method: "unpatched", or one of `MergeConfig`.
        keep_rate: the keep rate asked for; None for the unpatched model, and for a setting that is not one number. Rows
            of one keep rate, or of one setting, have equal GMACs.
        gmacs: 1e9 multiply-adds per image; as the times, of `forward_features` where the tokens are what is compared.
        reduction: share of the unpatched model's multiply-adds that is saved.
        images_per_second: the unpatched model's, a median over all rounds, times `speed_up`; None where it was not
            measured, as in an interrupted trial.
        speed_up: median over the rounds of the unpatched model's time, divided by this contender's.
        ideal_share: share of the ideal speed-up that is reached: speed_up / (1 / (1 - reduction)).
        latency: milliseconds at batch size 1: the unpatched model's, divided by `latency_speed_up`.
        latency_speed_up: median over the rounds of the unpatched model's latency, divided by this contender's.
        peak_memory: MB of activations at the trial's batch size.
        top1: share of the images whose most probable class is their label; None where the images are unlabelled, or
            none was classified.
        top5: share of the images whose label is among the five most probable classes.
        top1_difference: top1 minus that of the unpatched model on the same images.
        top1_interval: the 95 % confidence interval of the difference, (low, high).
        agreement: share of the images with the same most probable class as from the unpatched model; None for models
            without classes, and where a head was given, as are top-1, top-5 and KL.
        kl: mean Kullback-Leibler divergence from the unpatched model's output, in nats.
        cosine: mean cosine similarity of the features in front of the classifier with the unpatched model's; None
            where those are the patch tokens, not pooled, and `patch_error` says it.
        patch_error: of models without classes, and where a head was given: Euclidean distance of an image's patch
            tokens (from forward_features) to the unpatched model's, divided by the length of these; mean over the
            images. None for all others, and where forward_features returns no patch tokens, or not all of them.
        class_error: the same of the class token; None where there is none.
        head_change: mean absolute difference of the head's output to that on the unpatched model's tokens, in its own
            unit; None without a head.
        setting: what was asked for where it is not one keep rate, such as "0.9, 0.8, 0.7", one a stage.
        config: the options of `apply`, as JSON for `MergeConfig.from_json`.
        speed_up_interval, latency_speed_up_interval: 95 % confidence intervals over the rounds, (low, high).
    """

    method: str
    keep_rate: float | None
    gmacs: float
    reduction: float
    images_per_second: float | None
    speed_up: float | None
    ideal_share: float | None
    latency: float | None
    latency_speed_up: float | None
    peak_memory: float | None
    top1: float | None
    top5: float | None
    top1_difference: float | None
    top1_interval: tuple[float, float] | None
    agreement: float | None
    kl: float | None
    cosine: float | None
    # Results that were written before there were these lack them.
    patch_error: float | None = None
    class_error: float | None = None
    head_change: float | None = None
    setting: str | None = None
    config: str | None = None
    speed_up_interval: tuple[float, float] | None = None
    latency_speed_up_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured, and of what, and how.

    Attributes:
        model: name of the model.
        data: name or path of the images.
        images: number of images that every row is measured on.
        total_images: number of images there were to measure on; more than `images` if the trial was interrupted.
        labelled: whether the images have labels.
        rows: the unpatched model first.
        refused: {method: why it cannot be used on this model}.
        unreadable: names of the images that could not be read, each with the reason; they were left out.
        device: name of the device.
        dtype: number format of the forward passes.
        batch_size: images a forward pass.
        versions: {package: version}.
        command: the command that repeats the trial.
        trained: False where the weights are random, so that nothing can be said of accuracy.
        num_classes: of the model; None where it has none, or none was counted.
        warnings: what may be wrong with the images or their labels, one sentence or more each.
        rounds: how often each contender was timed at most; None where none was.
        date: on which the trial ended, as 2026-01-31.
        checkpoint: file of the weights; empty for those that the model comes with.
        compiled: whether the models were compiled for the measurement of speed.
    """

    model: str
    data: str
    images: int
    total_images: int
    labelled: bool
    rows: tuple[TrialRow, ...]
    refused: dict[str, str]
    unreadable: tuple[str, ...]
    device: str
    dtype: str
    batch_size: int
    versions: dict[str, str]
    command: str
    # Results that were written before there were these lack them.
    trained: bool = True
    num_classes: int | None = None
    warnings: tuple[str, ...] = ()
    rounds: int | None = None
    date: str = ""
    checkpoint: str = ""
    compiled: bool = False


def patched(result: TrialResult) -> list[TrialRow]:
    """Return the rows other than the unpatched model's."""
    return [row for row in result.rows if row.method != UNPATCHED]


def to_json(result: TrialResult) -> str:
    """Return the result as JSON, for `from_json`. Numbers that JSON cannot write (NaN, infinity) become null."""
    return json.dumps(_json_safe(asdict(result)), indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> TrialResult:
    """Read what `to_json` wrote.

    Raises:
        DataError: the text is not that.
    """
    try:
        values = json.loads(text)
        rows = tuple(
            TrialRow(**(row | {name: _pair(row.get(name)) for name in _INTERVALS})) for row in values.pop("rows")
        )
        lists = {name: tuple(values.get(name, ())) for name in ("unreadable", "warnings")}
        return TrialResult(**(values | {"rows": rows} | lists))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This is not the JSON of a trial's result: {error}. Give a file that a trial wrote."
        ) from error


def to_csv(result: TrialResult) -> str:
    """Return the rows as CSV: a header of field names, shares in [0, 1], empty where there is no number.

    An interval becomes two columns: `top1_interval` is `top1_low` and `top1_high`.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, [*_csv_values(result.rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_csv_values, result.rows))
    return file.getvalue()


def json_of_all(results: Sequence[TrialResult]) -> str:
    """Return results, such as those of several batch sizes, as a JSON list."""
    return json.dumps([_json_safe(asdict(result)) for result in results], indent=2, allow_nan=False) + "\n"


def csv_of_all(results: Sequence[TrialResult]) -> str:
    """Return the rows of several results as CSV, each with its batch size in front; see `to_csv`."""
    lines = [f"{result.batch_size},{line}" for result in results for line in to_csv(result).splitlines()[1:]]
    return "\n".join([f"batch_size,{to_csv(results[0]).splitlines()[0]}", *lines]) + "\n"


def _csv_values(row: TrialRow) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in ((field.name, getattr(row, field.name)) for field in fields(row)):
        if name in _INTERVALS:
            low, high = value or (None, None)
            name = name.removesuffix("_interval")
            values |= {f"{name}_low": low, f"{name}_high": high}
        else:
            values[name] = value
    return values


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])
