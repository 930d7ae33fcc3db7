"""Configurations trained anew, all on the same fresh seeds: which is best, and how sure is that?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rsllm.config import Experiment, StageConfig
from rsllm.config.plain import replace_in, to_dict
from rsllm.evaluate.run import SCORES_ONLY, Method
from rsllm.pipeline import Pipeline, run_all
from rsllm.store.artifacts import read_json
from rsllm.study.journal import METRIC, TrialRecord
from rsllm.study.progress import run_name, short_names
from rsllm.train.assignment import STAGES, Stage

Curve = list[dict[str, float]]
Trained = Mapping[str, Sequence[Pipeline]]
"""By a configuration's name, its pipelines of each seed."""


def train(
    variants: Mapping[str, Mapping[str, Any]],
    base: Experiment,
    seeds: range,
    storage: str | Path,
    watched: Stage = "stage2",
) -> Trained:
    """Train all variants (overrides of `base` by name) on all seeds of a stage, each once."""

    def made(name: str, seed: int) -> Pipeline:
        experiment = replace_in(base, {**variants[name], f"{STAGES[watched].section}.seed": seed})
        named = run_name(f"{name}-seed-{seed}", to_dict(experiment))
        return Pipeline(experiment, storage, run_name=named, watched=watched)

    trained = {name: [made(name, seed) for seed in seeds] for name in variants}
    everything = [pipeline for group in trained.values() for pipeline in group]
    if everything[0].layout.concurrent_trials > 1:
        run_all(everything)
    for number, (name, group) in enumerate(trained.items(), start=1):
        settings = short_names(variants[name])
        print(f"\n{number} of {len(variants)}: {name}  {settings}", flush=True)
        for pipeline in group:
            pipeline.run()
    return trained


def language_method(name: str, experiment: Experiment, stage: StageConfig, folder: Path) -> Method:
    """What a stage of language-model tuning left in `folder`, as something that ranks."""
    return Method(
        name=name,
        scorer=stage.ranks_by,
        experiment=experiment,
        representation=stage.representation,
        prompts=stage.prompts,
        artifact=str(folder),
    )


def generate_on_first_seed_only(group: Sequence[Method]) -> list[Method]:
    """A method under several seeds: later ones rank, and do not answer again."""

    def scored(method: Method) -> Method:
        name = f"{method.name}, seed {method.experiment.stage2.seed}"
        return replace(method.under(SCORES_ONLY), name=name)

    return [group[0], *map(scored, group[1:])]


def stages(pipeline: Pipeline) -> list[Path]:
    """The artifacts of what was trained and is watched, stage 1 first."""
    text = pipeline.watched == "stage2" and pipeline.experiment.stage1.steps
    return [*([pipeline.train_text()] if text else []), pipeline.run()]


def learning_curve(trained: Sequence[Pipeline]) -> Curve:
    """The mean over the seeds, from the start of stage 1 on."""
    return [
        {n: fmean(p[n] for p in points) for n in sorted(set.intersection(*map(set, points)))}
        for points in zip(*map(_curve, trained), strict=True)
    ]


def _curve(pipeline: Pipeline) -> Curve:
    curve: Curve = []
    for folder in stages(pipeline):
        before = {name: curve[-1][name] if curve else 0.0 for name in ("samples", "seconds")}
        for entry in read_json(folder / "training.json")["curve"]:
            curve.append(entry | {name: entry[name] + start for name, start in before.items()})
    return curve


def best_trials(records: Sequence[TrialRecord], top: int) -> dict[str, TrialRecord]:
    """The best trials of a search by name, no configuration twice, the best first.

    Finished ones come first: a stopped one was weaker than its peers on fewer samples. One that
    failed would fail again, and comes only where all did.
    """
    begun = [record for record in records if record.curve]
    tried = [record for record in begun if record.state != "failed"] or begun
    ranked = sorted(tried, key=lambda r: (r.state != "finished", -(r.score or 0.0)))
    new = [
        r for at, r in enumerate(ranked) if r.overrides not in [o.overrides for o in ranked[:at]]
    ]
    return {f"trial {record.number}": record for record in new[:top]}


def confirm_table(trained: Trained, searched: Mapping[str, TrialRecord]) -> list[dict[str, Any]]:
    """The validation MRR of trials trained anew, measured as in the search, beside that of then."""
    table = []
    for name, group in trained.items():
        ends = [read_json(pipeline.run() / "training.json")["curve"][-1] for pipeline in group]
        scores, then = [end[METRIC] for end in ends], searched[name]
        seeds = [getattr(p.experiment, STAGES[p.watched].section).seed for p in group]
        row = {"name": name, "search_score": then.score, "seeds": seeds, "scores": scores}
        row |= {"search_samples": then.end["samples"], "samples": ends[0]["samples"]}
        table.append(row | {"mean": fmean(scores), "lowest": min(scores), "highest": max(scores)})
    return table


def confirm_best(
    records: Sequence[TrialRecord],
    top: int,
    base: Experiment,
    seeds: range,
    storage: str | Path,
    watched: Stage = "stage2",
) -> tuple[list[dict[str, Any]], dict[str, TrialRecord]]:
    """The best trials of a search trained anew: `confirm_table`, and all of them by their mean.

    The first is flattered by these seeds if it was chosen among several.
    """
    found = best_trials(records, top)
    print(f"\nfresh seeds for {', '.join(found)}", flush=True)
    again = {name: trial.overrides for name, trial in found.items()}
    confirm = confirm_table(train(again, base, seeds, storage, watched), found)
    confirm.sort(key=lambda row: -float(row["mean"]))
    return confirm, {row["name"]: found[row["name"]] for row in confirm}


def compare_training(trained: Trained, pair: Mapping[str, Any]) -> dict[str, Any]:
    """What training both methods of a comparison took, and who was ahead after equal seconds.

    Returns:
        "samples" and "seconds" of both, means over seeds. "equal_seconds": the "seconds" of the
        shorter training and the "values" of the pair's metric on validation then, on straight
        lines between validations; "ahead": the better method. Without these two where a curve
        begins only later; nothing where one of both was not trained.
    """
    names = [pair["first"], pair["second"]]
    if not trained.keys() >= set(names):
        return {}
    curves = [learning_curve(trained[name]) for name in names]
    cost = {key: [round(curve[-1][key], 1) for curve in curves] for key in ("samples", "seconds")}
    end = min(curve[-1]["seconds"] for curve in curves)
    if max(curve[0]["seconds"] for curve in curves) > end:
        return cost
    one, other = (_interpolated(curve, pair["metric"], end) for curve in curves)
    ahead = None if one == other else names[int(other > one)]
    return {**cost, "equal_seconds": {"seconds": end, "values": [one, other]}, "ahead": ahead}


def _interpolated(curve: Curve, metric: str, seconds: float) -> float:
    times, values = ([point[name] for point in curve] for name in ("seconds", metric))
    return float(np.interp(seconds, times, values))
