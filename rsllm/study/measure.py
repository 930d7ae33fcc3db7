"""Trains and judges what a grid lacks; every cell is on file as soon as it is known."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from safetensors import safe_open

from rsllm.config import Experiment
from rsllm.config.plain import replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.errors import RsllmError
from rsllm.evaluate.compare import method_table, stack_seeds
from rsllm.evaluate.fuse import choose_weight, combine_outcomes, combine_scores
from rsllm.evaluate.metrics import compared_metrics
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import Method, Outcome, evaluate, read_scores
from rsllm.model.tuned import KEYS, TITLES
from rsllm.pipeline import Pipeline
from rsllm.prompts.templates import wording
from rsllm.recommenders.embeddings import FILE as ITEM_TABLE
from rsllm.store.artifacts import Store, provenance, read_json
from rsllm.store.versions import deciding_results
from rsllm.study.claims import paired_tests
from rsllm.study.grid import Dataset, Grid, GridArguments, datasets
from rsllm.study.results import Cell, Entry, slug
from rsllm.study.variants import generate_on_first_seed_only, language_method, stages, train
from rsllm.train.assignment import STAGES
from rsllm.train.health import warnings

CODE = {**deciding_results(), "wording": wording()}
"""What decides a cell beside its settings, its data and its backbone."""


def fill(grid: Grid, arguments: GridArguments) -> dict[str, str]:
    """Compute all cells and comparisons that are not on file.

    Returns:
        What was left out, data sets and entries ("DATA: ENTRY"), each with its reason.
    """
    left_out = {}
    for dataset in datasets(grid, arguments):
        if dataset.name in grid.data and (reason := _absent(dataset.experiment, arguments.storage)):
            left_out[dataset.name] = reason
            print(f"{dataset.name} is left out: {reason}", flush=True)
            continue
        runner = Runner(dataset, arguments.storage)
        with runner.pipeline.store.lock(f"cells-{slug(dataset.name)}", wait=True):
            for name, (entry, experiment) in dataset.entries.items():
                if runner.known(name):
                    continue
                if experiment.mixture and (reason := _absent(experiment, arguments.storage)):
                    left_out[f"{dataset.name}: {name}"] = reason
                    print(f"{dataset.name}, {name} is left out: {reason}", flush=True)
                    continue
                print(f"\n{dataset.name}: {name}", flush=True)
                cell = runner.measure(entry, experiment)
                dataset.cells.write(dataset.name, dataset.key(name), slug(name), cell)
            for claim in grid.claims:
                runner.compare(claim.first, claim.second)
    return left_out


def _absent(experiment: Experiment, storage: str) -> str:
    """Why raw data are not at hand, in one line; empty if they are."""
    try:
        Pipeline(experiment, storage, watched="recommender").check()
    except RsllmError as error:
        return str(error).splitlines()[-1].strip()
    return ""


@dataclass(frozen=True)
class Runner:
    """It trains and judges the entries of one data set."""

    dataset: Dataset
    storage: str

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of the data set's experiment."""
        return Pipeline(self.dataset.experiment, self.storage)

    @cached_property
    def data(self) -> PreparedData:
        """The prepared data set."""
        return PreparedData.open(self.pipeline.prepare())

    def known(self, name: str) -> Cell | None:
        """An entry's cell, if it is on file and what would be measured now: of these data and this
        code and, of a language model, of this backbone and in this precision."""
        cell = self.dataset.cell(name)
        if cell is None or cell["data"]["key"] != self.data.path.name:
            return None
        same = cell.get("code") == CODE
        if same and cell["backbone"]:
            same = cell["backbone"] == self.pipeline.fingerprint
            same = same and cell["layout"]["precision"] == self.pipeline.layout.precision
        return cell if same else None

    def measure(self, entry: Entry, experiment: Experiment) -> Cell:
        """Train an entry on all seeds and judge it on the test rows."""
        methods, cost = self._trained(entry, experiment)
        methods = generate_on_first_seed_only([judged(method, entry.judged) for method in methods])
        outcomes = self._evaluate(methods, "test")
        fusion: dict[str, Any] = {}
        names = [outcome.name for outcome in outcomes]
        if entry.fused:
            outcomes, fusion = self._fused(methods, outcomes, experiment)
        draws = held_out(self.data, "test", experiment.evaluation.test_rows)
        (row,) = method_table({entry.name: outcomes}, draws, self.data)
        named = {"entry": row.pop("name"), "ranking_seconds": row.pop("seconds")}
        return {
            **named,
            "key": self.dataset.key(entry.name),
            "kind": entry.kind,
            "judged": dict(entry.judged),
            "seeds": list(self.dataset.seeds) if entry.seeded else [],
            "data": self._described(),
            "backbone": self.pipeline.fingerprint if entry.is_language_model else "",
            **row,
            "gamma": experiment.stage2.loss.gamma if entry.kind == "tuned" else None,
            **cost,
            "predictions": {"scores": names, **fusion},
            "experiment": to_dict(experiment),
            "layout": to_dict(self.pipeline.layout),
            "code": CODE,
            "provenance": provenance(),
        }

    def compare(self, first: str, second: str) -> None:
        """Put a comparison on file, unless it is, or the predictions are not at hand."""
        one, other = self.known(first), self.known(second)
        if not one or not other or self.dataset.cells.comparison(self.dataset.name, one, other):
            return
        vectors = [self._vectors(cell["predictions"]) for cell in (one, other)]
        if not all(vectors):
            return
        tests = paired_tests(vectors[0], vectors[1], compared_metrics())
        seeds = [one["seeds"], other["seeds"]]
        found = {"n": one["n"], "seeds": seeds, "tests": tests, "provenance": provenance()}
        self.dataset.cells.write_comparison(self.dataset.name, one, other, found)

    def _trained(self, entry: Entry, experiment: Experiment) -> tuple[list[Method], dict[str, Any]]:
        """The methods of an entry, one a seed, and what their training took."""
        if not entry.seeded:
            scorer: Any = "likelihood" if entry.is_language_model else entry.kind
            return [Method(name=entry.name, scorer=scorer, experiment=experiment)], {}
        watched: Any = entry.trained_by
        seeds = self.dataset.seeds
        (trained,) = train({entry.name: {}}, experiment, seeds, self.storage, watched).values()
        return [_method(entry, pipeline) for pipeline in trained], training_cost(trained)

    def _fused(
        self, methods: Sequence[Method], outcomes: Sequence[Outcome], experiment: Experiment
    ) -> tuple[list[Outcome], dict[str, Any]]:
        """Joined with the recommender of the slots; its evaluation and the weight."""
        fitted = Pipeline(experiment, self.storage).fit()
        alone = _fitted("recommender", methods[0].experiment, fitted)
        limit = experiment.evaluation.test_rows
        both = [m.under({"evaluation.validation_rows": limit}) for m in (alone, *methods)]
        single, *validated = self._evaluate(both, "validation")
        weight, curve = choose_weight(validated, single, held_out(self.data, "validation", limit))
        (beside,) = self._evaluate([alone], "test")
        chosen = {"weight": weight, "validation MRR": asdict(curve[weight])}
        joint = [combine_outcomes(outcome, beside, weight) for outcome in outcomes]
        return joint, {"recommender": beside.name, **chosen}

    def _evaluate(self, methods: Sequence[Method], split: Any) -> list[Outcome]:
        speaks, pipeline = any(method.is_language_model for method in methods), self.pipeline
        return evaluate(
            methods,
            split,
            data=self.data.path,
            backbone=pipeline.backbone if speaks else "",
            fingerprint=pipeline.fingerprint if speaks else "",
            layout=pipeline.layout,
            store=pipeline.store,
        )

    def _vectors(self, predictions: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The metrics [S, R] of stored predictions; none if one of them is not in the store."""
        scores = stored_scores(predictions, self.pipeline.store)
        draws = held_out(self.data, "test", scores[0].shape[1]) if scores else []
        return stack_seeds(scores, draws)

    def _described(self) -> dict[str, Any]:
        facts = self.data.facts
        counts = {n: v for n, v in facts["counts"].items() if isinstance(v, int | float | str)}
        return {
            "set": self.dataset.name,
            "source": self.data.config["source"],
            "split": self.data.config["split"],
            "key": self.data.path.name,
            "raw": facts["inputs"]["raw"],
            "counts": counts,
        }


def stored_scores(predictions: Mapping[str, Any], store: Store) -> list[np.ndarray]:
    """A cell's scores [D, R, C], one a seed; empty if one of them is not in the store."""
    names = [*predictions["scores"], *filter(None, [predictions.get("recommender")])]
    folders = [store.root / "evaluation" / Path(name).name for name in names]
    if not all(map(store.holds, folders)):
        return []
    scores = [read_scores(folder)["scores"] for folder in folders]
    if "recommender" not in predictions:
        return scores
    alone_DRC = scores.pop()
    return [combine_scores(own_DRC, alone_DRC, predictions["weight"]) for own_DRC in scores]


def _fitted(name: str, experiment: Experiment, folder: Path, scorer: Any = "recommender") -> Method:
    return Method(name=name, scorer=scorer, experiment=experiment, artifact=str(folder))


def _method(entry: Entry, pipeline: Pipeline) -> Method:
    """What a pipeline trained; a recommender's seed stands where a language model's does."""
    experiment, folder = pipeline.experiment, pipeline.run()
    if entry.is_language_model:
        return language_method(entry.name, experiment, experiment.stage2, folder)
    seed = {"stage2.seed": getattr(experiment, STAGES[pipeline.watched].section).seed}
    return _fitted(entry.name, replace_in(experiment, seed), folder, entry.kind)


def judged(method: Method, changes: Mapping[str, Any]) -> Method:
    """A method under what holds in evaluation alone: settings by paths, and fields of `Method`."""
    paths = {name: value for name, value in changes.items() if "." in name}
    fields = {name: value for name, value in changes.items() if "." not in name}
    return replace(method.under(paths), **fields)


def training_cost(trained: Sequence[Pipeline]) -> dict[str, Any]:
    """Means over the seeds, stage 1 included; of the last stage, how many numbers it trained, and
    what each seed's end gives reason to doubt."""

    def spent(folder: Path) -> dict[str, float]:
        end: dict[str, float] = read_json(folder / "training.json")["curve"][-1]
        return end | {"tokens": end["tokens_per_second"] * end["seconds"]}

    ends = [[spent(folder) for folder in stages(pipeline)] for pipeline in trained]
    kinds = ("samples", "seconds", "tokens")
    cost = {n: round(fmean(sum(end[n] for end in each) for each in ends), 1) for n in kinds}
    files = stages(trained[0])[-1].glob("*.safetensors")
    cost["trainable"] = sum(map(_numbers, (f for f in files if f.name != ITEM_TABLE)))
    return cost | {"doubts": [warnings(each[-1]) for each in ends]}


def _numbers(path: Path) -> int:
    """How many numbers of a file were trained; vectors of items are made from them, or given."""
    with safe_open(path, "np") as file:
        names = [name for name in file.keys() if name not in (KEYS, TITLES)]  # noqa: SIM118
        return sum(prod(file.get_slice(name).get_shape()) for name in names)
