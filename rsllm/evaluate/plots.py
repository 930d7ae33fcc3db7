"""The report's plots, as SVG text that takes its ink from the page and so follows its theme."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Trial = Mapping[str, Any]

INK = "#010203"  # stands for the page's text colour
STYLE = Path(__file__).with_name("report.mplstyle")
CHOSEN, OTHER, CHANCE = "#e0733d", "#4a8fd0", "#8a8f98"
WIDE, SMALL = (5.4, 3.0), (2.6, 2.2)  # inches


@style.context(STYLE)
def learning_curves(
    trials: Sequence[Trial], metric: str, best: int | None, chance: float | None = None
) -> str:
    """`metric` against training samples, one line per trial, stopped and failed ones faint.

    Returns:
        An `<svg>` element; "" if no trial has reported `metric`.
    """
    curves = [(trial, points) for trial in trials if (points := _points(trial, metric))]
    if not curves:
        return ""
    figure, axes = _figure(WIDE)
    for trial, points in curves:
        axes.plot(*zip(*points, strict=True), marker="o", **_look(trial, best))
    if chance is not None:
        axes.axhline(chance, color=CHANCE, linestyle="--", linewidth=1, label="chance")
    axes.set(xlabel="training samples", ylabel=metric)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    return _svg(figure)


@style.context(STYLE)
def tuned_values(trials: Sequence[Trial], parameter: str, metric: str, best: int | None) -> str:
    """Each trial's value of one tuned parameter against its `metric`.

    Returns:
        An `<svg>` element; "" if no trial has both.
    """
    tuned = [trial for trial in trials if trial["parameters"].get(parameter) is not None]
    shown = [trial for trial in tuned if trial.get(metric) is not None]
    if not shown:
        return ""
    values = _axis_values([trial["parameters"][parameter] for trial in shown])
    figure, axes = _figure(SMALL)
    for trial, value in zip(shown, values, strict=True):
        look = _look(trial, best) | {"linestyle": "none", "markersize": 6, "label": None}
        axes.plot([value], [trial[metric]], marker="o", **look)
    axes.set(xlabel=_short(parameter), ylabel=metric)
    if _spans_decades(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    return _svg(figure)


@style.context(STYLE)
def forest(methods: Sequence[Mapping[str, Any]], metric: str, chance: float | None = None) -> str:
    """Every method's mean of `metric` with its 95 % interval.

    Returns:
        An `<svg>` element; "" if no method has `metric`.
    """
    shown = [method for method in methods if method["metrics"].get(metric)]
    if not shown:
        return ""
    figure, axes = _figure((WIDE[0], 0.8 + 0.3 * len(shown)))
    for row, method in enumerate(shown):
        mean = method["metrics"][metric]
        axes.plot([mean["low"], mean["high"]], [row, row], color=OTHER, linewidth=2)
        axes.plot([mean["value"]], [row], marker="o", color=OTHER)
    if chance is not None:
        axes.axvline(chance, color=CHANCE, linestyle="--", linewidth=1, label="chance")
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(shown)), [_short(method["name"]) for method in shown])
    axes.set(xlabel=metric, ylim=(len(shown) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    return _svg(figure)


def _points(trial: Trial, metric: str) -> list[tuple[float, float]]:
    points = [(point["samples"], point.get(metric)) for point in trial["curve"]]
    return [(samples, value) for samples, value in points if value is not None]


def _look(trial: Trial, best: int | None) -> dict[str, Any]:
    name = trial.get("name")
    if trial["number"] == best:
        label = _short(name) if name else f"trial {best}, the best"
        return {"color": CHOSEN, "linewidth": 2, "markersize": 4, "zorder": 3, "label": label}
    alpha = 0.8 if trial["state"] == "finished" else 0.3
    plain = {"linewidth": 1, "markersize": 3, "alpha": alpha}
    return plain | ({"label": _short(name)} if name else {"color": OTHER})


def _axis_values(values: Sequence[Any]) -> Sequence[Any]:
    """Numbers as they are; anything else as names of categories."""
    numeric = all(isinstance(value, int | float) for value in values)
    return values if numeric else [_short(str(value)) for value in values]


def _spans_decades(values: Sequence[Any]) -> bool:
    return not isinstance(values[0], str) and 0 < 20 * min(values) < max(values)


def _short(text: str, width: int = 28) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return shorten(printable, width, placeholder="...") if len(printable) > width else printable


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
