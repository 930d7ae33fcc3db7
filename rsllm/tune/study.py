"""A study: a search on validation, twins of its winner at equal samples, the test split once.

Without a space to search it compares named variants, the first of which stands for the winner.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rsllm.cluster import start_ray
from rsllm.config import SLOTTED, Experiment, StageConfig
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.compare import Claim, estimates, method_table, pair_table, per_user
from rsllm.evaluate.fuse import Fusion
from rsllm.evaluate.launch import Method, evaluate
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.report import tables, write_report
from rsllm.evaluate.statistics import beats_chance
from rsllm.pipeline import Pipeline
from rsllm.plan import Layout
from rsllm.runs import provenance, read_json
from rsllm.settings import content_hash, replace_in, to_dict
from rsllm.train.health import warnings
from rsllm.tune.progress import shown
from rsllm.tune.search import Space, TrialRecord, search

Twins = Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]
"""The winner's overrides (none without a search) -> named variants of it, the winner first."""

TWIN_SEED = 1000
PAIR_METRICS = ("MRR", "HR@1")
SHUFFLED = ", shuffled slots"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked, and of what."""

    title: str
    question: str
    base: Experiment
    space: Space | None = None
    """None: the twins alone are trained."""
    trials: int = 0
    first_guesses: Sequence[dict[str, Any]] = ()
    """Values, as the space names them, that are tried first."""
    twins: Twins
    twin_overrides: Mapping[str, Any] = field(default_factory=dict)
    """What all twins have in common beside the base, such as more samples than a trial."""
    claims: Sequence[Claim] = ()
    """Comparisons among the methods by their names, the main one first."""
    split: Literal["validation", "test"] = "test"
    """Where methods are compared; on test, which is opened once, they may be claimed better."""
    twin_seed: int = TWIN_SEED
    """Added to the seed of stage 2, so that twins do not share the winner's luck."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """What the user chose, for the report."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Names the search: the same study continues, a changed one starts anew."""
        parts = [to_dict(self.base), self.trials, self.seed]
        parts.append(inspect.getsource(self.space) if self.space else self.twins({}))
        return f"{re.sub('[^a-z0-9]+', '-', self.title.lower())[:40]}-{content_hash(parts)}"


def run(study: Study, storage: str | Path) -> Path:
    """Run or continue a study; print its tables.

    Returns:
        The folder of results.json, trials.csv and report.html on this node.

    Raises:
        ConfigError: the same study is running on the same storage.
    """
    pipeline = Pipeline(study.base, storage)
    with pipeline.store.alone(study.name, waits=False):
        return _run(study, pipeline, storage)


def _run(study: Study, pipeline: Pipeline, storage: str | Path) -> Path:
    start = time.monotonic()
    print(f"Ray dashboard: {start_ray()}  (its token: ray get-auth-token)", flush=True)
    print(_describe(pipeline.layout), flush=True)
    data = _announced("prepared data", pipeline.prepare)
    recommender = _announced("recommender", pipeline.fit)
    start_folder = _announced("stage 1", pipeline.train_text) if study.base.stage1.steps else None
    if study.space:
        records = search(
            pipeline,
            study.space,
            trials=study.trials,
            first_guesses=study.first_guesses,
            name=study.name,
            seed=study.seed,
        )
        # Finished trials first: a stopped one was weaker than its peers on fewer samples.
        tried = [record for record in records if record.curve]
        best = max(tried, key=lambda trial: (trial.state == "finished", trial.score or 0.0))
        twins = _train_twins(study, best.overrides, storage)
        trials = [_trial_row(record) for record in records]
    else:
        twins = _train_twins(study, {}, storage)
        records = [_record(number, twin) for number, twin in enumerate(twins.values())]
        best = records[0]
        named = zip(records, twins, strict=True)
        trials = [_trial_row(record) | {"name": name} for record, name in named]
    methods = _methods(study, recommender, start_folder, twins)
    results = {
        "title": study.title,
        "question": study.question,
        "backbone": study.base.backbone.source,
        "experiment": to_dict(study.base),
        "layout": _describe(pipeline.layout),
        "provenance": provenance(),
        "trials": trials,
        **_judged(study, pipeline, PreparedData.open(data), methods, next(iter(twins)), best),
        "budget": {**study.budget, "minutes": round((time.monotonic() - start) / 60, 1)},
    }
    folder = pipeline.store.root / "studies" / study.name
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, results)
    pipeline.store.share(f"studies/{study.name}")
    print(tables(results))
    print(f"\nresults: {folder}  (open report.html)", flush=True)
    return folder


