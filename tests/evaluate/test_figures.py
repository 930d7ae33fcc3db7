"""What the figures draw, asked of matplotlib's own objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from test_report import estimate, study, trial

from rsllm.report import figures
from rsllm.report.figures import Intervals

Drawn = Callable[..., list[Axes]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The axes of what a maker of figures puts on a page."""

    def axes(make: Callable[..., Any], *given: Any) -> list[Axes]:
        canvas = Canvas()
        monkeypatch.setattr(figures, "inline", lambda title, fill: fill(canvas))
        make(*given)
        return canvas.axes

    return axes


def texts(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts if text.get_text()]


def points(axis: Axes) -> dict[tuple[float, float], str]:
    """Where single points are, with how they are filled."""
    lines = [line for line in axis.lines if line.get_marker() in ("o", "D")]
    return {tuple(line.get_xydata()[0]): line.get_fillstyle() for line in lines}


def test_the_best_method_is_on_top_and_marked() -> None:
    found = {"a": estimate(0.2), "b": estimate(0.4), "c": estimate(0.3)}
    canvas, others = Canvas(), {"paper": {"a": {"HitRatio@1": 0.25}, "x": {"HitRatio@1": 0.5}}}
    panels = [
        Intervals("here", "HR@1", found, 0.05, others),
        Intervals("there", "HR@1", {"d": estimate(0.1)}, None, {}),
    ]
    figures.draw_intervals(canvas, panels)
    here, there = canvas.axes
    names = [label.get_text() for label in here.get_yticklabels()]
    assert names == ["b", "c", "a", "d"]
    assert here.get_ylim()[0] > here.get_ylim()[1], "the first is on top"
    shown = {
        line.get_xydata()[0][0]: line.get_marker()
        for line in here.lines
        if len(line.get_xydata()) == 1
    }
    assert shown[0.4] == "D"
    assert [shown[value] for value in (0.2, 0.3)] == ["o", "o"]
    assert texts(here) == ["0.200", "0.400", "0.300"]
    assert [line.get_xdata()[0] for line in here.lines if line.get_label() == "chance"] == [0.05]
    (published,) = (line for line in here.lines if line.get_label() == "paper: HitRatio@1")
    assert published.get_xydata().tolist() == [[0.25, 2]], "of methods that stand here"
    assert [line.get_xydata().tolist()[0] for line in there.lines if line.get_marker() == "D"] == [
        [0.1, 3]
    ]


def test_curves_leave_out_what_was_not_reported(drawn: Drawn) -> None:
    results = study()
    results["trials"][0]["curve"][1].pop("MRR")
    (score,) = drawn(figures.of_training, results)
    curves = [line.get_xydata().tolist() for line in score.lines if line.get_marker() == "o"]
    assert [len(curve) for curve in curves] == [3, 1, 4]
    assert curves[2][0] == [512, pytest.approx(0.26)]
    assert (score.get_xlabel(), score.get_ylabel()) == ("training samples", "validation MRR")
    assert texts(score) == ["chance", "trial 3"], "from below to above, the chosen one alone"
    for entry in results["trials"]:
        entry["curve"] = []
    assert figures.of_training(results) is None


def test_names_beside_curves_do_not_meet(drawn: Drawn) -> None:
    results = study()
    for number, entry in enumerate(results["trials"]):
        entry |= {
            "name": f"variant {number}",
            "curve": [{"samples": 8, "MRR": 0.3 + 1e-4 * number}],
        }
    (score,) = drawn(figures.of_training, results)
    places = [text.xy[1] for text in score.texts if text.get_text().startswith("variant")]
    assert [b - a for a, b in pairwise(places)] == pytest.approx([figures.GAP] * 3)


def test_trials_stand_by_number_values_and_cost(drawn: Drawn) -> None:
    results = study()
    axes = drawn(figures.of_trials, results)
    assert [axis.get_xlabel() for axis in axes] == [
        "trial",
        "alpha",
        "beta",
        "temperature",
        "gamma",
    ]
    number, alpha, _, temperature, _ = axes
    assert points(number) == {(0, 0.3): "full", (1, 0.32): "none", (3, 0.36): "full"}
    assert points(alpha) == {(0, 0.3): "full", (0.05, 0.32): "none", (0.05 * 3, 0.36): "full"}
    assert [axis.get_xscale() for axis in (alpha, temperature)] == ["linear", "log"]
    assert texts(number) == ["trial 3"]
    assert all(float(place).is_integer() for place in number.get_xticks())


def test_where_cost_counted_it_has_a_panel(drawn: Drawn) -> None:
    results, pairs = study(), [(1.0, 0.1), (2.0, 0.3), (3.0, 0.2)]
    results["trials"] = [
        trial(number) | {"MRR": s, "objectives": {"MRR": s, "device_seconds": c}}
        for number, (c, s) in enumerate(pairs)
    ]
    *_, cost = drawn(figures.of_trials, results)
    assert cost.get_xlabel() == "device_seconds"
    assert points(cost) == dict.fromkeys(pairs, "full")


def test_values_that_are_no_numbers_are_names(drawn: Drawn) -> None:
    results = study()
    for entry, model in zip(results["trials"], ["sasrec", None, "caser", "caser"], strict=True):
        entry["parameters"] = {"model": model}
    _, model = drawn(figures.of_trials, results)
    assert [label.get_text() for label in model.get_xticklabels()] == ["sasrec", "caser"]
    assert points(model) == {(0, 0.3): "full", (1, 0.36): "full"}


def test_a_drawing_follows_the_page_and_shares_no_id(tmp_path: Path) -> None:
    def fill(canvas: Canvas) -> None:
        canvas.subplots().plot([0, 1], [0, 1], "o-", label="x")

    one, other = (figures.inline(title, fill) for title in ("One", "Other"))
    assert "stroke: var(--" in one
    assert "#c2410c" not in one
    assert "<text" in one, "text is text"
    assert not re.search("<(script|metadata|image)", one)
    ids, others = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other))
    assert ids
    assert not ids & others
    references = {
        found for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one) for found in pair
    }
    assert references - {""} <= ids
    figures.write_figure(tmp_path, fill)
    first = (tmp_path / "figure.svg").read_bytes()
    figures.write_figure(tmp_path, fill)
    assert (tmp_path / "figure.svg").read_bytes() == first
