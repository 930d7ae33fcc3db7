"""Every figure there is, in one style: methods with intervals, curves, and what trials tried."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from rsllm.evaluate.metrics import compared_metrics
from rsllm.report import trials as searched
from rsllm.report.datasets import DatasetTables
from rsllm.report.tables import Results, show

STYLE = Path(__file__).with_name("page.mplstyle")
COLOURS = re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", STYLE.with_suffix(".css").read_text())
"""The page's, with their names there; the light scheme's come first."""
ACCENT, SERIES, QUIET, NUM_COLOURS = "C0", "C1", "C7", 8
WIDTH, HEIGHT, ROW, COLUMNS = 3.7, 2.5, 0.26, 3
"""Inches of a panel, and of a method's row; panels of trials side by side."""
LONGEST, GAP = 40, 0.075
"""Characters of a name; the height of an axis' share between names beside it."""
BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
METRIC, PUBLISHED = "HR@1", "HitRatio@1"
COSTS = {"seconds": "training, seconds", "trainable": "trained numbers"}
"""What an axis says of a cost, where it is not training and the cost's name."""
FRAME = Markup(
    "<figure><figcaption>{0}</figcaption>"
    '<div class="drawn" tabindex="0" role="img" aria-label="{0}">{1}</div></figure>'
)
Fill = Callable[[Canvas], None]
Curves = Mapping[str, Mapping[str, Sequence[str]]]
"""By what was spent, as cells name it, curves of HR@1 by name, through these entries."""


class Intervals(NamedTuple):
    """A panel of estimates by method."""

    title: str
    label: str
    estimates: Mapping[str, Mapping[str, float]]
    chance: float | None
    published: Mapping[str, Mapping[str, Any]]
    """Metrics of others, by publication and method."""


class Line(NamedTuple):
    """A curve through numbers or estimates, with its name beside its end, if it has one."""

    points: Sequence[tuple[float, Any]]
    label: str
    colour: str


