"""The weight that joins two scorers, on scores whose best weight is known."""

from __future__ import annotations

import numpy as np
import pytest
from small_data import NUM_CANDIDATES, small_data

from rsllm.config import Experiment
from rsllm.data.sequences import Rows
from rsllm.evaluate.compare import per_user
from rsllm.evaluate.fuse import WEIGHTS, choose_weight, combine_outcomes, combine_scores
from rsllm.evaluate.rank import target_places
from rsllm.evaluate.run import Method, Outcome
from rsllm.evaluate.statistics import mean_interval

NUM_ROWS = 200


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("data") / "small"
    return small_data(folder, num_held_out=NUM_ROWS).rows("validation")


def noisy(rows: Rows, signal: float, seed: int) -> np.ndarray:
    """Scores with so much to say of the target: the log-odds of unit Gaussian evidence."""
    evidence_RC = np.random.default_rng(seed).normal(size=(NUM_ROWS, NUM_CANDIDATES))
    evidence_RC[np.arange(NUM_ROWS), target_places(rows)] += signal
    return (signal * evidence_RC)[None]


def outcome(scores_DRC: np.ndarray, name: str = "one") -> Outcome:
    return Outcome(
        method=Method(name=name, scorer="likelihood", experiment=Experiment()),
        scores_DRC=scores_DRC,
        answers={"free": ["Heat"]},
        seconds=2.0,
    )


def mrr(scores_DRC: np.ndarray, rows: Rows) -> float:
    return float(per_user(scores_DRC, [rows])["MRR"].mean())


def test_fusion_is_the_weighted_sum_of_log_probabilities() -> None:
    language, recommender = np.array([[[0.0, 1.0, 3.0]]]), np.array([[[5.0, 5.0, -2.0]]])
    p, q = (np.exp(s) / np.exp(s).sum() for s in (language, recommender))
    np.testing.assert_allclose(
        combine_scores(language, recommender, 0.5), np.log(p) + 0.5 * np.log(q)
    )
    impossible = np.array([[[0.0, np.finfo(np.float64).min, 1.0]]])
    assert np.isfinite(combine_scores(language, impossible, WEIGHTS[-1])).all()


def test_two_that_know_different_things_are_better_together(rows: Rows) -> None:
    language, recommender = noisy(rows, 1.0, seed=0), noisy(rows, 1.5, seed=1)
    weight, curve = choose_weight([outcome(language)], outcome(recommender), [rows])
    assert list(curve) == list(WEIGHTS)
    assert curve[0.0].value == pytest.approx(mrr(language, rows))
    assert curve[1e6].value == pytest.approx(mrr(recommender, rows))
    assert curve[weight].value == max(found.value for found in curve.values())
    assert curve[weight].value > max(curve[0.0].value, curve[1e6].value) + 0.02
    both = per_user(combine_scores(language, recommender, weight), [rows])["MRR"]
    assert curve[weight] == mean_interval(both)
    assert curve[weight].n == NUM_ROWS
    assert 1 / 4 < weight < 4


def test_what_knows_nothing_has_no_weight(rows: Rows) -> None:
    """Where nothing changes the smallest weight is taken."""
    language = noisy(rows, 1.0, seed=0)
    known, nothing = outcome(language), outcome(np.zeros_like(language))
    assert choose_weight([known], nothing, [rows])[0] == 0.0
    assert choose_weight([nothing], known, [rows])[0] == WEIGHTS[1]


def test_the_chosen_weight_makes_a_method_of_the_test_rows(rows: Rows) -> None:
    language, recommender = noisy(rows, 1.0, seed=2), noisy(rows, 1.0, seed=3)
    both = combine_outcomes(outcome(language, "tuned"), outcome(recommender, "recommender"), 0.25)
    assert (both.method.name, both.seconds, both.answers) == ("tuned + recommender", 4.0, None)
    np.testing.assert_array_equal(both.scores_DRC, combine_scores(language, recommender, 0.25))
