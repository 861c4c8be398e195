"""The report of a trial: one HTML file that anybody can read, and its chart as a PNG.

Charts need matplotlib, the extra `charts`. Only its object-oriented interface is used: pyplot's figures, and the
settings of the user's own plots, stay as they are.
"""

import base64
import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from token_merge_plugin.errors import MissingExtraError, how_to_install
from token_merge_plugin.trial.drawing import Picture, scaled, stage_caption
from token_merge_plugin.trial.judging import TOLERANCES, best_row, loss, measure_of, verdict
from token_merge_plugin.trial.results import TrialResult, TrialRow, patched
from token_merge_plugin.trial.table import Column, shown_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNREADABLE_SHOWN = 100
# Colours of the chart on paper. In the page they are CSS variables by these names, and others on dark screens.
COLOURS = {"ink": "#1f2328", "muted": "#59636e", "rule": "#d1d9e0", "band": "#e6f4ea", "paper": "#ffffff"}
# (colour, marker, line): told apart by each of the three. The colours are after Okabe and Ito's.
SERIES: dict[str, tuple[str, str, Any]] = {
    "merge": ("#0072b2", "o", "-"),
    "tome": ("#c44e00", "s", (0, (6, 2))),
    "late_tome": ("#8a6100", "v", (0, (9, 2, 3, 2))),
    "evit": ("#007d5b", "^", (0, (6, 2, 1, 2))),
    "ppt": ("#5f4bb6", "P", (0, (3, 1.5))),
    "prune": ("#b4508a", "D", (0, (1, 1.5))),
    "random": ("#6e6e6e", "X", (0, (3, 2, 1, 2, 1, 2))),
}
# Losses beyond this many points, or times the tolerable loss if that is more, are drawn on a logarithmic scale: one bad
# method must not flatten all the others.
LINEAR_POINTS = 5.0


@dataclass(frozen=True)
class Cell:
    """A number in the report's table, as text, and whether it is the best of those that it is compared with."""

    text: str
    best: bool


@dataclass(frozen=True)
class Fact:
    """A number of the recommended row that is shown large, what it is, and what it is compared with."""

    number: str
    name: str
    detail: str


@dataclass(frozen=True)
class Point:
    """Where a row is on the chart: at a speed-up and a difference to the unpatched model, in points, with interval."""

    row: TrialRow
    speed_up: float
    difference: float
    interval: tuple[float, float]


def require_charts() -> None:
    """Return if charts can be drawn, so that a trial of ten minutes does not fail at its end.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"Charts need matplotlib, which is not installed. {how_to_install('matplotlib', 'charts')}"
        ) from error


def write_html(result: TrialResult, pictures: Sequence[Picture], path: str | Path) -> None:
    """Write the report of a trial: one HTML file that needs nothing else, neither other files nor a network.

    Equal results give equal files.

    Args:
        result: with at least the unpatched model's row.
        pictures: images with what was kept and merged at each stage; may be empty.
        path: of the file, which is replaced if it exists.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_charts()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        result=result,
        verdict=verdict(result),
        facts=_facts(result),
        chart=_chart_svg(result, (760, 430)),
        narrow_chart=_chart_svg(result, (380, 420), "narrow-"),
        timed=_is_timed(result),
        measure=measure_of(result),
        columns=shown_columns(result),
        groups=_groups(result),
        recommended=best_row(result),
        several_methods=_has_several_methods(result),
        unreadable=result.unreadable[:UNREADABLE_SHOWN],
        pictures=pictures,
        scaled=scaled,
        image_uri=image_uri,
        stage_caption=stage_caption,
        colours=COLOURS,
        series=SERIES,
    )
    Path(path).write_bytes(page.encode("utf-8", "replace"))  # a file's name may hold bytes that are no text


