"""A grid as one figure: a line per entry, or quality by cost; in vectors and pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsllm.study.shown import Shown

MISSING = "the figure is left out: matplotlib is not installed (pip install 'rsllm[figures]')"
METRIC, PUBLISHED = "HR@1", "HitRatio@1"
KINDS = ("svg", "pdf", "png")
MARKERS = "DsPX"
INCHES = (4.6, 0.28)
"""A panel's width, and a line's height."""
CURVES_INCHES = (3.2, 2.8)
"""Width and height of a panel of curves."""
Curves = Mapping[str, Mapping[str, Sequence[str]]]


def draw(panels: Sequence[Shown], folder: Path, curves: Curves | None = None) -> Path | None:
    """Write figure.svg, figure.pdf and figure.png.

    Args:
        panels: data sets of which something is on file.
        folder: where.
        curves: see `Grid`.

    Returns:
        The SVG; nothing, and a message in the terminal, without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print(MISSING, flush=True)
        return None
    with rc_context({"svg.hashsalt": "rsllm", "font.size": 8}):
        figure = Figure(layout="constrained")
        axes = _draw_curves(figure, panels, curves) if curves else _draw_lines(figure, panels)
        legends = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
        handles = {label: handle for legend in legends for handle, label in legend}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        for kind in KINDS:
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            figure.savefig(folder / f"figure.{kind}", dpi=200, metadata=undated)
    return folder / "figure.svg"


def _draw_lines(figure: Any, panels: Sequence[Shown]) -> list[Any]:
    """A panel per data set."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.cells))
    width, height = INCHES
    figure.set_size_inches(width * len(panels) + 2, height * len(names) + 1.6)
    axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, names)
    axes[0].set_yticks(range(len(names)), names, parse_math=False)
    axes[0].invert_yaxis()
    return axes


def _draw_panel(axis: Any, panel: Shown, names: Sequence[str]) -> None:
    ours = [(names.index(n), c["metrics"][METRIC]) for n, c in panel.cells.items()]
    values, places = [e["value"] for _, e in ours], [place for place, _ in ours]
    error = _error([e for _, e in ours])
    axis.errorbar(values, places, xerr=error, fmt="o", capsize=2, label="ours, 95 % interval")
    for marker, (publication, found) in zip(MARKERS, panel.published.items(), strict=False):
        known = [n for n in names if isinstance(found.get(n, {}).get(PUBLISHED), float)]
        values, places = [found[n][PUBLISHED] for n in known], [names.index(n) for n in known]
        if known:
            axis.plot(values, places, marker, fillstyle="none", label=f"{publication}: {PUBLISHED}")
    axis.axvline(panel.chance, color="gray", linestyle=":", label="chance")
    axis.set_title(_title(panel), parse_math=False)
    axis.set_xlabel(METRIC)
    axis.grid(axis="x", alpha=0.3)


def _draw_curves(figure: Any, panels: Sequence[Shown], curves: Curves) -> list[Any]:
    """A row per data set, a column per kind of cost, on a logarithmic axis."""
    width, height = CURVES_INCHES
    figure.set_size_inches(width * len(curves) + 1, height * len(panels) + 1)
    labels = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    axes = figure.subplots(len(panels), len(curves), sharex="col", sharey="row", squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        for axis, (cost, lines) in zip(row, curves.items(), strict=True):
            for label, names in lines.items():
                cells = [panel.cells[name] for name in names if name in panel.cells]
                _draw_curve(axis, cost, cells, {"label": label, "color": f"C{labels.index(label)}"})
            axis.set(xscale="log", xlabel=cost)
            axis.tick_params("x", which="minor", labelbottom=False)
            axis.grid(alpha=0.3)
        row[0].set_title(_title(panel), parse_math=False, loc="left")
        row[0].set_ylabel(METRIC)
    return list(axes.flat)


def _draw_curve(axis: Any, cost: str, cells: Sequence[Mapping[str, Any]], style: Any) -> None:
    """Through the cells that know what they cost; one alone is also a level to compare with."""
    known = sorted((c for c in cells if c.get(cost)), key=lambda cell: float(cell[cost]))
    found = [cell["metrics"][METRIC] for cell in known]
    spent, values = [cell[cost] for cell in known], [estimate["value"] for estimate in found]
    if known:
        axis.errorbar(spent, values, yerr=_error(found), fmt="o-", capsize=2, **style)
    if len(known) == 1:
        axis.axhline(values[0], color=style["color"], linestyle=":")


def _error(estimates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """How far the ends of intervals are below and above their values."""
    return [[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]]


def _title(panel: Shown) -> str:
    cells = panel.cells.values()
    users = f"{max(cell['n'] for cell in cells)} test users"
    return f"{panel.title}: {users}, {max(len(cell['seeds']) for cell in cells)} seed(s)"
