"""How many negatives outscore the target: all that exact expected metrics need."""

# Axes: B rows, I items, H history positions, K distinct titles.
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rsllm.data.sequences import Catalogue
from rsllm.errors import EvaluationError

IntArray = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]


def num_better(
    scores_BI: npt.NDArray[np.floating[Any]],
    target_B: IntArray,
    history_BH: IntArray,
    catalogue: Catalogue,
) -> tuple[Counts, Counts]:
    """Count the eligible negatives that score at least as high as the target.

    Eligible are the catalogue's representatives (one id per distinct title) whose title is neither
    the target's nor one in the history: the pool that candidate sets are drawn from. Ties count
    against the target, so constant scores never look good.

    Args:
        scores_BI: finite scores of the whole catalogue.
        target_B: item ids of the true next items.
        history_BH: item ids of the windows, padded with -1.
        catalogue: titles and their representatives.

    Returns:
        `(better_B, pool_B)`: eligible negatives not outscored by the target, and all eligible.

    Raises:
        EvaluationError: a score is NaN or infinite.
    """
    if not np.isfinite(scores_BI).all():
        raise EvaluationError("the recommender's scores are not finite; lower its learning rate")
    eligible_BK = _eligible(target_B, history_BH, catalogue)
    target_score_B1 = np.take_along_axis(scores_BI, target_B[:, None], axis=1)
    better_BK = eligible_BK & (scores_BI[:, catalogue.representatives] >= target_score_B1)
    return better_BK.sum(axis=1), eligible_BK.sum(axis=1)


def _eligible(
    target_B: IntArray, history_BH: IntArray, catalogue: Catalogue
) -> npt.NDArray[np.bool_]:
    keys_I = catalogue.title_keys_I
    padding_key = keys_I.max() + 1
    history_key_BH = np.where(history_BH >= 0, keys_I[history_BH], padding_key)
    allowed = np.ones((len(target_B), padding_key + 1), dtype=bool)
    np.put_along_axis(allowed, history_key_BH, False, axis=1)
    np.put_along_axis(allowed, keys_I[target_B][:, None], False, axis=1)
    return allowed[:, keys_I[catalogue.representatives]]
