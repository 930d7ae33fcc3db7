"""A study: a search on validation, its best trials confirmed on fresh seeds, twins of the winner
at equal samples on the same seeds, the test split once.

Without a space to search it compares named variants, the first of which stands for the winner.
"""

import ast
import inspect
import re
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rsllm.compute.layout import Layout
from rsllm.compute.start import start_ray
from rsllm.config import SLOTTED, Experiment
from rsllm.config.plain import content_hash, replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.compare import estimates, method_table, over_seeds
from rsllm.evaluate.fuse import combine_outcomes
from rsllm.evaluate.metrics import compared_metrics
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import Method
from rsllm.pipeline import Pipeline
from rsllm.report.tables import show
from rsllm.study.claims import Claim, compare
from rsllm.study.progress import trial_rows
from rsllm.study.search import Search, Space, TrialRecord, publish
from rsllm.study.variants import (
    Trained,
    choose_fusion,
    compare_training,
    confirm_best,
    generate_on_first_seed_only,
    judge,
    language_method,
    learning_curve,
    train,
)
from rsllm.train.health import warnings

Twins = Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]
"""The winner's overrides (none without a search) -> named variants of it, the winner first."""

SHUFFLED, BY_LIKELIHOOD = ", shuffled slots", ", by likelihood"
"""In a claim: a twin whose slots hold other items, and one judged by the likelihood of titles that
is trained, and ranks, by the pointer."""
ALONE = "recommender"
KEYS = "keys alone"
"""What the catalogue scorer does before a language model reads anything."""
FRESH = 1000
"""Added to the seed of a search, so that the twins of its winner do not share the winner's luck."""
WINNER = "the winner"
"""In a claim, whatever the first twin is called."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the experiment it is asked of, and what is compared to answer it."""

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
    num_seeds: int = 1
    """Seeds of stage 2; all that is compared is trained on each of them."""
    confirm_top: int = 1
    """Trials that are trained anew on fresh seeds, as many as `num_seeds`; the best mean on
    validation is the winner."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """What the user chose, for the report."""
    seed: int = 0
    search: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of `Search`."""

    @property
    def name(self) -> str:
        """Name the search: the same study continues, wherever it runs; a changed one is new."""
        parts = [to_dict(self.base.anywhere), self.seed]
        # What it says, whatever its comments and layout.
        code = self.space and ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(self.space))))
        parts.append(code or self.twins({}))
        return f"{re.sub('[^a-z0-9]+', '-', self.title.lower())[:40]}-{content_hash(parts)}"

    @property
    def seeds(self) -> range:
        """Those of stage 2 for all that is compared; nothing is chosen under them."""
        first = self.base.stage2.seed + (FRESH if self.space else 0)
        return range(first, first + self.num_seeds)


def run(study: Study, storage: str | Path) -> Path:
    """Run or continue a study; print its tables.

    Returns:
        The folder of results.json, trials.csv and report.html on this node.

    Raises:
        ConfigError: the same study is running on the same storage.
    """
    pipeline, start = Pipeline(study.base, storage), time.monotonic()
    with pipeline.store.lock(study.name, wait=False):
        search = study.space and Search(
            pipeline=pipeline,
            space=study.space,
            name=study.name,
            first_guesses=study.first_guesses,
            seed=study.seed,
            **study.search,
        )
        print(f"Ray dashboard: {start_ray()}  (its token: ray get-auth-token)", flush=True)
        layout = _describe(pipeline.layout)
        print(layout, flush=True)
        steps = {"prepared data": pipeline.prepare, "recommender": pipeline.fit}
        if study.base.stage1.steps:
            steps["stage 1"] = pipeline.train_text
        if study.base.stage2.prompts == "history":
            steps["keys"] = pipeline.train_keys
        artifacts = {}
        for name, make in steps.items():
            begun = time.monotonic()
            artifacts[name] = make()
            took = time.monotonic() - begun
            print(f"{name}: {artifacts[name]} ({took:.0f} s)", flush=True)
        searched, twins, records = _train(study, search, storage)
        methods = _methods(study, artifacts, twins)
        data = PreparedData.open(artifacts["prepared data"])
        outcome = _judge(study, pipeline, data, methods, twins, records[0])
        minutes = round((time.monotonic() - start) / 60, 1)
        return publish(
            pipeline,
            study.name,
            records,
            records[0],
            model=next(iter(twins.values()))[0].run(),
            title=study.title,
            question=study.question,
            layout=layout,
            seeds=list(study.seeds),
            budget={**study.budget, "minutes": minutes},
            **searched,
            **outcome,
        )


