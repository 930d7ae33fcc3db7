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
from rsllm.evaluate.fuse import combine_outcomes, combine_scores
from rsllm.evaluate.groups import target_groups
from rsllm.evaluate.metrics import compared_metrics
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import Method, read_scores
from rsllm.model.tuned import KEYS, TITLES
from rsllm.pipeline import Pipeline
from rsllm.prompts.templates import wording
from rsllm.recommenders.embeddings import FILE as ITEM_TABLE
from rsllm.store.artifacts import Store, provenance, read_json
from rsllm.store.versions import deciding_results
from rsllm.study.claims import paired_by_target, paired_tests
from rsllm.study.grid import Dataset, Grid, GridArguments, datasets
from rsllm.study.results import Cell, Entry, slug
from rsllm.study.variants import (
    choose_fusion,
    generate_on_first_seed_only,
    judge,
    language_method,
    stages,
    train,
)
from rsllm.train.health import warnings

CODE = {**deciding_results(), "wording": wording()}
"""What decides a cell beside its settings, its data and its backbone."""


def fill(grid: Grid, arguments: GridArguments) -> dict[str, str]:
    """Compute all cells and comparisons that are not on file.

    Returns:
        What was left out, data sets and entries ("DATA: ENTRY"), each with its reason.
    """
    left_out = {}

    def missing(name: str, experiment: Experiment) -> bool:
        """Whether raw data are not at hand, which is noted in one line."""
        try:
            Pipeline(experiment, arguments.storage, watched="recommender").check()
        except RsllmError as error:
            left_out[name] = reason = str(error).splitlines()[-1].strip()
            print(f"{name} is left out: {reason}", flush=True)
            return True
        return False

    for dataset in datasets(grid, arguments):
        if dataset.name in grid.data and missing(dataset.name, dataset.experiment):
            continue
        runner = Runner(dataset, arguments.storage)
        with runner.pipeline.store.lock(f"cells-{slug(dataset.name)}", wait=True):
            for name, (entry, experiment) in dataset.entries.items():
                place = f"{dataset.name}: {name}"
                if runner.known(name) or (experiment.mixture and missing(place, experiment)):
                    continue
                print(f"\n{place}", flush=True)
                cell = runner.measure(entry, experiment)
                dataset.cells.write(dataset.name, dataset.key(name), slug(name), cell)
            for claim in grid.claims:
                runner.compare(claim.first, claim.second)
    return left_out


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
        methods, cost = self._train(entry, experiment)
        paths = {name: value for name, value in entry.judged.items() if "." in name}
        fields = {name: value for name, value in entry.judged.items() if "." not in name}
        changed = [replace(method.under(paths), **fields) for method in methods]
        methods = generate_on_first_seed_only(changed)
        outcomes = judge(methods, "test", self.pipeline, self.data)
        predictions: dict[str, Any] = {"scores": [outcome.name for outcome in outcomes]}
        if entry.fused:
            fitted = str(Pipeline(experiment, self.storage).fit())
            slots = methods[0].experiment
            alone = Method(
                name="recommender", scorer="recommender", experiment=slots, artifact=fitted
            )
            _, weight, curve = choose_fusion(alone, methods, self.pipeline, self.data)
            (beside,) = judge([alone], "test", self.pipeline, self.data)
            outcomes = [combine_outcomes(outcome, beside, weight) for outcome in outcomes]
            predictions |= {"recommender": beside.name, "weight": weight}
            predictions["validation MRR"] = asdict(curve[weight])
        draws = held_out(self.data, "test", experiment.evaluation.test_rows)
        (row,) = method_table({entry.name: outcomes}, draws, self.data)
        named = {"entry": row.pop("name"), "ranking_seconds": row.pop("seconds")}
        facts = self.data.facts
        counts = {n: v for n, v in facts["counts"].items() if isinstance(v, int | float | str)}
        return {
            **named,
            "key": self.dataset.key(entry.name),
            "kind": entry.kind,
            "judged": dict(entry.judged),
            "seeds": list(self.dataset.seeds) if entry.trained_by else [],
            "data": {
                "set": self.dataset.name,
                "source": self.data.config["source"],
                "split": self.data.config["split"],
                "key": self.data.path.name,
                "raw": facts["inputs"]["raw"],
                "counts": counts,
            },
            "backbone": self.pipeline.fingerprint if entry.is_language_model else "",
            **row,
            "gamma": experiment.stage2.loss.gamma if entry.kind == "tuned" else None,
            **cost,
            "predictions": predictions,
            "experiment": to_dict(experiment),
            "layout": to_dict(self.pipeline.layout),
            "code": CODE,
            "provenance": provenance(),
        }

    def compare(self, first: str, second: str) -> None:
        """Put a comparison on file, unless it is, or the predictions are not at hand."""
        one, other = self.known(first), self.known(second)
        if not one or not other:
            return
        filed = self.dataset.cells.comparison(self.dataset.name, one, other)
        if filed and "by_target" in filed:  # which the first files lack
            return
        scores = [stored_scores(cell["predictions"], self.pipeline.store) for cell in (one, other)]
        if not all(scores):
            return
        draws = held_out(self.data, "test", scores[0][0].shape[1])
        vectors = [stack_seeds(each, draws) for each in scores]
        tests = paired_tests(vectors[0], vectors[1], compared_metrics())
        seeds = [one["seeds"], other["seeds"]]
        found = {"n": one["n"], "seeds": seeds, "tests": tests, "provenance": provenance()}
        groups = target_groups(draws[0], self.data)
        found["by_target"] = paired_by_target(vectors[0], vectors[1], groups)
        self.dataset.cells.write_comparison(self.dataset.name, one, other, found)

    def _train(self, entry: Entry, experiment: Experiment) -> tuple[list[Method], dict[str, Any]]:
        """The methods of an entry, one a seed, and what their training took."""
        scorer: Any = "likelihood" if entry.is_language_model else entry.kind
        watched: Any = entry.trained_by
        if not watched:
            return [Method(name=entry.name, scorer=scorer, experiment=experiment)], {}
        seeds = self.dataset.seeds
        (trained,) = train({entry.name: {}}, experiment, seeds, self.storage, watched).values()
        methods = []
        for pipeline, seed in zip(trained, seeds, strict=True):
            own, folder = pipeline.experiment, pipeline.run()
            if entry.is_language_model:
                methods.append(language_method(entry.name, own, own.stage2, folder))
                continue
            own = replace_in(own, {"stage2.seed": seed})  # where later seeds are told apart
            method = Method(name=entry.name, scorer=scorer, experiment=own, artifact=str(folder))
            methods.append(method)
        return methods, training_cost(trained)


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


def training_cost(trained: Sequence[Pipeline]) -> dict[str, Any]:
    """Means over the seeds, stage 1 included; of the last stage, how many numbers it trained, and
    what each seed's end gives reason to doubt."""

    folders = [stages(pipeline) for pipeline in trained]
    ends = [[read_json(f / "training.json")["curve"][-1] for f in own] for own in folders]
    spent = {
        "samples": [sum(end["samples"] for end in own) for own in ends],
        "seconds": [sum(end["seconds"] for end in own) for own in ends],
        "tokens": [sum(end["tokens_per_second"] * end["seconds"] for end in own) for own in ends],
    }
    cost: dict[str, Any] = {name: round(fmean(values), 1) for name, values in spent.items()}
    cost["trainable"] = 0
    for path in folders[0][-1].glob("*.safetensors"):
        if path.name != ITEM_TABLE:
            with safe_open(path, "np") as file:
                # Vectors of items are made from trained numbers, or were trained elsewhere.
                for name in set(file.keys()) - {KEYS, TITLES}:
                    cost["trainable"] += prod(file.get_slice(name).get_shape())
    return cost | {"doubts": [warnings(own[-1]) for own in ends]}
