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
from rsllm.evaluate.metrics import RULES, order_bias, rank_metrics, target_ranks
from rsllm.evaluate.rank import candidate_sets, fixed_sample, presented_places, target_places
from rsllm.evaluate.statistics import holm, mean_interval, paired, verdict_text


@dataclass(frozen=True, slots=True)
class Claim:
    """A comparison that is tested: `first` against `second`, and what it would show."""

    first: str
    second: str
    claim: str | None = None


def per_user(scores_DRC: np.ndarray, draws: Sequence[Rows]) -> dict[str, np.ndarray]:
    """Every ranking metric for every row, averaged over the draws of its candidates."""
    asked = (len(draws), len(draws[0]))
    if scores_DRC.shape[:2] != asked:
        raise EvaluationError(
            f"{scores_DRC.shape[0]} draws of {scores_DRC.shape[1]} rows were scored, but"
            f" {asked[0]} of {asked[1]} are asked for"
        )
    found = [
        rank_metrics(target_ranks(scores_RC, target_places(rows)))
        for scores_RC, rows in zip(scores_DRC, draws, strict=True)
    ]
    return {name: np.mean([metrics[name] for metrics in found], axis=0) for name in found[0]}


def method_table(
    outcomes: Sequence[Outcome], draws: Sequence[Rows], data: PreparedData
) -> list[dict[str, Any]]:
    """One entry per method: each metric with n and a 95 % interval over users."""

    def measured(scores_DRC: np.ndarray | None) -> dict[str, Any] | None:
        return None if scores_DRC is None else estimates(per_user(scores_DRC, draws))

    return [
        {
            "name": outcome.method.name,
            "scorer": outcome.method.scorer,
            "n": len(draws[0]),
            "metrics": measured(outcome.scores_DRC),
            "likelihood_metrics": measured(outcome.likelihood_DRC),
            "per_token_metrics": measured(outcome.per_token_DRC),
            "generation": _generation(outcome, draws[0], data),
            "candidate_orders": _candidate_orders(outcome, draws[0]),
            "seconds": outcome.seconds,
        }
        for outcome in outcomes
    ]


def estimates(vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means with intervals, of metrics of one value per user each."""
    return {name: asdict(mean_interval(values)) for name, values in vectors.items()}


def _generation(outcome: Outcome, rows: Rows, data: PreparedData) -> dict[str, Any] | None:
    """The answers of each decoding under each rule of validity."""
    if not outcome.answers:
        return None
    return {
        decoding: {rule: _judged(answers, rows, data, rule) for rule in RULES}
        for decoding, answers in outcome.answers.items()
    }


def _judged(answers: Sequence[str], rows: Rows, data: PreparedData, rule: str) -> dict[str, Any]:
    """Under LLaRA's rule `hits_of_all` is the published HitRatio@1.

    `perfect_invalid` is the share of rows in which the target's own title would be judged invalid.
    """
    answered, judge = fixed_sample(rows, len(answers)), RULES[rule]
    titles_RC = [[data.titles[item] for item in row] for row in candidate_sets(answered)]
    places = target_places(answered).tolist()
    asked = list(zip(titles_RC, places, strict=True))
    judged = [judge(answer, *row) for answer, row in zip(answers, asked, strict=True)]
    perfect = [judge(titles[place], titles, place) for titles, place in asked]
    valid_R, hit_R = np.array(judged, dtype=np.float64).T
    valid_hits = hit_R[valid_R == 1]
    return {
        "n": len(answers),
        "ValidRatio": asdict(mean_interval(valid_R)),
        "hits_of_all": asdict(mean_interval(hit_R)),
        "hits_of_valid": asdict(mean_interval(valid_hits)) if len(valid_hits) else None,
        "perfect_invalid": 1 - float(np.mean([verdict.valid for verdict in perfect])),
    }


def _candidate_orders(outcome: Outcome, rows: Rows) -> dict[str, Any] | None:
    """How the order of the candidates sways the choice; orders include the original one."""
    if outcome.orders_PRC is None:
        return None
    places_PRC = presented_places(rows, len(outcome.orders_PRC))
    original_RC = np.arange(places_PRC.shape[2]) + np.zeros_like(places_PRC[0])
    found = order_bias(
        np.concatenate([outcome.scores_DRC[:1], outcome.orders_PRC]),
        np.concatenate([original_RC[None], places_PRC]),
        target_places(rows),
    )
    changed, hits_P = found.pop("changed"), found.pop("HR@1")
    return {
        "orders": len(hits_P),
        "first_choice_changes": asdict(mean_interval(changed)),
        "HR@1 mean": float(hits_P.mean()),
        "HR@1 spread": float(hits_P.std()),
    } | {name: float(values.mean()) if len(values) else None for name, values in found.items()}


def pair_table(
    vectors: Mapping[str, Mapping[str, np.ndarray]],
    claims: Sequence[Claim],
    metrics: Sequence[str],
) -> list[dict[str, Any]]:
    """Paired differences on the same rows, corrected over the whole table (Holm).

    Args:
        vectors: the metrics of each method, by its name, as `per_user` gives them.
        claims: which to compare.
        metrics: in which.
    """
    tests = [
        (claim, metric, paired(vectors[claim.first][metric], vectors[claim.second][metric]))
        for metric in metrics
        for claim in claims
    ]
    adjusted = holm([test.p for _, _, test in tests])
    return [
        {**asdict(claim), "metric": metric, **asdict(test)}
        | {"p_holm": p_holm, "verdict": verdict_text(test, p_holm)}
        for (claim, metric, test), p_holm in zip(tests, adjusted, strict=True)
    ]