def _describe(layout: Layout) -> str:
    device = "GPU" if layout.use_gpu else f"CPU with {layout.threads} threads"
    text = (
        f"{layout.concurrent_trials} trial(s) at a time, each {layout.workers} worker(s), one"
        f" {device} per worker, {layout.precision}"
    )
    if layout.precision == "fp32" and not layout.use_gpu:
        text += "\nthis CPU does not multiply bf16 in hardware: allow about twice the time"
    return text


def _announced(what: str, make: Callable[[], Path]) -> Path:
    start = time.monotonic()
    path = make()
    print(f"{what}: {path} ({time.monotonic() - start:.0f} s)", flush=True)
    return path


def _train_twins(
    study: Study, winner: Mapping[str, Any], storage: str | Path
) -> dict[str, Pipeline]:
    """Each twin under one fresh seed and equal samples."""
    variants = study.twins(winner)
    trained = {}
    for number, (name, changes) in enumerate(variants.items(), start=1):
        print(f"\ntwin {number} of {len(variants)}: {name}  {shown(changes)}", flush=True)
        seed = {"stage2.seed": study.base.stage2.seed + study.twin_seed}
        experiment = replace_in(study.base, {**study.twin_overrides, **changes, **seed})
        trained[name] = Pipeline(experiment, storage)
        trained[name].train()
    return trained


def _record(number: int, pipeline: Pipeline) -> TrialRecord:
    """A trained variant as a trial, its curve that of all its stages."""
    first = [pipeline.train_text()] if pipeline.experiment.stage1.steps else []
    curve: list[dict[str, float]] = []
    for folder in (*first, pipeline.train()):
        before = {name: curve[-1][name] if curve else 0.0 for name in ("samples", "seconds")}
        for entry in read_json(folder / "training.json")["curve"]:
            curve.append(entry | {name: entry[name] + start for name, start in before.items()})
    return TrialRecord(number=number, state="finished", overrides={}, curve=curve)


def _methods(
    study: Study, fitted: Path, text_only: Path | None, twins: Mapping[str, Pipeline]
) -> list[Method]:
    base = study.base
    methods = [
        Method(name="recommender", scorer="recommender", experiment=base, artifact=str(fitted)),
        Method(name="zero-shot", scorer="likelihood", experiment=base),
    ]
    if text_only:
        name = "text only" if base.stage1.representation == "text" else "stage 1"
        methods.append(_tuned(name, base, base.stage1, text_only))
    for place, (name, twin) in enumerate(twins.items()):
        experiment = twin.experiment
        methods.append(_tuned(name, experiment, experiment.stage2, twin.train()))
        if place == 0 and experiment.stage2.representation in SLOTTED:
            shuffled = replace_in(experiment, {"projector.shuffle_items": True})
            methods.append(replace(methods[-1], name=name + SHUFFLED, experiment=shuffled))
    return methods


def _tuned(name: str, experiment: Experiment, stage: StageConfig, folder: Path) -> Method:
    return Method(
        name=name,
        scorer=stage.loss.ranks_by,
        experiment=experiment,
        representation=stage.representation,
        artifact=str(folder),
    )


