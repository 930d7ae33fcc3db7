"""A study: a search on validation, twins of its winner at equal samples, the test split once."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsllm.cluster import start_ray
from rsllm.config import Experiment
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.compare import Claim, estimates, method_table, pair_table, per_user
from rsllm.evaluate.fuse import Fusion
from rsllm.evaluate.launch import Method, evaluate
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.report import tables, write_report
from rsllm.evaluate.statistics import beats_chance
from rsllm.pipeline import Pipeline
from rsllm.plan import Layout
from rsllm.runs import provenance
from rsllm.settings import content_hash, replace_in, to_dict
from rsllm.tune.progress import shown
from rsllm.tune.search import Space, TrialRecord, search

Twins = Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]
"""The winner's overrides -> named variants of it, the winner among them."""

TWIN_SEED = 1000
PAIR_METRICS = ("MRR", "HR@1")
TARGET_ACCURACY, SOLVED = "contrast/target_accuracy", 0.95


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked, and of what."""

    title: str
    question: str
    base: Experiment
    space: Space
    trials: int
    first_guesses: Sequence[dict[str, Any]] = ()
    """Values, as the space names them, that are tried first."""
    twins: Twins
    twin_overrides: Mapping[str, Any] = field(default_factory=dict)
    """What all twins have in common beside the base, such as more samples than a trial."""
    claims: Sequence[Claim] = ()
    """Comparisons among twins, `recommender`, `zero-shot` and `text only`, the main one first."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """What the user chose, for the report."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Names the search: the same study continues, a changed one starts anew."""
        parts = [to_dict(self.base), self.trials, self.seed, inspect.getsource(self.space)]
        return f"{self.title.lower().replace(' ', '-')}-{content_hash(parts)}"


def run(study: Study, storage: str | Path) -> Path:
    """Run or continue a study; print its tables.

    Returns:
        The folder of results.json, trials.csv and report.html.
    """
    start = time.monotonic()
    print(f"Ray dashboard: {start_ray()}  (its token: ray get-auth-token)", flush=True)
    pipeline = Pipeline(study.base, storage)
    print(_describe(pipeline.layout), flush=True)
    data = _announced("prepared data", pipeline.prepare)
    recommender = _announced("recommender", pipeline.fit)
    start_folder = _announced("stage 1", pipeline.train_text) if study.base.stage1.steps else None
    records = search(
        pipeline,
        study.space,
        trials=study.trials,
        first_guesses=study.first_guesses,
        name=study.name,
        seed=study.seed,
    )
    best = max((r for r in records if r.curve), key=_rank_of)
    twins = _train_twins(study, best, storage)
    methods = _methods(study, recommender, start_folder, twins)
    results = {
        "title": study.title,
        "question": study.question,
        "budget": dict(study.budget) | {"minutes": None},
        "backbone": study.base.backbone.source,
        "experiment": to_dict(study.base),
        "layout": _describe(pipeline.layout),
        "provenance": provenance(),
        "trials": [_trial_row(record) for record in records],
        **_judged(study, pipeline, PreparedData.open(data), methods, next(iter(twins)), best),
    }
    results["budget"]["minutes"] = round((time.monotonic() - start) / 60, 1)
    folder = pipeline.store.root / "studies" / study.name
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, results)
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


def _rank_of(record: TrialRecord) -> tuple[bool, float]:
    """Finished trials first: a stopped one was weaker than its peers on fewer samples."""
    return record.state == "finished", record.score or 0.0


def _train_twins(
    study: Study, best: TrialRecord, storage: str | Path
) -> dict[str, tuple[Experiment, Path]]:
    """Each twin under one fresh seed and equal samples."""
    variants = study.twins(best.overrides)
    trained = {}
    for number, (name, changes) in enumerate(variants.items(), start=1):
        print(f"\ntwin {number} of {len(variants)}: {name}  {shown(changes)}", flush=True)
        seed = {"stage2.seed": study.base.stage2.seed + TWIN_SEED}
        experiment = replace_in(study.base, {**study.twin_overrides, **changes, **seed})
        trained[name] = (experiment, Pipeline(experiment, storage).train())
    return trained


