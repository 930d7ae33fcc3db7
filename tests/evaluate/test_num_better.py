from __future__ import annotations

import numpy as np
import pytest

from rsllm.data.sequences import Catalogue
from rsllm.errors import EvaluationError
from rsllm.evaluate.rank import num_better

CATALOGUE = Catalogue(
    title_keys_I=np.array([0, 1, 2, 1, 3, 4, 0, 5], dtype=np.int32),
    representatives=np.array([0, 1, 2, 4, 5, 7], dtype=np.int32),
    counts_I=np.ones(6, np.int64),
)


def naive(scores: np.ndarray, target: int, history: list[int]) -> tuple[int, int]:
    keys = CATALOGUE.title_keys_I
    seen = {keys[item] for item in [target, *history] if item >= 0}
    pool = [item for item in CATALOGUE.representatives if keys[item] not in seen]
    return sum(scores[item] >= scores[target] for item in pool), len(pool)


def test_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    scores_BI = rng.integers(0, 4, (300, 8)).astype(np.float32)
    target_B = rng.integers(0, 8, 300, dtype=np.int32)
    history_BH = rng.integers(-1, 8, (300, 4), dtype=np.int32)
    better_B, pool_B = num_better(scores_BI, target_B, history_BH, CATALOGUE)
    for row, scores in enumerate(scores_BI):
        expected = naive(scores, int(target_B[row]), history_BH[row].tolist())
        assert (better_B[row], pool_B[row]) == expected


def test_ties_count_against_the_target() -> None:
    better_B, pool_B = num_better(np.zeros((1, 8)), np.array([6]), np.array([[1, -1]]), CATALOGUE)
    assert better_B.tolist() == pool_B.tolist() == [4]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(broken: float) -> None:
    scores_BI = np.zeros((1, 8))
    scores_BI[0, 3] = broken
    with pytest.raises(EvaluationError, match="not finite"):
        num_better(scores_BI, np.array([0]), np.array([[-1]]), CATALOGUE)