def _judged(
    study: Study,
    pipeline: Pipeline,
    data: PreparedData,
    methods: Sequence[Method],
    winner: str,
    best: TrialRecord,
) -> dict[str, Any]:
    """The search's outcome on validation, and all methods on the test split.

    The winner also stands there joined with the recommender, by a weight chosen on validation.
    """
    where: dict[str, Any] = {
        "data": data.path,
        "backbone": pipeline.backbone,
        "fingerprint": pipeline.fingerprint,
        "layout": pipeline.layout,
        "store": pipeline.store,
    }
    place = [method.name for method in methods].index(winner)
    validated = evaluate([methods[0], methods[place]], "validation", **where)
    config = study.base.evaluation
    limits = {"validation": config.validation_rows, "test": config.test_rows}
    validation = held_out(data, "validation", limits["validation"])
    draws = held_out(data, study.split, limits[study.split])
    fusion = Fusion.chosen(validated[1].scores_DRC, validated[0].scores_DRC, validation)
    outcomes = evaluate(methods, study.split, **where)
    claims = [*study.claims, Claim(winner, winner + SHUFFLED, "the language model reads its slots")]
    if study.split == "test":
        outcomes.append(fusion.outcome(outcomes[place], outcomes[0]))
        joined = outcomes[-1].method.name
        claims += [
            Claim(joined, methods[0].name, "the language model adds to the recommender"),
            Claim(joined, winner, "the recommender adds to the language model"),
        ]
    vectors = {outcome.method.name: per_user(outcome.scores_DRC, draws) for outcome in outcomes}
    n = len(validation[0])
    return {
        "split": study.split,
        "data": {"source": study.base.data.source, **data.facts["counts"]},
        "search": _searched(best, n, study.base.data.num_candidates),
        "recommender": {
            "validation": estimates(validated[0].expected),
            study.split: estimates(outcomes[0].expected),
        },
        "methods": method_table(outcomes, draws, data),
        "fusion": {"weight": fusion.weight, "curve": list(fusion.curve.items())},
        "pairs": pair_table(
            vectors, [c for c in claims if {c.first, c.second} <= vectors.keys()], PAIR_METRICS
        ),
        "notes": [
            *_notes(study, methods, best),
            f"{winner} joined with the recommender adds its log-probabilities with the weight"
            f" {fusion.weight:.3g}, chosen on {n} validation users (MRR"
            f" {fusion.curve[fusion.weight]:.3f} there).",
        ],
    }


def _searched(best: TrialRecord, n: int, num_candidates: int) -> dict[str, Any]:
    """The best trial on `n` validation rows, and what chance would have reached."""
    chance = sum(1 / rank for rank in range(1, num_candidates + 1)) / num_candidates
    return {
        "metric": "MRR",
        "split": "validation",
        "n": n,
        "best": best.number,
        "p_beats_chance": beats_chance(best.score or 0.0, n, num_candidates),
        "chance": {"MRR": chance, "HR@1": 1 / num_candidates},
    }


def _trial_row(record: TrialRecord) -> dict[str, Any]:
    last = record.curve[-1] if record.curve else {}
    return {
        "number": record.number,
        "state": record.state,
        "parameters": shown(record.overrides),
        "samples": int(last.get("samples", 0)),
        "seconds": round(last.get("seconds", 0.0), 1),
        "curve": record.curve,
        "MRR": record.score,
        "HR@1": last.get("HR@1"),
        "error": record.error,
    }


def _notes(study: Study, methods: Sequence[Method], best: TrialRecord) -> list[str]:
    once = "The test split was opened once, after all training, for all methods together."
    notes = [
        once if study.split == "test" else "These are the users that choices are made on.",
        "The ranking loss (gamma) and the pointer are extensions of ours; gamma = 0 is RSLLM.",
        f"Twins share the recommender and, unless named, stage 1; one seed each"
        f" ({study.base.stage2.seed + study.twin_seed}).",
        f"A method{SHUFFLED}: the same weights, every slot filled with another item's vector.",
    ]
    if study.base.backbone.source == "smollm2-135m-q4":
        notes.append("The backbone's weights are dequantised from 4 bits.")
    if any(method.scorer == "pointer" for method in methods):
        notes.append(
            "Methods scored by the pointer rank by it; their title likelihoods are in results.json."
        )
    return notes + [f"At the end of the best trial, {doubt}." for doubt in warnings(best.curve[-1])]
