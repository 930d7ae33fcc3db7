"""Ranking and generation metrics, one value per user, so that every mean can carry an interval."""

# Axes: R rows (users), C candidates, P orders of the candidates, K possible numbers of negatives
# above the target.

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom

from rsllm.errors import EvaluationError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def target_ranks(scores_RC: ArrayLike, target_R: ArrayLike) -> Ints:
    """The target's place among its row's candidates, 1 for the best; ties count against it.

    Args:
        scores_RC: higher is better.
        target_R: column of the target in each row.

    Returns:
        ranks_R in 1..C.

    Raises:
        EvaluationError: a score that is not finite, or shapes and columns that do not fit.
    """
    scores, target = np.asarray(scores_RC, dtype=np.float64), np.asarray(target_R, dtype=np.int64)
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise EvaluationError(f"scores {scores.shape} and targets {target.shape} do not fit")
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if broken.size:
        raise EvaluationError(f"row {broken[0]} has a score that is not finite: the model diverged")
    outside = np.flatnonzero((target < 0) | (target >= scores.shape[1]))
    if outside.size:
        row, width = outside[0], scores.shape[1]
        raise EvaluationError(f"row {row} has its target in column {target[row]} of {width}")
    ranks: Ints = (scores >= scores[np.arange(len(scores)), target, None]).sum(axis=1)
    return ranks


class Metric(NamedTuple):
    """How good a rank is, and where it is said."""

    of_ranks: Callable[[Ints], Floats]
    """One value per user; more is better."""
    brief: bool = False
    """Shown where room is short: in the terminal and on pages of cells. Files hold every metric."""
    compared: bool = False
    """Tested in pairs, shown of each trial, and told by groups of the targets."""
    share: bool = False
    """Of users, each of whom it counts or not, so that its mean tells its interval."""


def _hit(k: int) -> Callable[[Ints], Floats]:
    return lambda ranks_R: (ranks_R <= k).astype(np.float64)


def _gain(k: int) -> Callable[[Ints], Floats]:
    """NDCG with one relevant item."""
    return lambda ranks_R: np.where(ranks_R <= k, 1 / np.log2(1.0 + ranks_R), 0.0)


METRICS: dict[str, Metric] = {
    "HR@1": Metric(_hit(1), brief=True, compared=True, share=True),
    "HR@5": Metric(_hit(5), brief=True, share=True),
    "HR@10": Metric(_hit(10), share=True),
    "NDCG@5": Metric(_gain(5)),
    "NDCG@10": Metric(_gain(10), brief=True),
    "MRR": Metric(lambda ranks_R: 1.0 / ranks_R, brief=True, compared=True),
}
"""All there are, in the order in which tables show them; one that is added appears everywhere."""


def brief_metrics() -> list[str]:
    """Those that are shown where room is short."""
    return [name for name, metric in METRICS.items() if metric.brief]


def compared_metrics(first: str = "HR@1") -> list[str]:
    """Those that are tested in pairs, `first` (which decides) before the others."""
    names = [name for name, metric in METRICS.items() if metric.compared]
    return sorted(names, key=lambda name: name != first)


def rank_metrics(ranks_R: Ints) -> dict[str, Floats]:
    """Every ranking metric by name, one value per user."""
    return {name: metric.of_ranks(ranks_R) for name, metric in METRICS.items()}


def expected_metrics(
    num_better_R: ArrayLike, pool_R: ArrayLike, num_negatives: int
) -> dict[str, Floats]:
    """`rank_metrics`, averaged exactly over every uniform draw of the negatives.

    Drawing `num_negatives` of `pool` eligible items, of which `num_better` outscore the target,
    puts a hypergeometric number of items above it. This takes the noise of the draw out of the
    metrics of a model that scores every item.

    Args:
        num_better_R: eligible items that score at least as high as the target.
        pool_R: eligible items, the target not among them.
        num_negatives: candidates drawn beside the target.

    Raises:
        EvaluationError: a row whose pool is smaller than `num_better` or `num_negatives`.
    """
    better, pool = np.broadcast_arrays(np.asarray(num_better_R), np.asarray(pool_R))
    broken = np.flatnonzero((better < 0) | (better > pool) | (pool < num_negatives))
    if broken.size:
        row = broken[0]
        raise EvaluationError(
            f"row {row} has {better[row]} better items in a pool of {pool[row]}, to draw"
            f" {num_negatives} negatives from; a pool holds both"
        )
    above_K = np.arange(num_negatives + 1)
    chance_RK = hypergeom.pmf(above_K, pool[:, None], better[:, None], num_negatives)
    return {name: chance_RK @ values_K for name, values_K in rank_metrics(1 + above_K).items()}


class Verdict(NamedTuple):
    """Whether a generated answer names exactly one candidate, and whether that is the target.

    Over all rows, the mean of `valid` is the valid ratio, that of `hit` the HitRatio@1 that LLaRA
    publishes: invalid answers count as misses.
    """

    valid: bool
    hit: bool


def verdict(answer: str, titles: Sequence[str], target: int, *, strict: bool = False) -> Verdict:
    """LLaRA's rule (arXiv 2312.02445): exactly one candidate title is part of the first line.

    Case and outer blanks are ignored. A perfect answer is invalid when another candidate's title
    is contained in it, which caps the hit ratio a little below 1. Under the `strict` rule the first
    line has to be the title.
    """
    line = answer.strip().split("\n", 1)[0].strip().lower()
    names = [title.lower().strip() for title in titles]
    matches = [name == line if strict else name in line for name in names]
    valid = sum(matches) == 1
    return Verdict(valid=valid, hit=valid and matches[target])


strict_verdict = partial(verdict, strict=True)

RULES: dict[str, Callable[[str, Sequence[str], int], Verdict]] = {
    "LLaRA": verdict,
    "strict": strict_verdict,
    "catalogue": strict_verdict,
}
"""When an answer is valid: its text, the candidates' titles and the target's place -> verdict. The
last is asked with the titles of all items: a history prompt lists no candidates to choose from."""


def order_bias(
    scores_PRC: ArrayLike, presented_PRC: ArrayLike, target_R: Ints
) -> dict[str, Floats]:
    """What the order in which candidates stand in the prompt does to the same rows.

    Args:
        scores_PRC: under each order, the first being the original, in the original places.
        presented_PRC: where each candidate stood, 0 for the first.
        target_R: column of the target in each row.

    Returns:
        "changed": per row, the share of the other orders under which the first choice differs from
        the original order's. "HR@1": of each order. "HR@1, first third" and so on: of every
        presentation of a row, where the target stood there.
    """
    scores, presented = np.asarray(scores_PRC, dtype=np.float64), np.asarray(presented_PRC)
    hit_PR = np.stack([target_ranks(scores_RC, target_R) for scores_RC in scores]) == 1.0
    first_PR = scores.argmax(axis=2)
    place_PR = np.take_along_axis(presented, target_R[None, :, None], axis=2)[:, :, 0]
    third_PR = 3 * place_PR // presented.shape[2]
    found = {"changed": (first_PR[1:] != first_PR[0]).mean(axis=0), "HR@1": hit_PR.mean(axis=1)}
    for third, name in enumerate(("first", "middle", "last")):
        found[f"HR@1, {name} third"] = hit_PR[third_PR == third]
    return found
