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


@dataclass(frozen=True)
class TrialRow:
    """What a trial measured of one contender: the unpatched model, or a method at a keep rate. Shares are in [0, 1].

    Attributes:
        method: "unpatched", or one of `MergeConfig`.
        keep_rate: the keep rate asked for; None for the unpatched model, and for a setting that is not one number. Rows
            of one keep rate have equal GMACs.
        gmacs: 1e9 multiply-adds per image.
        reduction: share of the unpatched model's multiply-adds that is saved.
        images_per_second: median over the rounds; None where it was not measured, as in an interrupted trial.
        speed_up: median over the rounds of the unpatched model's time, divided by this contender's.
        ideal_share: share of the ideal speed-up that is reached: speed_up / (1 / (1 - reduction)).
        latency: milliseconds at batch size 1.
        latency_speed_up: the unpatched model's latency, divided by this contender's.
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
        unreadable: names of the images that could not be read, and were left out.
        device: name of the device.
        dtype: number format of the forward passes.
        batch_size: images a forward pass.
        versions: {package: version}.
        command: the command that repeats the trial.
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
        rows = tuple(TrialRow(**(row | {"top1_interval": _pair(row["top1_interval"])})) for row in values["rows"])
        return TrialResult(**(values | {"rows": rows, "unreadable": tuple(values["unreadable"])}))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This is not the JSON of a trial's result: {error}. Give a file that a trial wrote."
        ) from error


def to_csv(result: TrialResult) -> str:
    """Return the rows as CSV: a header of field names, shares in [0, 1], empty where there is no number.

    `top1_interval` becomes the two columns `top1_low` and `top1_high`.
    """
    names = [field.name for field in fields(TrialRow)]
    at = names.index("top1_interval")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names[:at], "top1_low", "top1_high", *names[at + 1 :]])
    for row in result.rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([*values[:at], *(values[at] or (None, None)), *values[at + 1 :]])
    return file.getvalue()


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])
