"""Verdicts and Holm's correction against answers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from made_up import cell, comparison

from rsllm.study.claims import Claim, claim_rows, judge, size


def interval(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high}


@pytest.mark.parametrize(
    ("low", "high", "p", "detectable", "gain", "verdict"),
    [
        (0.02, 0.20, 0.01, 0.10, 0.1, "reproduced"),
        (0.02, 0.20, 0.01, 0.10, None, "reproduced"),
        (0.02, 0.20, 0.06, 0.05, 0.1, "underpowered"),  # the gain may be there
        (0.02, 0.08, 0.06, 0.05, 0.1, "not reproduced"),  # less than the gain, if anything
        (0.02, 0.20, 0.06, 0.15, 0.1, "underpowered"),  # the gain could not have been seen
        (0.02, 0.20, 0.06, 0.05, None, "underpowered"),
        (-0.05, 0.15, 0.4, 0.08, 0.1, "underpowered"),  # both 0 and the gain are in it
        (-0.05, 0.05, 0.9, 0.08, 0.1, "not reproduced"),  # the gain is excluded, and detectable
        (-0.05, 0.05, 0.9, 0.12, 0.1, "underpowered"),  # excluded, but not detectable
        (-0.05, 0.05, 0.9, 0.08, None, "underpowered"),
        (-0.30, -0.10, 0.001, 0.5, 0.1, "not reproduced"),  # worse
        (-0.30, 0.0, 0.06, 0.5, None, "not reproduced"),
        (0.0, 0.0, 1.0, None, 0.1, "not reproduced"),  # the same in every row
    ],
)
def test_verdict(
    low: float,
    high: float,
    p: float,
    detectable: float | None,
    gain: float | None,
    verdict: str,
) -> None:
    assert judge(interval(low, high), p, detectable, gain) == verdict


def made(names: str) -> dict[str, Any]:
    return {name: cell(name, name) for name in names}


def test_holm_is_over_the_claims_of_a_table_that_were_computed() -> None:
    claims = [Claim(text=second, first="a", second=second) for second in "bcde"]
    comparisons = {
        ("a", "b"): comparison(0.2, p=0.01),
        ("a", "c"): comparison(0.2, p=0.04),
        ("a", "d"): comparison(0.2, p=0.03),
        ("b", "c"): comparison(0.2, p=0.001),  # nobody claims it
    }
    rows = claim_rows(claims, made("abcde"), comparisons, "here")
    # 3 x 0.01; 1 x 0.04, but not below 2 x 0.03.
    assert [row.get("p (Holm)") for row in rows] == pytest.approx([0.03, 0.06, 0.06, None])
    assert [row["verdict"] for row in rows] == [
        "reproduced here",
        "underpowered",
        "underpowered",
        "not computed",
    ]
    alone = claim_rows(claims[1:2], made("ac"), comparisons, "here")
    assert [row["p (Holm)"] for row in alone] == [0.04]


def test_a_gain_is_that_of_the_same_data() -> None:
    claim = Claim(text="?", first="a", second="b", gains={"here": 0.1})
    comparisons = {("a", "b"): comparison(0.01, p=0.8)}  # from -0.04 to 0.06, detectable 0.08
    here, there = (claim_rows([claim], made("ab"), comparisons, s) for s in ("here", "there"))
    assert (here[0]["published gain"], here[0]["verdict"]) == (0.1, "not reproduced here")
    assert (there[0]["published gain"], there[0]["verdict"]) == (None, "underpowered")


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


def test_a_claim_of_ours_is_supported_at_best() -> None:
    claims = [Claim(text=s, first="a", second=s, ours=True) for s in "bcd"]
    comparisons = {("a", "b"): comparison(0.2), ("a", "c"): comparison(-0.2)}
    rows = claim_rows(claims, made("abcd"), comparisons, "here")
    assert [row["verdict"] for row in rows] == [
        "supported here",
        "not supported here",
        "not computed",
    ]


@pytest.mark.parametrize(("gamma", "verdict"), [(0, "reproduced"), (3.0, "supported")])
def test_nothing_with_our_ranking_loss_reproduces_a_paper(gamma: float, verdict: str) -> None:
    claim = Claim(text="better", first="a", second="b")
    for seeds, said in (([0], f"{verdict} here"), ([0, 1], verdict), ([], verdict)):
        cells = {name: cell(name, name, gamma=gamma, seeds=seeds) for name in "ab"}
        (row,) = claim_rows([claim], cells, {("a", "b"): comparison(0.2)}, "here")
        assert row["verdict"] == said, "one training against one is its own word"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.97, 1.0, "reproduced here"),
        (0.961, 1.0, "underpowered"),  # Wilson's interval of 95 of 95: too few to claim it
        (0.8, 0.969, "not reproduced here"),
    ],
)
def test_valid_answers_are_judged_by_their_interval(low: float, high: float, verdict: str) -> None:
    claim = Claim(text="valid", first="a", above=0.969)
    ratio = {"value": high, "low": low, "high": high, "n": 95}
    answers = {"free": {"LLaRA": {"ValidRatio": ratio}}}
    (row,) = claim_rows([claim], {"a": cell("a", "a", generation=answers)}, {}, "here")
    assert (row["verdict"], row["second"]) == (verdict, "0.969")
    assert row["difference"]["low"] == pytest.approx(low - 0.969)
    (row,) = claim_rows([claim], {"a": cell("a", "a", generation=None)}, {}, "here")
    assert row["verdict"] == "not computed"
