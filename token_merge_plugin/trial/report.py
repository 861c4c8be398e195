"""The report of a trial: one HTML file that anybody can read, and its chart as a PNG.

Charts need matplotlib, the extra `charts`. Only its object-oriented interface is used: pyplot's figures, and the
settings of the user's own plots, stay as they are.
"""

import base64
import io
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import MissingExtraError, how_to_install
from token_merge_plugin.trial.drawing import LEGEND, Picture, scaled, stage_caption
from token_merge_plugin.trial.judging import (
    TOLERANCES,
    best_row,
    caveats,
    headline,
    loss,
    measure_of,
    setting_of,
    verdict,
)
from token_merge_plugin.trial.results import TrialResult, TrialRow, patched
from token_merge_plugin.trial.table import Column, decisive_columns, further_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNREADABLE_SHOWN = 100
PICTURES_SHOWN = 4
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


# Where a label may be, from its point, in points of 1/72 inch; and which of its sides are there.
PLACES: tuple[tuple[tuple[int, int], str, str], ...] = (
    ((7, 7), "left", "bottom"),
    ((-7, 7), "right", "bottom"),
    ((7, -7), "left", "top"),
    ((-7, -7), "right", "top"),
    ((0, 14), "center", "bottom"),
    ((0, -14), "center", "top"),
    ((16, 0), "left", "center"),
    ((-16, 0), "right", "center"),
)


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
    decisive, further = decisive_columns(result), further_columns(result)
    page = environment.get_template("report.html").render(
        result=result,
        headline=headline(result),
        caveats=caveats(result),
        facts=_facts(result),
        next_steps=_next_steps(result),
        tolerance=_tolerance(result),
        chart=_chart_svg(result, (760, 430)),
        narrow_chart=_chart_svg(result, (380, 420), "narrow-"),
        timed=_is_timed(result),
        measure=measure_of(result),
        tables=[
            ("Speed, and what it costs", decisive, _groups(result, decisive)),
            ("Further numbers", further, _groups(result, further)),
        ],
        recommended=best_row(result),
        several_methods=_has_several_methods(result),
        unreadable=result.unreadable[:UNREADABLE_SHOWN],
        pictures=pictures[:PICTURES_SHOWN],
        folded=pictures[PICTURES_SHOWN:],
        legend=LEGEND,
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
        size = 13 if len(verdict(result)) < 250 else 10
        title = _fitted(verdict(result), 0.94 * 760, size, "bold")
        figure.suptitle(title, x=0.02, ha="left", size=size, weight="bold", color=COLOURS["ink"])
        source = f"{result.model}; {result.data}; {result.device}, {result.dtype}"
        figure.supxlabel(_fitted(source, 0.94 * 760, 9, "normal"), size=9, color=COLOURS["muted"])
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def _fitted(text: str, width: float, size: float, weight: str) -> str:
    """Break a text into lines of at most so many pixels of 1/100 inch, unless a word is longer."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    def length(line: str) -> float:
        return TextPath((0, 0), line, size, prop=font).get_extents().width * 100 / 72

    font = FontProperties(weight=weight)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and length(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


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
        if row.speed_up_interval is not None:
            low, high = row.speed_up_interval
            detail += f"; between {low:.2f}x and {high:.2f}x with 95 % confidence"
        facts.append(Fact(f"{row.speed_up:.2f}x", "the speed", detail))
    if row.latency_speed_up is not None and result.batch_size > 1:
        detail = "for one image at a time"
        if row.latency is not None and unpatched.latency is not None:
            detail += f": {row.latency:.3g} instead of {unpatched.latency:.3g} ms"
        facts.append(Fact(f"{row.latency_speed_up:.2f}x", "at batch size 1", detail))
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


def _next_steps(result: TrialResult) -> list[tuple[str, str]]:
    """Return what to do next with the recommended row: (what for, what to copy)."""
    row = best_row(result)
    if row is None or row.config is None:
        return []
    config = MergeConfig.from_json(row.config)
    if row.keep_rate is not None and config == MergeConfig(row.keep_rate):
        options = f"{row.keep_rate:g}"
        command = f"token-merge run --keep-rate {options} your_script.py"
    else:
        options = f"token_merge_plugin.MergeConfig.from_json({row.config!r})"
        command = f"TOKEN_MERGE_OPTIONS={shlex.quote(row.config)} python your_script.py"
    return [
        ("In Python:", f"import token_merge_plugin\n\ntoken_merge_plugin.apply(model, {options})"),
        ("A script that creates its model by timm, as it is:", command),
    ]


def _tolerance(result: TrialResult) -> str:
    """Return, in words, what loss is tolerable for the verdict."""
    return {
        "top-1": "up to 0.5 points of top-1",
        "agreement": "another prediction for up to 1 % of the images",
        "cosine": "a cosine similarity of the features down to 0.99",
        "patch error": "patch tokens that are up to 10 % off",
    }.get(measure_of(result) or "", "not judged")


def _groups(result: TrialResult, columns: Sequence[Column]) -> list[list[tuple[TrialRow, list[Cell]]]]:
    """Return the table's rows: the unpatched model, then one group for each keep rate, the largest first.

    The best numbers are those of a group: there, methods cost the same. With one method, they are those of all rows.
    """
    rows = sorted(patched(result), key=lambda row: (-(row.keep_rate or 0.0), row.setting or ""))
    groups = [list(group) for _, group in groupby(rows, lambda row: (row.keep_rate, row.setting))]
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
        _draw_series(axes, method, series)
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
    if points:
        named = "merge" if "merge" in points else next(iter(points))
        _draw_labels(axes, points[named], SERIES[named][0], [point for series in points.values() for point in series])
    return figure


def _draw_series(axes: "Axes", method: str, series: Sequence[Point]) -> None:
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


def _draw_labels(axes: "Axes", series: Sequence[Point], colour: str, points: Sequence[Point]) -> None:
    """Write each point's setting where it covers no point, no other label and not the series' line; or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()  # places the axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    taken = [
        Bbox.from_bounds(x - 6, y - 6, 12, 12)
        for x, y in axes.transData.transform([(1.0, 0.0), *((point.speed_up, point.difference) for point in points)])
    ]
    line = axes.transData.transform([(point.speed_up, point.difference) for point in series])
    for (x0, y0), (x1, y1) in pairwise(line):
        shares = [step / 40 for step in range(3, 38)]  # the ends are points
        taken += [Bbox.from_bounds(x0 + t * (x1 - x0) - 1, y0 + t * (y1 - y0) - 1, 2, 2) for t in shares]
    for point in series:
        text = axes.annotate(
            point.row.setting or "" if point.row.keep_rate is None else f"{point.row.keep_rate:g}",
            (point.speed_up, point.difference),
            (0, 0),
            textcoords="offset points",
            color=colour,
            in_layout=False,
        )
        for offset, horizontal, vertical in PLACES:
            text.xyann = offset
            text.set(ha=horizontal, va=vertical)
            box = text.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            text.remove()


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
    svg = _with_hover_titles(svg, result, prefix)
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