def _methods(
    study: Study,
    recommender: Path,
    text_only: Path | None,
    twins: Mapping[str, tuple[Experiment, Path]],
) -> list[Method]:
    base = study.base
    methods = [
        Method(
            name="recommender", scorer="recommender", experiment=base, artifact=str(recommender)
        ),
        Method(name="zero-shot", scorer="likelihood", experiment=base),
    ]
    if text_only:
        methods.append(
            Method(
                name="text only" if base.stage1.representation == "text" else "stage 1",
                scorer=base.stage1.loss.ranks_by,
                experiment=base,
                representation=base.stage1.representation,
                artifact=str(text_only),
            )
        )
    for name, (experiment, folder) in twins.items():
        methods.append(
            Method(
                name=name,
                scorer=experiment.stage2.loss.ranks_by,
                experiment=experiment,
                representation=experiment.stage2.representation,
                artifact=str(folder),
            )
        )
    return methods


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
    validation = held_out(data, "validation", study.base.evaluation.validation_rows)
    fusion = Fusion.chosen(validated[1].scores_DRC, validated[0].scores_DRC, validation)
    outcomes = evaluate(methods, "test", **where)
    outcomes.append(fusion.outcome(outcomes[place], outcomes[0]))
    joined = outcomes[-1].method.name
    draws = held_out(data, "test", study.base.evaluation.test_rows)
    vectors = {outcome.method.name: per_user(outcome.scores_DRC, draws) for outcome in outcomes}
    claims = [
        *study.claims,
        Claim(joined, methods[0].name, "the language model adds to the recommender"),
        Claim(joined, winner, "the recommender adds to the language model"),
    ]
    num_candidates = study.base.data.num_candidates
    n = len(validation[0])
    chance = sum(1 / rank for rank in range(1, num_candidates + 1)) / num_candidates
    return {
        "data": {"source": study.base.data.source, **data.facts["counts"]},
        "search": {
            "metric": "MRR",
            "split": "validation",
            "n": n,
            "best": best.number,
            "p_beats_chance": beats_chance(best.score or 0.0, n, num_candidates),
            "chance": {"MRR": chance, "HR@1": 1 / num_candidates},
        },
        "recommender": {
            "validation": estimates(validated[0].expected),
            "test": estimates(outcomes[0].expected),
        },
        "methods": method_table(outcomes, draws, data),
        "fusion": {"weight": fusion.weight, "curve": list(fusion.curve.items())},
        "pairs": pair_table(
            vectors, [c for c in claims if {c.first, c.second} <= vectors.keys()], PAIR_METRICS
        ),
        "notes": [
            *_notes(study, methods, best),
            f"{joined} adds the recommender's log-probabilities with weight {fusion.weight:.3g},"
            f" chosen on {n} validation users (MRR {fusion.curve[fusion.weight]:.3f} there).",
        ],
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
    notes = [
        "The test split was opened once, after the search, for all methods together.",
        "The ranking loss (gamma) and the pointer are extensions of ours; gamma = 0 is RSLLM.",
        f"Twins share stage 1 and the recommender and see equal samples under a fresh seed"
        f" ({study.base.stage2.seed + TWIN_SEED}); one seed each.",
    ]
    if study.base.backbone.source == "smollm2-135m-q4":
        notes.append("The backbone's weights are dequantised from 4 bits.")
    if any(method.scorer == "pointer" for method in methods):
        notes.append(
            "Methods scored by the pointer rank by it; their title likelihoods are in results.json."
        )
    accuracies = [e[TARGET_ACCURACY] for e in best.curve if TARGET_ACCURACY in e]
    if accuracies and min(accuracies) > SOLVED:
        notes.append("The target contrast was solved from the start: alpha had no leverage.")
    return notes
