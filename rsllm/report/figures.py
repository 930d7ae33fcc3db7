"""Figures in one style, in vectors and pixels: of a grid, a line per entry, or quality by cost."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsllm.report.datasets import DatasetTables

MISSING = "the figure is left out: matplotlib is not installed (pip install 'rsllm[figures]')"
METRIC, PUBLISHED = "HR@1", "HitRatio@1"
KINDS = ("svg", "pdf", "png")
MARKERS = "DsPX"
PALETTE = ("#c2410c", "#2f6fae", "#2a8a57", "#8250a8", "#96730a", "#bd3568", "#19808c", "#666e79")
"""The colours of the page."""
QUIET = PALETTE[-1]
STYLE = {
    "svg.hashsalt": "rsllm",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
}
COSTS = {
    "samples": "training samples",
    "seconds": "training, seconds",
    "tokens": "training tokens",
    "trainable": "trained numbers",
}
"""What an axis of curves says of a cost."""
INCHES = (4.6, 0.28)
"""A panel's width, and a line's height."""
CURVES_INCHES = (3.6, 2.8)
"""Width and height of a panel of curves."""
Curves = Mapping[str, Mapping[str, Sequence[str]]]


def draw(panels: Sequence[DatasetTables], folder: Path, curves: Curves | None = None) -> str:
    """Write figure.svg, figure.pdf and figure.png.

    Args:
        panels: data sets of which something is on file.
        folder: where.
        curves: by what was spent, as cells name it, curves of HR@1 by name, through these entries;
            without them a line per entry is drawn.

    Returns:
        The SVG; nothing, and a message in the terminal, without matplotlib.
    """

    def fill(figure: Any) -> None:
        if curves:
            _draw_curves(figure, panels, curves)
        else:
            _draw_lines(figure, panels)

    return (folder / "figure.svg").read_text() if write_figure(folder, fill) else ""


def write_figure(folder: Path, fill: Callable[[Any], None]) -> bool:
    """Write figure.svg, figure.pdf and figure.png of what `fill` draws on a matplotlib figure.

    Returns:
        Whether matplotlib is installed; without it a message says what is left out.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print(MISSING, flush=True)
        return False
    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        fill(figure)
        for kind in KINDS:
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            figure.savefig(folder / f"figure.{kind}", dpi=200, metadata=undated)
    return True


def _draw_lines(figure: Any, panels: Sequence[DatasetTables]) -> None:
    """Draw a panel per data set: HR@1 of each entry, beside what was published and chance."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.cells))
    width, height = INCHES
    figure.set_size_inches(width * len(panels) + 2, height * len(names) + 1.6)
    axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for axis, panel in zip(axes, panels, strict=True):
        found = [cell["metrics"][METRIC] for cell in panel.cells.values()]
        values, places = [e["value"] for e in found], list(map(names.index, panel.cells))
        style = {"fmt": "o", "color": PALETTE[1], "label": "ours, 95 % interval"}
        axis.errorbar(values, places, xerr=_error(found), **style)
        for marker, (publication, of) in zip(MARKERS, panel.published.items(), strict=False):
            known = [n for n in names if isinstance(of.get(n, {}).get(PUBLISHED), float)]
            points = [of[n][PUBLISHED] for n in known], [names.index(n) for n in known]
            if known:
                style = {"color": PALETTE[0], "label": f"{publication}: {PUBLISHED}"}
                axis.plot(*points, marker, fillstyle="none", **style)
        axis.axvline(panel.chance, color=QUIET, linestyle="--", label="chance")
        axis.set_title(_title(panel), parse_math=False)
        axis.set_xlabel(f"{METRIC}, share of users")
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), names, parse_math=False)
    axes[0].invert_yaxis()
    legends = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


def _draw_curves(figure: Any, panels: Sequence[DatasetTables], curves: Curves) -> None:
    """Draw a row per data set, a column per kind of cost, on a logarithmic axis."""
    width, height = CURVES_INCHES
    figure.set_size_inches(width * len(curves) + 1, height * len(panels) + 1)
    labels = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    axes = figure.subplots(len(panels), len(curves), sharex="col", sharey="row", squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        for axis, (cost, lines) in zip(row, curves.items(), strict=True):
            for label, names in lines.items():
                cells = [panel.cells[name] for name in names if name in panel.cells]
                color = PALETTE[labels.index(label) % len(PALETTE)]
                _draw_curve(axis, cost, cells, {"label": label, "color": color})
            axis.axhline(panel.chance, color=QUIET, linestyle="--")
            axis.set(xscale="log", xlabel=COSTS.get(cost, cost))
            axis.tick_params("x", which="minor", labelsize=6)
        row[0].set_title(_title(panel), parse_math=False, loc="left")
        row[0].set_ylabel(f"{METRIC}, share of users (dashed: chance)")


def _draw_curve(axis: Any, cost: str, cells: Sequence[Mapping[str, Any]], style: Any) -> None:
    """Join the cells that know what they cost; one alone is also a level to compare with."""
    known = sorted((c for c in cells if c.get(cost)), key=lambda cell: float(cell[cost]))
    found = [cell["metrics"][METRIC] for cell in known]
    spent, values = [cell[cost] for cell in known], [estimate["value"] for estimate in found]
    if known:
        axis.errorbar(spent, values, yerr=_error(found), fmt="o-", **style)
        beside: Any = {"textcoords": "offset points", "xytext": (4, 1), "va": "bottom"}
        beside |= {"color": style["color"], "parse_math": False}
        axis.annotate(style["label"], (spent[-1], values[-1]), **beside)
    if len(known) == 1:
        axis.axhline(values[0], color=style["color"], linestyle=":")


def _error(estimates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """How far the ends of intervals are below and above their values."""
    return [[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]]


def _title(panel: DatasetTables) -> str:
    cells = panel.cells.values()
    seeds = max(len(cell["seeds"]) for cell in cells)
    trained = f"{seeds} seeds" if seeds > 1 else "one seed"
    return f"{panel.title}: {max(cell['n'] for cell in cells)} test users, {trained}"
