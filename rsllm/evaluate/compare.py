"""Outcomes of methods on the same rows -> estimates of every metric, for a report.

Axes: D draws, S seeds of training, R rows, C candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Bools, Rows
from rsllm.errors import EvaluationError
from rsllm.evaluate.deployed import list_metrics, reach
from rsllm.evaluate.groups import FEWEST_USERS, target_groups
from rsllm.evaluate.metrics import (
    METRICS,
    RULES,
    compared_metrics,
    order_bias,
    rank_metrics,
    target_ranks,
)
from rsllm.evaluate.rank import candidate_sets, fixed_sample, presented_places, target_places
from rsllm.evaluate.run import Outcome
from rsllm.evaluate.statistics import mean_interval


def per_user(scores_DRC: np.ndarray, draws: Sequence[Rows]) -> dict[str, np.ndarray]:
    """Every ranking metric for every row, averaged over the draws of its candidates."""
    scored, expected = scores_DRC.shape[:2], (len(draws), len(draws[0]))
    if scored != expected:
        raise EvaluationError(
            f"{scored[0]} draws of {scored[1]} rows were scored, but {expected[0]} of {expected[1]}"
            " are asked for"
        )
    metrics_D = [
        rank_metrics(target_ranks(scores_RC, target_places(rows)))
        for scores_RC, rows in zip(scores_DRC, draws, strict=True)
    ]
    return {name: np.mean([each[name] for each in metrics_D], axis=0) for name in metrics_D[0]}


def over_seeds(
    outcomes: Sequence[Outcome], draws: Sequence[Rows], scores: str = "scores_DRC"
) -> dict[str, np.ndarray]:
    """`per_user` of one method's outcomes under several seeds, as [S, R]; {} of no such scores."""
    return stack_seeds([s for o in outcomes if (s := getattr(o, scores)) is not None], draws)


def stack_seeds(scores_SDRC: Sequence[np.ndarray], draws: Sequence[Rows]) -> dict[str, np.ndarray]:
    """`per_user` of one method's scores, one array a seed, as [S, R]; {} of none."""
    return _stack([per_user(scores_DRC, draws) for scores_DRC in scores_SDRC])


def _stack(metrics_S: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Metrics of one value per user, one mapping a seed, as [S, R]; those that all seeds have."""
    names = [name for name in METRICS if metrics_S and all(name in each for each in metrics_S)]
    return {name: np.stack([each[name] for each in metrics_S]) for name in names}


def method_table(
    outcomes: Mapping[str, Sequence[Outcome]], draws: Sequence[Rows], data: PreparedData
) -> list[dict[str, Any]]:
    """One entry per method: each metric with n and a 95 % interval over users and seeds.

    `by_seed` has the same of each seed, where there are several. Answers, orders of the
    candidates and the seconds of the evaluation are the first seed's.

    Args:
        outcomes: by the method's name, one per seed.
        draws: the rows with each draw of their candidates.
        data: what the rows are of.
    """
    groups = target_groups(draws[0], data)
    return [
        {
            "name": name,
            "scorer": group[0].method.scorer,
            "n": len(draws[0]),
            "metrics": estimates(over_seeds(group, draws)),
            "by_seed": {
                str(outcome.method.experiment.stage2.seed): estimates(over_seeds([outcome], draws))
                for outcome in group
                if len(group) > 1
            },
            "likelihood_metrics": estimates(over_seeds(group, draws, "likelihood_DRC")) or None,
            "per_token_metrics": estimates(over_seeds(group, draws, "per_token_DRC")) or None,
            "catalogue_metrics": estimates(_stack([o.catalogue for o in group])) or None,
            "deployed": _deployed(group, draws[0], data),
            "by_target": by_target(over_seeds(group, draws), groups),
            "generation": {
                decoding: {rule: _judged(answers, draws[0], data, rule) for rule in RULES}
                for decoding, answers in (group[0].answers or {}).items()
            }
            or None,
            "candidate_orders": _candidate_orders(group[0], draws[0]),
            "seconds": group[0].seconds,
        }
        for name, group in outcomes.items()
    ]


def estimates(vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means with intervals, of metrics of one value per user, or [S, R] of several seeds."""
    return {name: asdict(mean_interval(values)) for name, values in vectors.items()}


def _deployed(group: Sequence[Outcome], rows: Rows, data: PreparedData) -> dict[str, Any] | None:
    """What a method's lists are worth, over its seeds, and what the first seed's lists reach."""
    lists = [outcome.lists_RK for outcome in group if outcome.lists_RK is not None]
    if len(lists) < len(group):
        return None
    metrics_S = [list_metrics([*lists_RK], rows.target_R, data.catalogue) for lists_RK in lists]
    return {**estimates(_stack(metrics_S)), **reach([*lists[0]], data.catalogue)}


def by_target(
    vectors: Mapping[str, np.ndarray], groups: Mapping[str, Bools]
) -> dict[str, dict[str, Any]]:
    """By group of rows: how many users, and where these are enough, metrics of [S, R]."""
    found: dict[str, dict[str, Any]] = {}
    for name, own_R in groups.items():
        of_own = {metric: vectors[metric][:, own_R] for metric in compared_metrics()}
        enough = own_R.sum() >= FEWEST_USERS
        found[name] = {"n": int(own_R.sum()), **(estimates(of_own) if enough else {})}
    return found


def _judged(answers: Sequence[str], rows: Rows, data: PreparedData, rule: str) -> dict[str, Any]:
    """Under LLaRA's rule `hits_of_all` is the published HitRatio@1.

    `perfect_invalid` is the share of rows in which the target's own title would be judged invalid.
    """
    answered, judge = fixed_sample(rows, len(answers)), RULES[rule]
    titles_RC = [[data.titles[item] for item in row] for row in candidate_sets(answered)]
    places = target_places(answered).tolist()
    if rule == "catalogue":
        keys_I = data.catalogue.title_keys_I
        first_T = np.unique(keys_I, return_index=True)[1]
        titles_RC = [[data.titles[item] for item in first_T]] * len(answered)
        places = keys_I[answered.target_R].tolist()
    targets = list(zip(titles_RC, places, strict=True))
    judged = [judge(answer, *row) for answer, row in zip(answers, targets, strict=True)]
    perfect = [judge(titles[place], titles, place) for titles, place in targets]
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