def _with_hover_titles(svg: str, result: TrialResult, prefix: str) -> str:
    """Give each point of the chart a title, which browsers show beside the pointer."""
    for method, series in _points(result).items():
        start = svg.index(f'<g id="{prefix}series-{method}">')
        titles = iter(f"{method}, {setting_of(point.row)}: {_place(result, point)}" for point in series)

        def titled(match: re.Match[str], titles: Iterator[str] = titles) -> str:
            title = next(titles, None)
            return match[0] if title is None else f"<use{match[1]}><title>{escape(title)}</title></use>"

        svg = svg[:start] + re.sub(r"<use([^>]*)/>", titled, svg[start:])
    return svg


def _place(result: TrialResult, point: Point) -> str:
    units = {
        "top-1": "points of top-1",
        "agreement": "points of same predictions",
        "cosine": "hundredths of cosine",
        "patch error": "% of the patch tokens' length",
    }
    return f"{point.speed_up:.2f}x, {point.difference:+.2f} {units.get(measure_of(result) or '')}"


def _chart_words(result: TrialResult) -> str:
    """Describe the chart for those who do not see it."""
    sentences = ["Speed-up and difference to the unpatched model."]
    for method, series in _points(result).items():
        points = [f"{setting_of(point.row)}: {_place(result, point)}" for point in series]
        sentences.append(f"Method {method}: {'; '.join(points)}.")
    return " ".join(sentences)