class Axes(NamedTuple):
    """A panel of curves."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    chance: float | None
    cost: bool = False
    """Whether equal factors along x are equally far apart."""


def write_figure(folder: Path, fill: Fill) -> None:
    """Write figure.svg, figure.pdf and figure.png of what `fill` draws."""
    with rc_context(fname=STYLE):
        canvas = Canvas()
        fill(canvas)
        canvas.savefig(folder / "figure.svg", metadata={"Date": None})
        canvas.savefig(folder / "figure.pdf", metadata={"CreationDate": None})
        canvas.savefig(folder / "figure.png")


def inline(title: str, fill: Fill) -> Markup:
    """Draw for a page, whose font and scheme of colours it then follows."""
    with rc_context({"svg.fonttype": "none"}, STYLE):
        canvas, file = Canvas(), io.StringIO()
        fill(canvas)
        silent = dict.fromkeys(("Date", "Format", "Type", "Creator"))
        canvas.savefig(file, format="svg", transparent=True, metadata=silent)
    drawn = file.getvalue()
    # Figures of one page would otherwise share their ids.
    prefix = re.sub("[^a-z]+", "-", title.lower())
    drawn = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", drawn[drawn.index("<svg") :])
    for name, colour in COLOURS:
        drawn = drawn.replace(f": {colour}", f": var(--{name})")
    return FRAME.format(title, Markup(drawn))


def of_methods(results: Results) -> Markup | None:
    """The methods of a study by each metric that is compared."""
    chance = (results.get("search") or {}).get("chance") or {}
    panels = [
        Intervals("", f"{metric}, mean over users", found, chance.get(metric), {})
        for metric in compared_metrics("MRR")
        if (found := {m["name"]: e for m in results["methods"] if (e := m["metrics"].get(metric))})
    ]
    title = "The methods, the best first, with 95 % intervals"
    return inline(title, lambda canvas: draw_intervals(canvas, panels)) if panels else None


def of_training(results: Results) -> Markup | None:
    """The score of all trials while they trained."""
    search, metric = results["search"], results["search"]["metric"]
    lines = []
    for trial in results["trials"]:
        if points := [(p["samples"], p[metric]) for p in trial["curve"] if metric in p]:
            lines.append(Line(points, *_marked(trial, search)))
    label, chance = f"{search['split']} {metric}", (search.get("chance") or {}).get(metric)
    rows = [[Axes("", "training samples", label, lines, chance)]]
    return inline("While training", lambda canvas: _draw_curves(canvas, rows)) if lines else None


def of_trials(results: Results) -> Markup | None:
    """The score of each trial by its number, by what it tried and, where that counted, its cost."""
    search, trials = results["search"], results["trials"]
    metric, known = search["metric"], searched.scored(trials, search["metric"])
    if not known or "name" in known[0]:
        return None
    rows = []
    for trial in known:
        goals = (trial.get("objectives") or {}).items()
        costs = {goal: value for goal, value in goals if not searched.rising(goal)}
        rows.append(({"trial": trial["number"], **trial["parameters"], **costs}, trial))
    names = searched.names([row for row, _ in rows])

    def fill(canvas: Canvas) -> None:
        down, first = math.ceil(len(names) / COLUMNS), None
        canvas.set_size_inches(WIDTH * COLUMNS, HEIGHT * down)
        canvas.supylabel(f"{search['split']} {metric}", color=QUIET, size="medium")
        for place, name in enumerate(names, start=1):
            axis = canvas.add_subplot(down, COLUMNS, place, sharey=first)
            first = first or axis
            kept = [(row[name], trial) for row, trial in rows if row.get(name) is not None]
            numbers = [value for value, _ in kept]
            numeric = searched.numeric(numbers)
            for value, trial in kept:
                label, colour = _marked(trial, search)
                point = value if numeric else _short(str(value)), trial[metric]
                full = "full" if trial["state"] == "finished" else "none"
                axis.plot(*point, "D" if label else "o", color=colour, fillstyle=full)
                axis.annotate(label, point, (6, 3), color=colour, **BESIDE)
            if place == 1:  # there is no trial between two trials
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            elif numeric:
                axis.set_xscale("log" if searched.spans_decades(numbers) else "linear")
                _plain_numbers(axis)
            axis.set_xlabel(_short(name))
            axis.tick_params(labelleft=place % COLUMNS == 1)

    return inline("Trials by what they tried; hollow: stopped early", fill)


def of_grid(panels: Sequence[DatasetTables], curves: Curves) -> Fill:
    """HR@1 of a grid's data sets: by what was spent, if curves say so, or else of each entry."""
    label = f"{METRIC}, share of users"
    if curves:
        labels = list(dict.fromkeys(chain(*curves.values())))
        rows: list[list[Axes]] = [[] for _ in panels]
        for row, panel in zip(rows, panels, strict=True):
            for cost, named in curves.items():
                lines = []
                for name, entries in named.items():
                    cells = [panel.cells[e] for e in entries if panel.cells.get(e, {}).get(cost)]
                    cells.sort(key=lambda cell: float(cell[cost]))
                    points = [(cell[cost], cell["metrics"][METRIC]) for cell in cells]
                    colour = f"C{labels.index(name) % NUM_COLOURS}"
                    lines += [Line(points, name, colour)] if points else []
                spent = COSTS.get(cost, f"training {cost}")
                row.append(Axes(_title(panel), spent, label, lines, panel.chance, True))
        return lambda canvas: _draw_curves(canvas, rows)
    intervals = []
    for panel in panels:
        found = {name: cell["metrics"][METRIC] for name, cell in panel.cells.items()}
        intervals.append(Intervals(_title(panel), label, found, panel.chance, panel.published))
    return lambda canvas: draw_intervals(canvas, intervals)


