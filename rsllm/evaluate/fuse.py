"""A language model and the recommender on the same rows, weighed on validation: late fusion.

Axes: D draws, R rows, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Fusion:
    """log p = log p_LLM + weight * log p_recommender, up to a constant per row."""

    weight: float
    curve: dict[float, float]
    """Weight -> validation MRR."""

    @classmethod
    def chosen(
        cls, language_DRC: Floats, recommender_DRC: Floats, validation: Sequence[Rows]
    ) -> Fusion:
        """The weight of `WEIGHTS` with the best validation MRR; ties go to the smaller one."""
        curve = {}
        for weight in WEIGHTS:
            scores_DRC = fused(language_DRC, recommender_DRC, weight)
            curve[weight] = float(per_user(scores_DRC, validation)["MRR"].mean())
        return cls(max(curve, key=curve.__getitem__), curve)

    @classmethod
    def over_seeds(
        cls, language: Sequence[Outcome], alone: Outcome, validation: Sequence[Rows]
    ) -> Fusion:
        """One weight for a method's outcomes under several seeds, all on validation."""
        return cls.chosen(
            np.concatenate([outcome.scores_DRC for outcome in language]),
            np.concatenate([alone.scores_DRC] * len(language)),
            [*validation] * len(language),
        )

    def outcome(self, language: Outcome, recommender: Outcome) -> Outcome:
        """Both on the test rows, as one method."""
        name = f"{language.method.name} + {recommender.method.name}"
        return Outcome(
            method=replace(language.method, name=name),
            scores_DRC=fused(language.scores_DRC, recommender.scores_DRC, self.weight),
            seconds=language.seconds + recommender.seconds,
        )


def fused(language_DRC: Floats, recommender_DRC: Floats, weight: float) -> Floats:
    """Weighted sum of the log-probabilities over each row's candidates. [D, R, C]."""
    language, recommender = (
        np.maximum(log_softmax(scores_DRC.astype(np.float64), axis=-1), FLOOR)
        for scores_DRC in (language_DRC, recommender_DRC)
    )
    total: Floats = language + weight * recommender
    return total
