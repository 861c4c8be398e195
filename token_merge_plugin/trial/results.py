"""The results of a trial: what was measured, as a table, JSON and CSV, and the verdict in one sentence."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from token_merge_plugin.errors import DataError

UNPATCHED = "unpatched"
# What a loss may come to, and still be called tolerable: 0.5 points of top-1, 1 % of the predictions, 0.01 of cosine.
TOLERANCES = {"top-1": 0.005, "agreement": 0.01, "cosine": 0.01}
# A speed-up below this is not worth a change.
WORTHWHILE = 1.05
# Speeds that differ by less than this share are equal: they vary by as much from run to run.
SPEED_NOISE = 0.02
# In fewer images, even a loss that was never seen may be above one point (3 / n, the rule of three).
ENOUGH_IMAGES = 300
WIDEST_INTERVAL = 0.01


@dataclass(frozen=True)
class TrialRow:
    """What a trial measured of one contender: the unpatched model, or a method at a keep rate. Shares are in [0, 1].

    Attributes:
        method: "unpatched", "merge", "tome", "evit", "prune" or "random".
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
            without classes.
        kl: mean Kullback-Leibler divergence from the unpatched model's output, in nats.
        cosine: mean cosine similarity of the features in front of the classifier with the unpatched model's.
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


@dataclass(frozen=True)
class Column:
    """One column of a trial's table.

    Attributes:
        title: its heading.
        unit: of its numbers; empty where each number shows its own.
        meaning: one sentence for the glossary.
        value: returns the number of a row, or None.
        text: writes that number.
        better: 1 where more is better, -1 where less is, 0 where neither.
    """

    title: str
    unit: str
    meaning: str
    value: Callable[[TrialRow], Any]
    text: Callable[[Any], str]
    better: int = 0

    def cell(self, row: TrialRow) -> str:
        """Return the row's number as text: "-" where there is none."""
        value = self.value(row)
        return "-" if value is None else self.text(value)


def _difference(row: TrialRow) -> tuple[float, tuple[float, float] | None] | None:
    return None if row.top1_difference is None else (row.top1_difference, row.top1_interval)


def format_difference(difference: tuple[float, tuple[float, float] | None]) -> str:
    """Write a difference of shares and its interval in points: "-0.10 [-0.32, +0.12]"."""
    value, interval = difference
    text = f"{100 * value:+.2f}"
    return text if interval is None else f"{text} [{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    Column("method", "", "How tokens are chosen and merged, or dropped.", lambda row: row.method, str),
    Column(
        "keep rate",
        "",
        "Share of the image tokens that each stage keeps. Methods with stages of their own are set so that they cost "
        "as many multiply-adds.",
        lambda row: row.keep_rate,
        "{:g}".format,
    ),
    Column("GMACs", "", "Billions of multiply-adds per image.", lambda row: row.gmacs, "{:.3f}".format),
    Column(
        "reduction",
        "",
        "Share of the multiply-adds that is saved.",
        lambda row: row.reduction,
        "{:.1%}".format,
        better=1,
    ),
    Column(
        "images/s",
        "",
        "Images per second at the trial's batch size, median over the rounds.",
        lambda row: row.images_per_second,
        _three_digits,
        better=1,
    ),
    Column(
        "speed-up",
        "",
        "Time of the unpatched model, divided by the time of this one; both measured in turns, median over the rounds.",
        lambda row: row.speed_up,
        "{:.2f}x".format,
        better=1,
    ),
    Column(
        "of ideal",
        "",
        "Speed-up, as a share of the one there would be if time went down as multiply-adds do.",
        lambda row: row.ideal_share,
        "{:.0%}".format,
        better=1,
    ),
    Column(
        "top-1",
        "",
        "Accuracy: share of the images whose most probable class is the right one.",
        lambda row: row.top1,
        "{:.2%}".format,
        better=1,
    ),
    Column(
        "difference [95 %]",
        "points",
        "Top-1 minus that of the unpatched model, in percentage points, and its 95 % confidence interval: where the "
        "interval contains 0, the difference may be chance.",
        _difference,
        format_difference,
        better=1,
    ),
    Column(
        "top-5",
        "",
        "Share of the images whose right class is among the five most probable ones.",
        lambda row: row.top5,
        "{:.2%}".format,
        better=1,
    ),
    Column(
        "agreement",
        "",
        "Share of the images with the same most probable class as from the unpatched model.",
        lambda row: row.agreement,
        "{:.2%}".format,
        better=1,
    ),
    Column(
        "KL",
        "nats",
        "Mean Kullback-Leibler divergence: how far the probabilities of the classes move. 0 is not at all.",
        lambda row: row.kl,
        "{:.1e}".format,
        better=-1,
    ),
    Column(
        "cosine",
        "",
        "Mean cosine similarity of the features in front of the classifier with the unpatched model's. 1 is no change.",
        lambda row: row.cosine,
        "{:.4f}".format,
        better=1,
    ),
    Column(
        "latency",
        "ms",
        "Milliseconds from one image to its result, at batch size 1.",
        lambda row: row.latency,
        _three_digits,
        better=-1,
    ),
    Column(
        "latency speed-up",
        "",
        "Latency of the unpatched model, divided by the latency of this one.",
        lambda row: row.latency_speed_up,
        "{:.2f}x".format,
        better=1,
    ),
    Column(
        "memory",
        "MB",
        "Most memory that the activations take, at the trial's batch size.",
        lambda row: row.peak_memory,
        _three_digits,
        better=-1,
    ),
)