def draw_intervals(canvas: Canvas, panels: Sequence[Intervals]) -> None:
    """Draw a panel beside the other, a row for each method, the best on top and marked."""

    def best(name: str) -> float:
        return max(panel.estimates[name]["value"] for panel in panels if name in panel.estimates)

    names = sorted({n: None for panel in panels for n in panel.estimates}, key=best, reverse=True)
    canvas.set_size_inches(WIDTH * len(panels) + 2, ROW * len(names) + 1.3)
    (axes,) = canvas.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, panel in zip(axes, panels, strict=True):
        first = max(panel.estimates, key=lambda name: panel.estimates[name]["value"])
        for name, estimate in panel.estimates.items():
            marker, colour = ("D", ACCENT) if name == first else ("o", SERIES)
            place = names.index(name)
            value, high = estimate["value"], estimate["high"]
            axis.errorbar(value, place, xerr=_error([estimate]), fmt=marker, color=colour)
            axis.annotate(f"{value:.3f}", (high, place), (5, 0), color=colour, **BESIDE)
        for marker, (publication, rows) in zip("sPX^", panel.published.items(), strict=False):
            figures = [(rows.get(n, {}).get(PUBLISHED), place) for place, n in enumerate(names)]
            if points := [figure for figure in figures if isinstance(figure[0], float)]:
                style = {"color": QUIET, "fillstyle": "none"}
                label = f"{publication}: {PUBLISHED}"
                axis.plot(*zip(*points, strict=True), marker, label=label, **style)
        if panel.chance is not None:
            axis.axvline(panel.chance, color=QUIET, linestyle="--", label="chance")
        axis.set(title=panel.title, xlabel=panel.label)
        axis.margins(x=0.14)
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), map(_short, names))
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    legends = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
    handles = {label: handle for legend in legends for handle, label in legend}
    canvas.legend(handles.values(), handles, loc="outside lower center", ncols=4)


def _draw_curves(canvas: Canvas, rows: Sequence[Sequence[Axes]]) -> None:
    """Draw rows of panels; in them a single point is a level too."""
    down, across = len(rows), len(rows[0])
    canvas.set_size_inches((WIDTH + 1.3) * across, HEIGHT * down)
    panels = canvas.subplots(down, across, sharey=rows[0][0].cost, squeeze=False).flat
    for axis, (title, x, y, lines, chance, cost) in zip(panels, chain(*rows), strict=True):
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log" if cost else "linear")
        ends = []
        for points, label, colour in lines:
            places, heights = zip(*points, strict=True)
            values = [each["value"] if isinstance(each, Mapping) else each for each in heights]
            error = _error(heights) if isinstance(heights[0], Mapping) else None
            width = 1.8 if label else 0.8
            axis.errorbar(places, values, error, fmt="o-", color=colour, label=label, lw=width)
            if len(points) == 1 and label:
                axis.axhline(values[0], color=colour, linestyle=":")
            ends += [(values[-1], label, colour)] if label else []
        if chance is not None:
            axis.axhline(chance, color=QUIET, linestyle="--")
            ends.append((chance, "chance", QUIET))
        _plain_numbers(axis)
        (low, high), place = axis.get_ylim(), -math.inf
        for value, label, colour in sorted(ends):
            place = max((value - low) / (high - low), place + GAP)  # no name over another
            at = {"xy": (1, place), "xytext": (5, 0), "xycoords": "axes fraction"}
            axis.annotate(_short(label), **at, color=colour, **BESIDE)


def _plain_numbers(axis: Any) -> None:
    """Write the numbers below an axis as people do, and those of whole decades alone."""
    axis.xaxis.set_major_formatter("{x:,.6g}")
    axis.xaxis.set_minor_formatter("")


def _marked(trial: searched.Trial, search: Mapping[str, Any]) -> tuple[str, str]:
    """What a trial's line or point is called, if it is to stand out, and its colour."""
    number = trial["number"]
    if "name" in trial:
        return trial["name"], f"C{number % NUM_COLOURS}"
    return (f"trial {number}", ACCENT) if number == search["best"] else ("", SERIES)


def _error(estimates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """How far the ends of intervals are below and above their values."""
    return [[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]]


def _title(panel: DatasetTables) -> str:
    cells = panel.cells.values()
    seeds = max(len(cell["seeds"]) for cell in cells)
    users, trained = max(cell["n"] for cell in cells), f"{seeds} seeds" if seeds > 1 else "one seed"
    return f"{_short(panel.title)}: {users} test users, {trained}"


def _short(name: str) -> str:
    return f"{show(name):.{LONGEST}}"