def _train(
    study: Study, search: Search | None, storage: str | Path
) -> tuple[dict[str, Any], Trained, list[TrialRecord]]:
    """Search, confirm the best trials on fresh seeds, and train the twins of their winner.

    Returns:
        What the report says of the trials; what is compared: the winner, its twins, and then whom
        it beat; all trials, the winner first.
    """
    base = replace_in(study.base, study.twin_overrides)
    if search is None:
        twins = train(study.twins({}), base, study.seeds, storage)
        records = [
            TrialRecord(number=number, state="finished", overrides={}, curve=learning_curve(twin))
            for number, twin in enumerate(twins.values())
        ]
        rows = zip(trial_rows(records), twins, strict=True)
        trials = [row | {"name": name} for row, name in rows]
        return {"trials": trials, "confirm": []}, twins, records[:1]
    records = search.run(study.trials)
    # Who is chosen among several owes its lead to the luck of these seeds, so it gets others.
    after = study.num_seeds if study.confirm_top > 1 else 0
    fresh = range(study.seeds.start + after, study.seeds.stop + after)
    confirm, ranked = confirm_best(records, study.confirm_top, base, fresh, storage)
    best, *beaten = ranked.values()
    print(f"\ntwins of trial {best.number}", flush=True)
    rivals = {f"trial {record.number}": record.overrides for record in beaten}
    twins = train({**study.twins(best.overrides), **rivals}, base, study.seeds, storage)
    others = [record for record in records if record != best]
    return {"trials": trial_rows(records), "confirm": confirm}, twins, [best, *others]


def _describe(layout: Layout) -> str:
    device = "GPU" if layout.use_gpu else f"CPU with {layout.threads} threads"
    text = (
        f"{layout.concurrent_trials} trial(s) at a time, each {layout.workers} worker(s), one"
        f" {device} per worker, {layout.precision}"
    )
    if layout.precision == "fp32" and not layout.use_gpu:
        text += "\nthis CPU does not multiply bf16 in hardware: allow about twice the time"
    return text


def _methods(
    study: Study, artifacts: Mapping[str, Path], twins: Trained
) -> dict[str, list[Method]]:
    """What is compared by name, one of each seed; what is not a twin has one seed."""
    base, fitted = study.base, str(artifacts["recommender"])
    recommender = Method(name=ALONE, scorer="recommender", experiment=base, artifact=fitted)
    whole = replace_in(base, {"backbone.layers": 0})  # a cut one cannot write titles untuned
    untuned = Method(name="zero-shot", scorer="likelihood", experiment=whole)
    methods = {method.name: [method] for method in (recommender, untuned)}
    if keys := artifacts.get("keys"):
        methods[KEYS] = [Method(name=KEYS, scorer="keys", experiment=base, artifact=str(keys))]
    if text := artifacts.get("stage 1"):
        name = "text only" if base.stage1.representation == "text" else "stage 1"
        methods[name] = [language_method(name, base, base.stage1, text)]
    shuffle = {"projector.shuffle_items": True}
    for place, (name, twin) in enumerate(twins.items()):
        methods[name] = [
            language_method(name, p.experiment, p.experiment.stage2, p.train()) for p in twin
        ]
        if place == 0 and methods[name][0].representation in SLOTTED:
            methods[name + SHUFFLED] = [
                replace(m.under(shuffle), name=name + SHUFFLED) for m in methods[name]
            ]
    return {name: generate_on_first_seed_only(group) for name, group in methods.items()}


