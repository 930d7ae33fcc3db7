"""What the trials of a search say together: what mattered, the Pareto front."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection as Direction
from optuna.trial import FrozenTrial, create_trial

from rsllm.evaluate.metrics import METRICS

Trial = Mapping[str, Any]

TOP = 0.25
FEWEST = 8
"""Trials with a score, below which nothing can be said of what mattered."""


def scored(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Those that have reported `metric`."""
    return [trial for trial in trials if trial.get(metric) is not None]


def importance(trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """Share of each tuned value in what sets the best quarter of the trials apart, largest first.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255); {} where trials are too few.
    """
    known = scored(trials, metric)
    if len(known) < FEWEST:
        return {}
    tuned = [
        {k: v if numeric([v]) else str(v) for k, v in t["parameters"].items() if v is not None}
        for t in known
    ]
    ranges = {name: _range([v[name] for v in tuned if name in v]) for name in names(tuned)}
    study = _study(
        ["score"],
        [
            create_trial(params=v, distributions={n: ranges[n] for n in v}, value=trial[metric])
            for trial, v in zip(known, tuned, strict=True)
        ],
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials than which no other is better in one objective and as good in all."""
    able = [t for t in trials if t.get("objectives") and t["state"] == "finished"]
    if not able:
        return []
    goals = list(able[0]["objectives"])
    study = _study(goals, [create_trial(values=[t["objectives"][g] for g in goals]) for t in able])
    return [able[best.number] for best in study.best_trials]


def rising(goal: str) -> bool:
    """Whether more is better of an objective; costs are the others."""
    return goal == "score" or goal in METRICS


def names(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every key of the mappings once, in order of appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def numeric(values: Sequence[Any]) -> bool:
    """Whether they have a place on an axis; truth values are names."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether numbers want a logarithmic scale."""
    return 0 < 20 * min(values) < max(values)


def _study(goals: Sequence[str], trials: Sequence[FrozenTrial]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=[Direction.MAXIMIZE if rising(goal) else Direction.MINIMIZE for goal in goals]
    )
    study.add_trials(trials)
    return study


def _range(values: Sequence[Any]) -> BaseDistribution:
    if numeric(values):
        return FloatDistribution(min(values), max(values), log=spans_decades(values))
    return CategoricalDistribution(list(dict.fromkeys(values)))
