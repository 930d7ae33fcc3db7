"""How many negatives outscore the target: all that exact expected metrics need."""

# Axes: B rows, I items, H history positions, X items seen, K distinct titles, T representatives.
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
    keys_I, item_BX = catalogue.title_keys_I, np.column_stack([target_B, history_BH])
    seen_BX = np.where(item_BX >= 0, keys_I[item_BX], -1)  # -1: a column of its own
    open_BK = np.ones((len(target_B), keys_I.max() + 2), dtype=bool)
    np.put_along_axis(open_BK, seen_BX, False, axis=1)
    eligible_BT = open_BK[:, keys_I[catalogue.representatives]]
    target_score_B1 = np.take_along_axis(scores_BI, target_B[:, None], axis=1)
    better_BT = eligible_BT & (scores_BI[:, catalogue.representatives] >= target_score_B1)
    return better_BT.sum(axis=1), eligible_BT.sum(axis=1)
