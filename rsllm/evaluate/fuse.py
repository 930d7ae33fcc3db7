"""A language model and the recommender on the same rows, weighed on validation: late fusion.

Axes: D draws, R rows, C candidates.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import log_softmax

from rsllm.data.sequences import Rows
from rsllm.evaluate.compare import stack_seeds
from rsllm.evaluate.metrics import Floats
from rsllm.evaluate.run import Outcome
from rsllm.evaluate.statistics import Estimate, mean_interval

WEIGHTS = (0.0, *np.geomspace(1 / 64, 64, 25).tolist(), 1e6)
"""From the language model alone to the recommender alone, save for its ties."""
FLOOR = -1e30
"""Log-probability of what cannot be chosen, still finite under every weight."""


def choose_weight(
    language: Sequence[Outcome], alone: Outcome, validation: Sequence[Rows]
) -> tuple[float, dict[float, Estimate]]:
    """The weight with the best validation MRR, over a method's seeds, and the MRR of each weight.

    Ties go to the smaller one. So many weights need more rows than a validation while training.
    """
    curve = {}
    for weight in WEIGHTS:
        both = [
            combine_scores(outcome.scores_DRC, alone.scores_DRC, weight) for outcome in language
        ]
        curve[weight] = mean_interval(stack_seeds(both, validation)["MRR"])
    return max(curve, key=lambda weight: curve[weight].value), curve


def combine_outcomes(language: Outcome, recommender: Outcome, weight: float) -> Outcome:
    """Both on the same rows, as one method."""
    return Outcome(
        method=replace(language.method, name=f"{language.method.name} + {recommender.method.name}"),
        scores_DRC=combine_scores(language.scores_DRC, recommender.scores_DRC, weight),
        seconds=language.seconds + recommender.seconds,
    )


def combine_scores(language_DRC: Floats, recommender_DRC: Floats, weight: float) -> Floats:
    """Weighted sum of the log-probabilities over each row's candidates. [D, R, C]."""
    language, recommender = (
        np.maximum(log_softmax(scores_DRC.astype(np.float64), axis=-1), FLOOR)
        for scores_DRC in (language_DRC, recommender_DRC)
    )
    return np.asarray(language + weight * recommender)
