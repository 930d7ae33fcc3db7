"""A language model and the recommender on the same rows, weighed on validation: late fusion.

Axes: D draws, R rows, C candidates.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import log_softmax

from rsllm.data.sequences import Rows
from rsllm.evaluate.compare import per_user
from rsllm.evaluate.launch import Outcome
from rsllm.evaluate.metrics import Floats

WEIGHTS = (0.0, *np.geomspace(1 / 64, 64, 25).tolist(), 1e6)
"""From the language model alone to the recommender alone, save for its ties."""
FLOOR = -1e30
"""Log-probability of what cannot be chosen, still finite under every weight."""


def weighed(
    language: Sequence[Outcome], alone: Outcome, validation: Sequence[Rows]
) -> tuple[float, dict[float, float]]:
    """The weight with the best validation MRR, over a method's seeds, and the MRR of each weight.

    Ties go to the smaller one.
    """
    own_DRC = np.concatenate([outcome.scores_DRC for outcome in language])
    other_DRC = np.concatenate([alone.scores_DRC] * len(language))
    draws, curve = [*validation] * len(language), {}
    for weight in WEIGHTS:
        curve[weight] = float(per_user(fused(own_DRC, other_DRC, weight), draws)["MRR"].mean())
    return max(curve, key=curve.__getitem__), curve


def joined(language: Outcome, recommender: Outcome, weight: float) -> Outcome:
    """Both on the same rows, as one method."""
    return Outcome(
        method=replace(language.method, name=f"{language.method.name} + {recommender.method.name}"),
        scores_DRC=fused(language.scores_DRC, recommender.scores_DRC, weight),
        seconds=language.seconds + recommender.seconds,
    )


def fused(language_DRC: Floats, recommender_DRC: Floats, weight: float) -> Floats:
    """Weighted sum of the log-probabilities over each row's candidates. [D, R, C]."""
    language, recommender = (
        np.maximum(log_softmax(scores_DRC.astype(np.float64), axis=-1), FLOOR)
        for scores_DRC in (language_DRC, recommender_DRC)
    )
    return np.asarray(language + weight * recommender)
