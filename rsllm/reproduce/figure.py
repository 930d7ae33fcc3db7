"""A grid as one figure: a panel per data set, a line per entry, in vectors and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsllm.reproduce.shown import Shown

MISSING = "the figure is left out: matplotlib is not installed (pip install 'rsllm[figures]')"
METRIC, PUBLISHED = "HR@1", "HitRatio@1"
KINDS = ("svg", "pdf", "png")
MARKERS = "DsPX"
INCHES = (4.6, 0.28)
"""A panel's width, and a line's height."""


def draw(panels: Sequence[Shown], folder: Path) -> Path | None:
    """Write figure.svg, figure.pdf and figure.png.

    Returns:
        The SVG; nothing, and a message in the terminal, without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print(MISSING, flush=True)
        return None
    names = list(dict.fromkeys(name for panel in panels for name in panel.names))
    width, height = INCHES
    size = (width * len(panels) + 2, height * len(names) + 1.6)
    with rc_context({"svg.hashsalt": "rsllm", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, names)
        axes[0].set_yticks(range(len(names)), names, parse_math=False)
        axes[0].invert_yaxis()
        handles = {label: h for axis in axes for h, label in zip(*_legend(axis), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        for kind in KINDS:
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            figure.savefig(folder / f"figure.{kind}", dpi=200, metadata=undated)
    return folder / "figure.svg"


def _legend(axis: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    return handles, labels


def _draw_panel(axis: Any, panel: Shown, names: Sequence[str]) -> None:
    ours = [(names.index(n), c["metrics"][METRIC]) for n, c in panel.cells.items()]
    low_high = [[e["value"] - e["low"] for _, e in ours], [e["high"] - e["value"] for _, e in ours]]
    values, places = [e["value"] for _, e in ours], [place for place, _ in ours]
    axis.errorbar(values, places, xerr=low_high, fmt="o", capsize=2, label="ours, 95 % interval")
    for marker, (publication, found) in zip(MARKERS, panel.published.items(), strict=False):
        lines = {n: e.get(PUBLISHED) for n, e in found.items()}
        at = [names.index(name) for name, value in lines.items() if isinstance(value, float)]
        known = [value for value in lines.values() if isinstance(value, float)]
        axis.plot(known, at, marker, fillstyle="none", label=publication)
    users = max(cell["n"] for cell in panel.cells.values())
    axis.set_title(f"{panel.title}, {users} users", parse_math=False)
    axis.set_xlabel(METRIC)
    axis.grid(axis="x", alpha=0.3)