# Titles of the columns that say what is lost. The others say what it costs.
ACCURACY = ("top-1", "top-5", "difference [95 %]", "agreement", "KL", "cosine")


def shown_columns(result: TrialResult) -> list[Column]:
    """Return the columns that have a number in at least one row."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in result.rows)]


def format_table(result: TrialResult) -> str:
    """Return the rows as two tables, of what they cost and of what they lose, aligned, and in Markdown as well.

    Columns without any number are left out; a single missing number is a "-".
    """
    columns = shown_columns(result)
    contender = [column for column in columns if column.title in ("method", "keep rate")]
    cost = [column for column in columns if column not in contender and column.title not in ACCURACY]
    lost = [column for column in columns if column.title in ACCURACY]
    return "\n\n".join(_table(result, contender + part) for part in (cost, lost) if part)


def _table(result: TrialResult, columns: Sequence[Column]) -> str:
    header = [f"{column.title}, {column.unit}" if column.unit else column.title for column in columns]
    cells = [header, *([column.cell(row) for column in columns] for row in result.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


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


def measure_of(result: TrialResult) -> str | None:
    """Return what the loss is measured by: a key of `TOLERANCES`, or None where nothing was classified.

    Top-1 for labelled images, unless the unpatched model gets none of them right; else the agreement with the unpatched
    model; else, for models without classes, the cosine similarity of the features.
    """
    return next(
        (name for name in TOLERANCES if any(loss(result, row, name) is not None for row in patched(result))), None
    )


def loss(result: TrialResult, row: TrialRow, measure: str | None) -> float | None:
    """Return what the row loses against the unpatched model by a measure of `TOLERANCES`: 0 is nothing."""
    if measure == "top-1":
        return None if row.top1_difference is None or not result.rows[0].top1 else -row.top1_difference
    value = {"agreement": row.agreement, "cosine": row.cosine}.get(measure or "")
    return None if value is None else 1 - value


def patched(result: TrialResult) -> list[TrialRow]:
    """Return the rows other than the unpatched model's."""
    return [row for row in result.rows if row.method != UNPATCHED]


def best_row(result: TrialResult) -> TrialRow | None:
    """Return the row that the verdict recommends, by the rule of `verdict`; None if it recommends none."""
    rows = _tolerable(result)
    if not any(row.speed_up is not None for row in patched(result)):
        return _preferred(rows, lambda row: row.reduction)
    fast = [row for row in rows if row.speed_up is not None and row.speed_up >= WORTHWHILE]
    return _preferred(fast, lambda row: row.speed_up or 0.0)


def verdict(result: TrialResult) -> str:
    """Say in one plain sentence whether token merging helps here; more sentences only for what limits it.

    The rule: a loss is tolerable if top-1 falls by at most 0.5 points; where there is no top-1, if the prediction stays
    the same for at least 99 % of the images; for models without classes, if the features have a mean cosine similarity
    of at least 0.99 with the unpatched ones. Of the rows whose loss is tolerable, the fastest is recommended, over all
    methods, if it is at least 1.05x as fast as the unpatched model. Rows within 2 % of the fastest are equally fast,
    and of those `merge` is preferred. Where no speed was measured, the row with the fewest multiply-adds stands in.

    It is added if the trial was interrupted, if there were too few images to tell (fewer than 300, or a confidence
    interval wider than +-1 point), and if the unpatched model gets no label right.
    """
    row, sentence = _judge(result)
    return " ".join([sentence, *_caveats(result, row)])


def _judge(result: TrialResult) -> tuple[TrialRow | None, str]:
    """Return the row that the sentence is about, and the sentence."""
    rows = patched(result)
    if not rows and result.refused:
        return None, "Token merging cannot be used on this model: every method that was asked for is refused."
    measure = measure_of(result)
    if not rows or (measure is None and not any(row.speed_up for row in rows)):
        return None, "Nothing can be said yet: no patched model was measured."
    if measure is None:
        row = max(rows, key=lambda row: row.speed_up or 0.0)
        return row, f"{_name(row)} runs at {row.speed_up:.2f}x the speed; what it costs was not measured."
    best = best_row(result)
    if best is not None:
        if best.speed_up is not None:
            gain = f"at {best.speed_up:.2f}x the speed."
        else:
            gain = f"with {100 * best.reduction:.0f} % less computation; its speed was not measured."
        return best, f"{_name(best)} {_what_stays(result, best, measure)} {gain}"
    row, reason = _why_nothing_helps(result, measure)
    return row, f"Token merging does not help here: {reason}"


