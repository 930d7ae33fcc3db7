"""Outcomes of methods on the same rows -> the tables of a report: estimates and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.errors import EvaluationError
from rsllm.evaluate.launch import Outcome
from rsllm.evaluate.metrics import generation_metrics, rank_metrics, target_ranks, verdict
from rsllm.evaluate.rank import fixed_sample, target_places
from rsllm.evaluate.statistics import holm, mean_interval, paired, verdict_text


@dataclass(frozen=True, slots=True)
class Claim:
    """A comparison that is tested: `first` against `second`, and what it would show."""

    first: str
    second: str
    claim: str | None = None


def per_user(scores_RC: np.ndarray, rows: Rows) -> dict[str, np.ndarray]:
    """Every ranking metric for every row."""
    if len(scores_RC) != len(rows):
        raise EvaluationError(f"{len(scores_RC)} rows were scored, but {len(rows)} are asked for")
    return rank_metrics(target_ranks(scores_RC, target_places(rows)))


def method_table(
    outcomes: Sequence[Outcome], rows: Rows, data: PreparedData
) -> list[dict[str, Any]]:
    """One entry per method: each metric with n and a 95 % interval over users."""
    return [
        {
            "name": outcome.method.name,
            "scorer": outcome.method.scorer,
            "n": len(rows),
            "metrics": _estimates(per_user(outcome.scores_RC, rows)),
            "likelihood_metrics": (
                _estimates(per_user(outcome.likelihood_RC, rows))
                if outcome.likelihood_RC is not None
                else None
            ),
            "generation": _generation(outcome, rows, data),
            "seconds": outcome.seconds,
        }
        for outcome in outcomes
    ]


def expected_table(outcome: Outcome) -> dict[str, Any]:
    """A recommender's metrics as exact expectations, with intervals over users."""
    return _estimates(outcome.expected)


def _estimates(vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: asdict(mean_interval(values)) for name, values in vectors.items()}


def _generation(outcome: Outcome, rows: Rows, data: PreparedData) -> dict[str, Any] | None:
    """LLaRA's validity rule on the greedy answers (published HitRatio@1 is hits of all)."""
    if not outcome.answers:
        return None
    answered = fixed_sample(rows, len(outcome.answers))
    assert answered.candidates_RC is not None
    places = target_places(answered)
    verdicts = [
        verdict(answer, [data.titles[item] for item in candidates], int(place))
        for answer, candidates, place in zip(
            outcome.answers, answered.candidates_RC, places, strict=True
        )
    ]
    result = generation_metrics(verdicts)
    valid_hits = result.hits_of_all[result.valid == 1]
    return {
        "n": len(verdicts),
        "ValidRatio": asdict(mean_interval(result.valid)),
        "hits_of_all": asdict(mean_interval(result.hits_of_all)),
        "hits_of_valid": asdict(mean_interval(valid_hits)) if len(valid_hits) else None,
    }


def pair_table(
    outcomes: Sequence[Outcome], claims: Sequence[Claim], rows: Rows, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Paired differences on the same rows, corrected over the whole table (Holm)."""
    vectors = {o.method.name: per_user(o.scores_RC, rows) for o in outcomes}
    tests = [
        (claim, metric, paired(vectors[claim.first][metric], vectors[claim.second][metric]))
        for metric in metrics
        for claim in claims
    ]
    adjusted = holm([test.p_value for _, _, test in tests])
    return [
        {
            "first": claim.first,
            "second": claim.second,
            "metric": metric,
            "difference": asdict(test.difference),
            "p": test.p_value,
            "p_holm": p_holm,
            "test": test.test,
            "verdict": verdict_text(test, p_holm),
            "minimum_detectable": test.minimum_detectable,
            "claim": claim.claim,
        }
        for (claim, metric, test), p_holm in zip(tests, adjusted, strict=True)
    ]
