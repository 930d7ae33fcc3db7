from __future__ import annotations

import random
from typing import Any

import pytest

from rsllm.report.trials import importance, pareto_front


def trial(number: int, score: float | None, state: str = "finished", **more: Any) -> dict[str, Any]:
    return {"number": number, "state": state, "MRR": score, "parameters": {}} | more


@pytest.mark.parametrize("score", ["score", "MRR"])
def test_the_front_has_the_trials_that_none_beats(score: str) -> None:
    """Five points: (1, .1), (2, .3) and (4, .4) by hand, in whatever order objectives are named."""
    points = [(1, 0.1), (2, 0.3), (3, 0.3), (4, 0.4), (5, 0.2)]
    trials = [
        trial(number, None, objectives={"device_seconds": cost, score: found})
        for number, (cost, found) in enumerate(points)
    ]
    stopped = trial(5, None, "stopped", objectives={"device_seconds": 0, score: 1.0})
    assert [t["number"] for t in pareto_front([*trials, stopped])] == [0, 1, 3]
    assert pareto_front([trial(0, 0.1)]) == []


def test_equal_trials_stand_on_the_front_together() -> None:
    """Against the definition, by comparing all with all."""
    points = [(0.5, 9), (0.4, 4), (0.4, 5), (0.2, 1), (0.1, 1), (0.5, 9), (0.3, 8)]
    trials = [
        trial(number, None, objectives={"MRR": score, "device_seconds": cost})
        for number, (score, cost) in enumerate(points)
    ]
    naive = [
        number
        for number, (score, cost) in enumerate(points)
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in points)
    ]
    assert [t["number"] for t in pareto_front(trials)] == naive == [0, 1, 3, 5]


def searched(num_trials: int) -> list[dict[str, Any]]:
    """Trials whose score is decided by `rate` alone, best near 0.01 on a logarithmic scale."""
    draw = random.Random(0)
    trials = []
    for number in range(num_trials):
        exponent = draw.uniform(-4, 0)
        values = {"rate": 10**exponent, "width": draw.choice([32, 64]), "norm": draw.choice("ab")}
        trials.append(trial(number, -abs(exponent + 2), parameters=values))
    return trials


def test_importance_goes_to_the_value_that_decides() -> None:
    shares = importance(searched(80), "MRR")
    assert next(iter(shares)) == "rate"
    assert shares["rate"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {"rate", "width", "norm"}


def test_importance_is_silent_where_it_knows_nothing() -> None:
    assert importance(searched(7), "MRR") == {}
    assert importance([trial(n, 0.1 * n) for n in range(20)], "MRR") == {}


def test_values_that_some_trials_lack_are_judged_on_the_others() -> None:
    trials = searched(40)
    for entry in trials[::2]:
        entry["parameters"] |= {"norm": None}
        del entry["parameters"]["width"]
    assert next(iter(importance(trials, "MRR"))) == "rate"