def _judge(
    study: Study,
    pipeline: Pipeline,
    data: PreparedData,
    methods: Mapping[str, Sequence[Method]],
    twins: Trained,
    best: TrialRecord,
) -> dict[str, Any]:
    """Compare all methods on the test split, after all choices.

    The winner also stands there joined with the recommender, by a weight chosen on validation.
    """
    winner, limits = next(iter(twins)), study.base.evaluation
    validated, weight, curve = choose_fusion(methods[ALONE][0], methods[winner], pipeline, data)
    note = (
        f"{winner} joined with the recommender adds its log-probabilities with the weight"
        f" {weight:.3g}, the best of {len(curve)} on {curve[weight].n} validation users: MRR"
        f" {show(asdict(curve[weight]))} there, {show(asdict(curve[0.0]))} without the recommender."
    )
    every = [method for group in methods.values() for method in group]
    judged = iter(judge(every, study.split, pipeline, data))
    outcomes = {name: [next(judged) for _ in group] for name, group in methods.items()}
    draws = held_out(data, "validation", limits.validation_rows)
    if study.split == "test":
        draws = held_out(data, "test", limits.test_rows)
        fused = [
            combine_outcomes(outcome, outcomes[ALONE][0], weight) for outcome in outcomes[winner]
        ]
        outcomes[fused[0].method.name] = fused
    vectors = {name: over_seeds(group, draws) for name, group in outcomes.items()}
    for name, group in outcomes.items():
        if by_likelihood := over_seeds(group, draws, "likelihood_DRC"):
            vectors[name + BY_LIKELIHOOD] = by_likelihood
    return {
        "split": study.split,
        "recommender": {
            "validation": estimates(validated.expected),
            study.split: estimates(outcomes[ALONE][0].expected),
        },
        "methods": method_table(outcomes, draws, data),
        "fusion": {
            "weight": weight,
            "curve": [[w, e.value, e.low, e.high] for w, e in curve.items()],
        },
        "pairs": _pairs(study, twins, best, vectors),
        "notes": [*_notes(study, methods, best), note],
    }


def _pairs(
    study: Study, twins: Trained, best: TrialRecord, vectors: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The study's claims, those about its winner, and what the training of twins cost."""
    winner, own = next(iter(twins)), study.twins(best.overrides)
    claims = [
        *(replace(c, first=c.first.replace(WINNER, winner)) for c in study.claims),
        *(Claim(winner, name, f"it is better than {name}") for name in twins if name not in own),
        Claim(winner, winner + SHUFFLED, "the language model reads its slots"),
        Claim(winner, KEYS, "the language model adds to the keys"),
        Claim(f"{winner} + {ALONE}", ALONE, "the language model adds to the recommender"),
        Claim(f"{winner} + {ALONE}", winner, "the recommender adds to the language model"),
    ]
    metrics = compared_metrics("MRR")  # what the search was for decides
    known = [claim for claim in claims if {claim.first, claim.second} <= vectors.keys()]
    return [pair | compare_training(twins, pair) for pair in compare(vectors, known, metrics)]


def _notes(study: Study, methods: Mapping[str, Sequence[Method]], best: TrialRecord) -> list[str]:
    once = "The test split was opened once, after all training, for all methods together."
    notes = [
        once if study.split == "test" else "These are the users that choices are made on.",
        "History prompts with their catalogue scorer, the ranking loss (gamma) and the pointer are"
        " extensions of ours; choice prompts with gamma = 0 are RSLLM.",
        "Twins share data, recommender and, unless named, stage 1. Seeds are of stage 2: weights,"
        f" order of samples, templates, training negatives; here {list(study.seeds)}. Answers and"
        " orders of the candidates are those of the first.",
        f"A method{SHUFFLED}: the same weights, every slot filled with another item's vector.",
    ]
    if study.base.backbone.source == "smollm2-135m-q4":
        notes.append("The backbone's weights are dequantised from 4 bits.")
    if study.base.data.candidates == "recommender":
        notes.append("Beside the target stands what the recommender ranks highest, not a draw.")
    if any(group[0].scorer == "pointer" for group in methods.values()):
        notes.append("The pointer's methods rank by it; title likelihoods are in results.json.")
    return notes + [f"At the end of the best trial, {doubt}." for doubt in warnings(best.curve[-1])]