def _why_nothing_helps(result: TrialResult, measure: str) -> tuple[TrialRow, str]:
    tolerable = _tolerable(result)
    losses = {row: lost for row in patched(result) if (lost := loss(result, row, measure)) is not None}
    if not tolerable:
        mildest = max(row.keep_rate or 0.0 for row in losses)
        row = min((row for row in losses if (row.keep_rate or 0.0) == mildest), key=lambda row: losses[row])
        higher = " Higher keep rates were not tried." if 0 < mildest < 0.9 else ""
        return row, f"at {_name(row, start=False)} {_what_is_lost(losses[row], measure, ' already')}.{higher}"
    timed = [row for row in tolerable if row.speed_up is not None]
    what = {"top-1": "the accuracy stays", "agreement": "the predictions stay", "cosine": "the features stay"}[measure]
    if not timed:
        return tolerable[0], f"{what} at {_name(tolerable[0], start=False)}, but its speed was not measured."
    row = max(timed, key=lambda row: row.speed_up or 0.0)
    fast = [other for other in losses if (other.speed_up or 0.0) >= WORTHWHILE]
    if fast:
        other = min(fast, key=lambda row: losses[row])
        return other, (
            f"as long as {what}, the model runs at {row.speed_up:.2f}x the speed at best; at "
            f"{_name(other, start=False)}, {other.speed_up:.2f}x, {_what_is_lost(losses[other], measure)}."
        )
    why = f"{100 * row.reduction:.0f} % less computation saves no time at batch size {result.batch_size}"
    if row.reduction < 1 - 1 / WORTHWHILE:
        why = f"only {100 * row.reduction:.0f} % of the computation is saved"
    return row, f"{what}, but the model is not faster on this device: {row.speed_up:.2f}x at best, since {why}."


def _caveats(result: TrialResult, row: TrialRow | None) -> list[str]:
    caveats = []
    if result.images < result.total_images:
        caveats.append(f"The trial was interrupted after {result.images:,} of {result.total_images:,} images.")
    unpatched = result.rows[0] if result.rows else None
    if result.labelled and unpatched is not None and unpatched.top1 == 0:
        caveats.append("The unpatched model gets no label right: are the labels those of its classes?")
    measure = measure_of(result)
    if row is None or measure is None:
        return caveats
    if measure == "top-1" and row.top1_interval is not None:
        half = (row.top1_interval[1] - row.top1_interval[0]) / 2
        if half > WIDEST_INTERVAL:
            uncertain = f"the difference is uncertain by {100 * half:.1f} points either way"
            return [*caveats, f"{result.images:,} images are too few to be sure: {uncertain}."]
    if result.images < ENOUGH_IMAGES:
        caveats.append(f"{result.images:,} images are too few to be sure.")
    return caveats


def _tolerable(result: TrialResult) -> list[TrialRow]:
    measure = measure_of(result)
    rows = []
    for row in patched(result):
        lost = loss(result, row, measure)
        # 1e-9 undoes float noise: 1 - 0.99 is a little more than 0.01.
        if measure is not None and lost is not None and lost <= TOLERANCES[measure] + 1e-9:
            rows.append(row)
    return rows


def _preferred(rows: Sequence[TrialRow], gain: Callable[[TrialRow], float]) -> TrialRow | None:
    """Return the row of the largest gain; `merge` if it gains about as much."""
    if not rows:
        return None
    largest = max(map(gain, rows))
    merging = [row for row in rows if row.method == "merge" and gain(row) >= largest * (1 - SPEED_NOISE)]
    return max(merging or rows, key=gain)


def _name(row: TrialRow, start: bool = True) -> str:
    name = "this setting" if row.keep_rate is None else f"keep rate {row.keep_rate:g}"
    if row.method != "merge":
        name = f"method {row.method} at {name}" if start else f"{name} with method {row.method}"
    return name[0].upper() + name[1:] if start else name


def _what_stays(result: TrialResult, row: TrialRow, measure: str) -> str:
    if measure == "cosine":
        return f"gives features with a cosine similarity of {row.cosine:.3f} to the unpatched ones"
    if measure == "agreement":
        assert row.agreement is not None
        return f"gives the same prediction for {_share(row.agreement)} the images"
    unpatched = result.rows[0].top1
    assert row.top1 is not None
    assert unpatched is not None
    return f"keeps {_share(row.top1 / unpatched)} the accuracy"


def _share(share: float) -> str:
    """Write a share so that only a whole one reads as all, and "of" follows where it belongs."""
    if share >= 1:
        return "all of"
    return f"{100 * share:.1f} % of" if share < 0.9995 else "over 99.9 % of"


def _what_is_lost(lost: float, measure: str, already: str = "") -> str:
    if measure == "top-1":
        return f"the model is{already} {100 * lost:.1f} points less accurate"
    if measure == "agreement":
        return f"the predictions are{already} different for {100 * lost:.1f} % of the images"
    return f"the features are{already} down to a cosine similarity of {1 - lost:.3f}"


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])
