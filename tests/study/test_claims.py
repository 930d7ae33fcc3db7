"""Verdicts and Holm's correction against answers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_up import cell, comparison

from rsllm.evaluate import statistics
from rsllm.evaluate.metrics import rank_metrics
from rsllm.report.tables import claimed
from rsllm.study.claims import Claim, compare, compare_cells, judge, size


def interval(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high}


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (0.02, 0.20, 0.01, "better"),
        (0.02, 0.20, 0.05, "cannot be told"),
        (-0.01, 0.21, 1e-3, "cannot be told"),  # the luck of seeds may explain it
        (0.0, 0.2, 1e-3, "cannot be told"),
        (-0.30, -0.10, 0.001, "worse"),
        (-0.30, -0.10, 0.5, "cannot be told"),
        (-0.30, 0.0, 0.01, "cannot be told"),
        (0.0, 0.0, 1.0, "cannot be told"),  # the same in every row
    ],
)
def test_verdict(low: float, high: float, p: float, verdict: str) -> None:
    """One training against one is never a better method; rules have no luck of training."""
    verdicts = [judge(interval(low, high), p, trainings) for trainings in (0, 1, 2)]
    assert verdicts == [verdict, verdict if "told" in verdict else f"{verdict} here", verdict]


def test_lucky_seeds_of_equal_methods_are_seldom_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed shifts all users, so that the test over users alone would often be wrong."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(15)
    shape = np.array([(3, 60), (1, 60), (3, 1)])
    found = []
    for _ in range(200):
        both, users, seeds = (
            rng.normal(0, spread, tuple(size))
            for spread, size in zip((0.3, 0.5, 0.3), shape, strict=True)
        )
        vectors = {"a": {"MRR": both + users + seeds}, "b": {"MRR": np.zeros((1, 60))}}
        found += compare(vectors, [Claim("a", "b")], ["MRR"])
    assert np.mean([row["p"] < 0.05 for row in found]) > 0.3
    assert np.mean([row["verdict"] != "cannot be told" for row in found]) <= 0.09


def cells_of(names: str) -> dict[str, Any]:
    return {name: cell(name, name) for name in names}


def decided(*arguments: Any) -> list[Any]:
    """Each claim in the metric that decides it."""
    return claimed(compare_cells(*arguments))


def test_holm_is_over_the_claims_of_a_table_that_were_computed() -> None:
    claims = [Claim("a", second, second) for second in "bcde"]
    comparisons = {
        ("a", "b"): comparison(0.2, p=0.01),
        ("a", "c"): comparison(0.2, p=0.04),
        ("a", "d"): comparison(0.2, p=0.03),
        ("b", "c"): comparison(0.2, p=0.001),  # nobody claims it
    }
    rows = decided(claims, cells_of("abcde"), comparisons, "here")
    # 3 x 0.01; 1 x 0.04, but not below 2 x 0.03.
    assert [row.get("p_holm") for row in rows] == pytest.approx([0.03, 0.06, 0.06, None])
    assert [row["verdict"] for row in rows] == [
        "better here",
        "cannot be told",
        "cannot be told",
        "not computed",
    ]
    alone = decided(claims[1:2], cells_of("ac"), comparisons, "here")
    assert [row["p_holm"] for row in alone] == [0.04]


def test_a_gain_is_that_of_the_same_data() -> None:
    claim = Claim("a", "b", gains={"here": 0.1})
    comparisons = {("a", "b"): comparison(0.01, p=0.8)}  # from -0.04 to 0.06, detectable 0.08
    here, there = (decided([claim], cells_of("ab"), comparisons, s) for s in ("here", "there"))
    assert (here[0]["published gain"], here[0]["verdict"]) == (0.1, "cannot be told")
    assert here[0]["size"] == "smaller than published"
    assert (there[0]["published gain"], there[0]["verdict"]) == (None, "cannot be told")


def test_pairs_of_vectors() -> None:
    """Twelve wins of twelve: p is 2 / 2^12. One win of one: p is 1."""
    ranks = {"best": [1] * 12, "second": [2] * 12, "nearly": [2] + [1] * 11}
    claims = [Claim("best", "second", "the best wins"), Claim("second", "best")]
    claims.append(Claim("best", "nearly"))
    vectors = {name: rank_metrics(np.array(own)) for name, own in ranks.items()}
    table = compare(vectors, claims, ["HR@1", "MRR"])
    assert [(e["first"], e["second"], e["metric"]) for e in table] == [
        (claim.first, claim.second, metric) for metric in ("HR@1", "MRR") for claim in claims
    ]
    p = 2 / 2**12
    assert [entry["p"] for entry in table] == pytest.approx([p, p, 1.0] * 2)
    assert [entry["p_holm"] for entry in table] == pytest.approx([6 * p, 6 * p, 1.0] * 2)
    verdicts = ["better here", "worse here", "cannot be told"]
    assert [entry["verdict"] for entry in table] == verdicts * 2
    differences = [entry["difference"]["value"] for entry in table]
    assert differences == pytest.approx([1, -1, 1 / 12, 0.5, -0.5, 0.5 / 12])
    assert [entry["test"] for entry in table[::3]] == ["exact McNemar", "sign-flip permutation"]
    assert table[0]["minimum_detectable"] is None, "without spread nothing is known"
    spread = np.array([1.0] + [0.0] * 11).std(ddof=1)
    expected = (2.200985 + 0.875530) * spread / 12**0.5  # Student's, 11 degrees of freedom
    assert table[2]["minimum_detectable"] == pytest.approx(expected, rel=1e-5)
    assert [entry["claim"] for entry in table[:2]] == ["the best wins", None]


@pytest.mark.parametrize(
    ("low", "high", "gain", "found"),
    [
        (0.15, 0.27, 0.4, "smaller than published"),  # though it is above 0
        (-0.1, 0.05, 0.1, "smaller than published"),
        (0.15, 0.27, 0.2, "published gain not excluded"),
        (0.15, 0.27, 0.1, "larger than published"),
        (0.15, 0.27, None, None),
    ],
)
def test_size(low: float, high: float, gain: float | None, found: str | None) -> None:
    assert size(interval(low, high), gain) == found


def test_seeds_are_those_of_the_trainings() -> None:
    claim = Claim("a", "b")
    for seeds, said in (([0], "better here"), ([0, 1], "better"), ([], "better")):
        cells = {name: cell(name, name, seeds=seeds) for name in "ab"}
        (row,) = decided([claim], cells, {("a", "b"): comparison(0.2)}, "here")
        assert row["verdict"] == said, "one training against one is its own word"


def test_each_metric_is_corrected_by_itself() -> None:
    claims = [Claim("a", second) for second in "bc"]
    comparisons = {("a", second): comparison(0.2, p=0.03) for second in "bc"}
    rows = compare_cells(claims, cells_of("abc"), comparisons, "here")
    assert [row["metric"] for row in rows] == ["HR@1", "HR@1", "MRR", "MRR"]
    assert [row["p_holm"] for row in rows] == [0.06] * 4


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.97, 1.0, "better here"),
        (0.961, 1.0, "cannot be told"),  # Wilson's interval of 95 of 95: too few to claim it
        (0.8, 0.968, "worse here"),
    ],
)
def test_valid_answers_are_judged_by_their_interval(low: float, high: float, verdict: str) -> None:
    claim = Claim("a", text="valid", above=0.969)
    ratio = {"value": high, "low": low, "high": high, "n": 95}
    answers = {"free": {"LLaRA": {"ValidRatio": ratio}}}
    (row,) = decided([claim], {"a": cell("a", "a", generation=answers)}, {}, "here")
    assert (row["verdict"], row["second"]) == (verdict, "0.969")
    assert row["difference"]["low"] == pytest.approx(low - 0.969)
    (row,) = decided([claim], {"a": cell("a", "a", generation=None)}, {}, "here")
    assert row["verdict"] == "not computed"
