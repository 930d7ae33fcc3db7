"""Variants of an experiment, trained on the same seeds, and judged: for studies and grids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from rsllm.config import Experiment, StageConfig
from rsllm.config.plain import replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.fuse import choose_weight
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import SCORES_ONLY, Method, Outcome, evaluate
from rsllm.evaluate.statistics import Estimate
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
    trained: dict[str, list[Pipeline]] = {name: [] for name in variants}
    for name, overrides in variants.items():
        for seed in seeds:
            seeded = {**overrides, f"{STAGES[watched].section}.seed": seed}
            experiment = replace_in(base, seeded)
            unique = run_name(f"{name}-seed-{seed}", to_dict(experiment))
            pipeline = Pipeline(experiment, storage, run_name=unique, watched=watched)
            trained[name].append(pipeline)
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
    judged = [group[0]]
    for method in group[1:]:
        name = f"{method.name}, seed {method.experiment.stage2.seed}"
        judged.append(replace(method.under(SCORES_ONLY), name=name))
    return judged


def judge(
    methods: Sequence[Method],
    split: Literal["validation", "test"],
    pipeline: Pipeline,
    data: PreparedData,
) -> list[Outcome]:
    """Evaluate methods on a pipeline's data; its backbone is asked for where one needs it."""
    speaks = any(method.is_language_model for method in methods)
    return evaluate(
        methods,
        split,
        data=data.path,
        backbone=pipeline.backbone if speaks else "",
        fingerprint=pipeline.fingerprint if speaks else "",
        layout=pipeline.layout,
        store=pipeline.store,
    )


def choose_fusion(
    alone: Method, methods: Sequence[Method], pipeline: Pipeline, data: PreparedData
) -> tuple[Outcome, float, dict[float, Estimate]]:
    """Weigh a recommender beside a language model, on as many validation users as are tested.

    Returns:
        What the recommender did there, its weight, and the validation MRR of every weight.
    """
    limit = alone.experiment.evaluation.test_rows
    both = [method.under({"evaluation.validation_rows": limit}) for method in (alone, *methods)]
    validated, *language = judge(both, "validation", pipeline, data)
    rows = held_out(data, "validation", limit)
    return validated, *choose_weight(language, validated, rows)


def stages(pipeline: Pipeline) -> list[Path]:
    """The artifacts of what was trained and is watched, stage 1 first."""
    text = pipeline.watched == "stage2" and pipeline.experiment.stage1.steps
    return [*([pipeline.train_text()] if text else []), pipeline.run()]


def learning_curve(trained: Sequence[Pipeline]) -> Curve:
    """The mean over the seeds, from the start of stage 1 on."""
    curves: list[Curve] = []
    for pipeline in trained:
        curve: Curve = []
        for folder in stages(pipeline):
            before = {name: curve[-1][name] if curve else 0.0 for name in ("samples", "seconds")}
            for entry in read_json(folder / "training.json")["curve"]:
                curve.append(entry | {name: entry[name] + start for name, start in before.items()})
        curves.append(curve)
    return [
        {n: fmean(p[n] for p in points) for n in sorted(set.intersection(*map(set, points)))}
        for points in zip(*curves, strict=True)
    ]


def best_trials(records: Sequence[TrialRecord], top: int) -> dict[str, TrialRecord]:
    """The best trials of a search by name, no configuration twice, the best first.

    Finished ones come first: a stopped one was weaker than its peers on fewer samples. One that
    failed would fail again, and comes only where all did.
    """
    begun = [record for record in records if record.curve]
    tried = [record for record in begun if record.state != "failed"] or begun
    best: list[TrialRecord] = []
    for record in sorted(tried, key=lambda r: (r.state != "finished", -(r.score or 0.0))):
        if record.overrides not in [other.overrides for other in best]:
            best.append(record)
    return {f"trial {record.number}": record for record in best[:top]}


def confirm_table(trained: Trained, searched: Mapping[str, TrialRecord]) -> list[dict[str, Any]]:
    """The validation MRR of trials trained anew, measured as in the search, beside that of then."""
    table = []
    for name, group in trained.items():
        ends = [read_json(pipeline.run() / "training.json")["curve"][-1] for pipeline in group]
        scores, then = [end[METRIC] for end in ends], searched[name]
        seeds = [getattr(p.experiment, STAGES[p.watched].section).seed for p in group]
        row = {"name": name, "search_score": then.score, "seeds": seeds, "scores": scores}
        row |= {"search_samples": then.end["samples"], "samples": ends[0]["samples"]}
        table.append(row | {"mean": fmean(scores)})
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
    best = best_trials(records, top)
    print(f"\nfresh seeds for {', '.join(best)}", flush=True)
    variants = {name: trial.overrides for name, trial in best.items()}
    confirm = confirm_table(train(variants, base, seeds, storage, watched), best)
    confirm.sort(key=lambda row: -float(row["mean"]))
    return confirm, {row["name"]: best[row["name"]] for row in confirm}


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
    one, other = (
        float(np.interp(end, [p["seconds"] for p in curve], [p[pair["metric"]] for p in curve]))
        for curve in curves
    )
    ahead = None if one == other else names[int(other > one)]
    return {**cost, "equal_seconds": {"seconds": end, "values": [one, other]}, "ahead": ahead}
