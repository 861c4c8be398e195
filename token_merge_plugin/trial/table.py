"""The results of a trial as a table: its columns, what they mean, and how their numbers are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from token_merge_plugin.trial.results import TrialResult, TrialRow


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


def _speed_up(row: TrialRow) -> tuple[float, tuple[float, float] | None] | None:
    return None if row.speed_up is None else (row.speed_up, row.speed_up_interval)


def format_speed_up(speed_up: tuple[float, tuple[float, float] | None]) -> str:
    """Write a speed-up and its interval: "1.46x [1.43, 1.49]"."""
    value, interval = speed_up
    return f"{value:.2f}x" if interval is None else f"{value:.2f}x [{interval[0]:.2f}, {interval[1]:.2f}]"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    Column("method", "", "How tokens are chosen and merged, or dropped.", lambda row: row.method, str),
    Column(
        "keep rate",
        "",
        "Share of the image tokens that each stage keeps. Methods with stages of their own are set so that they cost "
        "as many multiply-adds.",
        lambda row: row.setting if row.keep_rate is None else row.keep_rate,
        lambda value: value if isinstance(value, str) else f"{value:g}",
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
        "Images per second at the trial's batch size: the unpatched model's, times the speed-up.",
        lambda row: row.images_per_second,
        _three_digits,
        better=1,
    ),
    Column(
        "speed-up [95 %]",
        "",
        "Time of the unpatched model, divided by the time of this one; both measured in turns, median over the "
        "rounds, and its 95 % confidence interval.",
        _speed_up,
        format_speed_up,
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
        "patch error",
        "",
        "How far the patch tokens move: their distance to the unpatched model's, as a share of the length of these. "
        "0 is not at all.",
        lambda row: row.patch_error,
        "{:.2%}".format,
        better=-1,
    ),
    Column(
        "class error",
        "",
        "The same of the class token.",
        lambda row: row.class_error,
        "{:.2%}".format,
        better=-1,
    ),
    Column(
        "head change",
        "",
        "Mean absolute difference of the head's output to that on the unpatched model's tokens, in its own unit.",
        lambda row: row.head_change,
        "{:.3g}".format,
        better=-1,
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
        "at batch 1",
        "",
        "Speed-up at batch size 1: latency of the unpatched model, divided by the latency of this one.",
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
ACCURACY = (
    "top-1",
    "top-5",
    "difference [95 %]",
    "agreement",
    "KL",
    "cosine",
    "patch error",
    "class error",
    "head change",
)


def shown_columns(result: TrialResult) -> list[Column]:
    """Return the columns that have a number in at least one row."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in result.rows)]


# Titles of the columns that a reader decides by, in their order; the report has the others in a second table.
DECISIVE = (
    "method",
    "keep rate",
    "speed-up [95 %]",
    "at batch 1",
    "difference [95 %]",
    "top-1",
    "agreement",
    "patch error",
    "head change",
    "reduction",
)


def decisive_columns(result: TrialResult) -> list[Column]:
    """Return the shown columns of `DECISIVE`, in that order; with the cosine where it is what is lost."""
    shown = {column.title: column for column in shown_columns(result)}
    titles = list(DECISIVE)
    if "agreement" not in shown:
        titles.insert(4, "cosine")
    return [shown[title] for title in titles if title in shown]


def further_columns(result: TrialResult) -> list[Column]:
    """Return the method, the keep rate and the shown columns that are not decisive."""
    decisive = [column for column in decisive_columns(result) if column.title not in ("method", "keep rate")]
    return [column for column in shown_columns(result) if column not in decisive]


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