def write_png(result: TrialResult, path: str | Path) -> None:
    """Write the chart of a trial, under its verdict, as a PNG of 1520 x 1040 pixels.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_charts()
    with _own_style():
        figure = _chart(result, (760, 520))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        title = "\n".join(textwrap.wrap(verdict(result), 64))
        figure.suptitle(title, x=0.02, ha="left", size=13, weight="bold", color=COLOURS["ink"])
        source = f"{result.model}; {result.data}; {result.device}, {result.dtype}"
        figure.supxlabel(textwrap.shorten(source, 120, placeholder=" ..."), size=9, color=COLOURS["muted"])
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def image_uri(image: Image.Image) -> str:
    """Return the image as a data URI, in JPEG or PNG, whichever is smaller."""
    uris = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80, "optimize": True})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        uris.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(uris, key=len)


def _facts(result: TrialResult) -> list[Fact]:
    """Return what the recommended row brings and costs; nothing if none is recommended."""
    row, unpatched = best_row(result), result.rows[0]
    if row is None:
        return []
    facts = []
    if row.speed_up is not None:
        detail = "compared with the unpatched model, measured in turns"
        if row.images_per_second is not None and unpatched.images_per_second is not None:
            detail = f"{row.images_per_second:.0f} images a second instead of {unpatched.images_per_second:.0f}"
        facts.append(Fact(f"{row.speed_up:.2f}x", "the speed", detail))
    detail = f"{row.gmacs:.3g} instead of {unpatched.gmacs:.3g} billion multiply-adds an image"
    facts.append(Fact(f"{row.reduction:.0%}", "less computation", detail))
    if row.top1 is not None and unpatched.top1 is not None and row.top1_difference is not None:
        detail = f"{row.top1:.2%} of the images right instead of {unpatched.top1:.2%}"
        if row.top1_interval is not None:
            low, high = row.top1_interval
            detail += f"; between {100 * low:+.2f} and {100 * high:+.2f} with 95 % confidence"
        facts.append(Fact(f"{100 * row.top1_difference:+.2f}", "points of accuracy", detail))
    if row.agreement is not None:
        facts.append(Fact(f"{row.agreement:.2%}", "same predictions", "as the unpatched model's, image by image"))
    elif row.cosine is not None:
        facts.append(Fact(f"{row.cosine:.4f}", "cosine similarity", "of the features with the unpatched model's"))
    if row.patch_error is not None:
        detail = "their distance to the unpatched model's, as a share of the length of these"
        facts.append(Fact(f"{row.patch_error:.1%}", "error of the patch tokens", detail))
    if row.head_change is not None:
        facts.append(Fact(f"{row.head_change:.3g}", "change of the head's output", "mean absolute difference"))
    return facts


def _groups(result: TrialResult) -> list[list[tuple[TrialRow, list[Cell]]]]:
    """Return the table's rows: the unpatched model, then one group for each keep rate, the largest first.

    The best numbers are those of a group: there, methods cost the same. With one method, they are those of all rows.
    """
    columns = shown_columns(result)
    rows = sorted(patched(result), key=lambda row: -(row.keep_rate or 0.0))
    groups = [list(group) for _, group in groupby(rows, lambda row: row.keep_rate)]
    several = _has_several_methods(result)
    compared = [([result.rows[0]], []), *((group, group if several else rows) for group in groups)]
    return [[(row, [_cell(column, row, others) for column in columns]) for row in group] for group, others in compared]


def _cell(column: Column, row: TrialRow, others: Sequence[TrialRow]) -> Cell:
    values = [value for other in others if (value := column.value(other)) is not None]
    is_best = (
        column.better != 0
        and min(values, default=None) != max(values, default=None)
        and column.value(row) == (max(values) if column.better > 0 else min(values))
    )
    return Cell(column.cell(row), is_best)


def _has_several_methods(result: TrialResult) -> bool:
    return len({row.method for row in patched(result)}) > 1


def _is_timed(result: TrialResult) -> bool:
    return any(row.speed_up is not None for row in patched(result))


def _points(result: TrialResult) -> dict[str, list[Point]]:
    """Return {method: points in the order of speed-up}.

    Where no speed was measured, the ideal speed-up stands in: the one of time that goes down as multiply-adds do.
    """
    measure, timed = measure_of(result), _is_timed(result)
    points: dict[str, list[Point]] = {}
    for row in patched(result):
        lost = loss(result, row, measure)
        speed_up = row.speed_up if timed else 1 / (1 - row.reduction)
        if lost is None or speed_up is None or not math.isfinite(lost):
            continue
        low, high = (row.top1_interval if measure == "top-1" else None) or (-lost, -lost)
        point = Point(row, speed_up, -100 * lost, (100 * low, 100 * high))
        points.setdefault(row.method, []).append(point)
    return {method: sorted(series, key=lambda point: point.speed_up) for method, series in points.items()}


@contextmanager
def _own_style(font_size: float = 11) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": "token-merge", "text.parse_math": False, "font.size": font_size}
        )
        yield


def _chart(result: TrialResult, size: tuple[int, int]) -> "Figure":
    """Draw what is kept against the speed-up, one line a method. `size` is (width, height) in pixels of 1/100 inch."""
    from matplotlib.figure import Figure

    figure = Figure((size[0] / 100, size[1] / 100), dpi=100, layout="constrained", facecolor=COLOURS["paper"])
    axes = figure.add_subplot(facecolor="none")
    points = _points(result)
    _draw_scale(axes, result, [point for series in points.values() for point in series])
    for method, series in points.items():
        _draw_series(axes, method, series, named="merge" if "merge" in points else next(iter(points)))
    axes.plot(
        [1], [0], "*", ms=15, mfc=COLOURS["ink"], mec=COLOURS["paper"], label="unpatched", gid="unpatched", zorder=4
    )
    best = best_row(result)
    for point in (point for series in points.values() for point in series if point.row == best):
        place = [point.speed_up], [point.difference]
        axes.plot(*place, "o", ms=15, mfc="none", mec=COLOURS["ink"], label="recommended", gid="recommended", zorder=4)
    tolerable = -100 * TOLERANCES[measure_of(result) or "top-1"], axes.get_ylim()[1]
    axes.axhspan(*tolerable, fc=COLOURS["band"], lw=0, zorder=0, label="tolerable loss", gid="tolerable")
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.11),
        ncols=4 if size[0] > 500 else 2,
        frameon=False,
        labelcolor=COLOURS["ink"],
        handlelength=2.4,
        columnspacing=1.4,
        borderpad=0.4,
        labelspacing=0.7,
        borderaxespad=0,
        fontsize="small",
    )
    return figure


def _draw_series(axes: "Axes", method: str, series: Sequence[Point], named: str) -> None:
    colour, marker, line = SERIES[method]
    x, y = [point.speed_up for point in series], [point.difference for point in series]
    low, high = zip(*(point.interval for point in series), strict=True)
    axes.vlines(x, low, high, colors=colour, lw=1.2, alpha=0.45, gid=f"interval-{method}")
    width = 2.2 if method == "merge" else 1.5
    axes.plot(
        x,
        y,
        marker,
        ls=line,
        lw=width,
        ms=8,
        color=colour,
        mec=COLOURS["paper"],
        label=method,
        gid=f"series-{method}",
        zorder=3,
    )
    if method == named:
        for point in series:
            place = point.speed_up, point.difference
            axes.annotate(
                "" if point.row.keep_rate is None else f"{point.row.keep_rate:g}",
                place,
                (7, 7),
                textcoords="offset points",
                color=colour,
            )


def _draw_scale(axes: "Axes", result: TrialResult, points: Sequence[Point]) -> None:
    """Draw everything but the data: the range, the ticks and the lines of the grid."""
    measure = measure_of(result)
    tolerance = 100 * TOLERANCES[measure or "top-1"]
    labels = {
        "top-1": ("difference in top-1, points", lambda y, _: f"{y:+.4g}" if y else "0"),
        "agreement": ("same prediction, % of the images", lambda y, _: f"{100 + y:.4g}" if y < 1e-9 else ""),
        "cosine": ("cosine similarity of the features", lambda y, _: f"{1 + y / 100:.4g}" if y < 1e-9 else ""),
        "patch error": ("error of the patch tokens, %", lambda y, _: f"{abs(y):.4g}" if y < 1e-9 else ""),
        None: ("accuracy: not measured", lambda y, _: ""),
    }
    label, formatter = labels[measure]
    lowest = min([point.difference for point in points], default=0)
    bottom = min([-2 * tolerance, *(1.15 * point.interval[0] for point in points)])
    top = max([0.3 * tolerance, *(1.25 * point.interval[1] for point in points)])
    unit = max(1, tolerance)
    if lowest < -LINEAR_POINTS * unit:
        axes.set_yscale("symlog", linthresh=unit, linscale=0.8)
        ticks = [unit * tick for tick in (5, 2, 1, 0.5, 0, -0.5, -1, -2, -5, -10, -20, -50, -100)]
        axes.set_yticks([tick for tick in ticks if bottom <= tick <= top])
        axes.minorticks_off()
        label += " (log scale)"
    axes.set_ylim(bottom, top)
    axes.axhline(0, color=COLOURS["muted"], lw=1, zorder=1)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_major_formatter(formatter)
    axes.set_title(label, loc="left", size="medium", color=COLOURS["ink"])
    axes.set_xlabel("speed-up" if _is_timed(result) else "ideal speed-up (no speed was measured)", color=COLOURS["ink"])
    axes.tick_params(color=COLOURS["rule"], labelcolor=COLOURS["muted"])
    axes.grid(color=COLOURS["rule"], lw=0.6, zorder=0.5)
    axes.spines[:].set_visible(False)


def _chart_svg(result: TrialResult, size: tuple[int, int], prefix: str = "") -> str:
    """Return the chart as SVG to put into a page: text stays text, colours are the page's variables.

    Args:
        result: of the trial.
        size: (width, height) in pixels.
        prefix: for the ids, which must differ from those of other charts in the page.
    """
    file = io.StringIO()
    with _own_style(font_size=11 if size[0] > 500 else 9):
        figure = _chart(result, size)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :])
    names = COLOURS | {f"series-{method}": colour for method, (colour, _, _) in SERIES.items()}
    for name, colour in names.items():
        svg = svg.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = (
        f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-labelledby="{prefix}chart-title" '
        f'aria-describedby="{prefix}chart-description">'
        f'<title id="{prefix}chart-title">{escape(verdict(result))}</title>'
        f'<desc id="{prefix}chart-description">{escape(_chart_words(result))}</desc>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _chart_words(result: TrialResult) -> str:
    """Describe the chart for those who do not see it."""
    names = {
        "top-1": "points of top-1",
        "agreement": "points of same predictions",
        "cosine": "hundredths of cosine",
        "patch error": "% of the patch tokens' length",
    }
    unit = names.get(measure_of(result) or "")
    sentences = ["Speed-up and difference to the unpatched model."]
    for method, series in _points(result).items():
        points = [
            f"keep rate {p.row.keep_rate or 'of its own'}: {p.speed_up:.2f}x, {p.difference:+.2f} {unit}"
            for p in series
        ]
        sentences.append(f"Method {method}: {'; '.join(points)}.")
    return " ".join(sentences)
