from __future__ import annotations

from typing import Any

import pytest

from rsllm.report import plots
from rsllm.report.plots import Axis


def trial(number: int, score: float | None, state: str = "finished", **more: Any) -> dict[str, Any]:
    curve = [{"samples": 8.0 * s, "MRR": 0.1 * s} for s in (1, 2)] if score is not None else []
    found = {"number": number, "state": state, "MRR": score, "seconds": 60.0, "curve": curve}
    return found | {"parameters": {"rate": 10.0**-number, "norm": None if number else "a"}} | more


def test_places_are_linear_from_margin_to_margin() -> None:
    axis = Axis("x", [0, 10, 5])
    assert [axis(v) for v in (0, 5, 10)] == pytest.approx([0.5 / 11, 0.5, 10.5 / 11])
    assert [text for _, text in axis.ticks] == ["0", "5", "10"]
    assert [place for place, _ in axis.ticks] == pytest.approx([axis(0), axis(5), axis(10)])


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1e-5, 1e-1], ["1e-05", "0.0001", "0.001", "0.01", "0.1"]),
        ([0.01, 1.0], ["0.01", "0.03", "0.1", "0.3", "1"]),
        ([1, 2], ["1", "2"]),
        ([0.5], ["0.45", "0.5", "0.55"]),
        ([64, "none", True], ["64", "True", "none"]),
        ([0, 120_000], ["0", "50,000", "100,000"]),
        ([-0.2, 0.21], ["-0.2", "-0.1", "0", "0.1", "0.2"]),
    ],
)
def test_ticks_are_few_and_round(values: list[Any], texts: list[str]) -> None:
    assert [text for _, text in Axis("x", values, tuned=True).ticks] == texts


def test_decades_are_equally_far_apart() -> None:
    axis = Axis("x", [0.001, 1.0], tuned=True)
    assert axis(0.01) - axis(0.001) == pytest.approx(axis(1.0) - axis(0.1))
    samples = Axis("samples", [64, 2048])
    assert samples(2048) - samples(1056) == pytest.approx(samples(1056) - samples(64))


def test_history_draws_every_score_and_the_best_so_far() -> None:
    chart = plots.history([trial(0, 0.2), trial(1, None, "failed"), trial(2, 0.1)], "MRR")
    assert chart
    x, y = chart.axes
    best, *dots = chart.lines
    assert best.points == [(x(0), y(0.2)), (x(1), y(0.2)), (x(2), y(0.2))]
    assert [dot.points for dot in dots] == [[(x(0), y(0.2))], [], [(x(2), y(0.1))]]
    assert [dot.classes for dot in dots] == ["t0 finished", "t1 failed", "t2 finished"]
    by_cost = plots.history([trial(0, 0.2), trial(1, 0.3)], "MRR", by_cost=True)
    assert by_cost
    assert [text for _, text in by_cost.axes[0].ticks] == ["1", "1.5", "2"]


def test_curves_leave_out_what_was_not_reported() -> None:
    chart = plots.learning_curves([trial(0, 0.2), trial(1, None)], "MRR", "title", chance=0.05)
    assert chart
    x, y = chart.axes
    assert [len(line.points) for line in chart.lines] == [2, 0, 2]
    assert chart.lines[-1].points == [(x(8), y(0.05)), (x(16), y(0.05))]
    assert plots.learning_curves([trial(0, 0.2)], "loss", "title", chance=0.05) is None


def test_parallel_coordinates_end_at_the_score_with_the_best_on_top() -> None:
    chart = plots.parallel_coordinates([trial(0, 0.2), trial(1, 0.1), trial(2, None)], "MRR")
    assert chart
    assert [axis.label for axis in chart.axes] == ["rate", "norm", "MRR"]
    assert [line.classes for line in chart.lines] == ["t1 finished", "t0 finished"]
    assert [[x for x, _ in line.points] for line in chart.lines] == [[0, 2], [0, 1, 2]]
    assert chart.lines[1].points[-1][1] == pytest.approx(chart.axes[-1](0.2))
    assert plots.parallel_coordinates([trial(0, 0.2)], "MRR") is None


def test_a_value_that_a_trial_lacks_is_passed_by() -> None:
    """Numbers stay numbers on their axis."""
    trials = [
        trial(number, score, parameters={"depth": depth} | ({"width": width} if width else {}))
        for number, (score, depth, width) in enumerate([(0.1, 0, 0), (0.2, 1, 64), (0.3, 2, 1000)])
    ]
    chart = plots.parallel_coordinates(trials, "MRR")
    assert chart
    assert [x for x, _ in chart.lines[0].points] == [0, 2]
    assert not chart.axes[1].kinds
    assert chart.axes[1](64) < chart.axes[1](1000)


def test_the_front_joins_the_cheap_to_the_good() -> None:
    points = [(1.0, 0.1), (2.0, 0.3), (3.0, 0.2)]
    trials = [
        trial(n, s, objectives={"score": s, "device_seconds": c}) for n, (c, s) in enumerate(points)
    ]
    chart = plots.pareto(trials)
    assert chart
    x, y = chart.axes
    assert (x.label, y.label) == ("device_seconds", "score")
    assert chart.lines[0].points == [(x(1.0), y(0.1)), (x(2.0), y(0.3))]
    assert plots.pareto([trial(0, 0.2)]) is None


def test_fusion_marks_the_chosen_weight() -> None:
    chart = plots.fusion([(0.0, 0.4), (0.5, 0.5), (2.0, 0.6), (1e6, 0.3)], 2.0)
    assert chart
    assert chart.lines[1].points == [chart.lines[0].points[-1]]
