"""The confirm stage: its parts on made-up curves, and a real study recomputed from its files."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import numpy as np
import pytest
from small_study import PLAIN, SETTINGS, WINNER

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.errors import ConfigError
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import read_scores
from rsllm.evaluate.statistics import mean_interval, paired
from rsllm.pipeline import Pipeline
from rsllm.store.artifacts import manifest
from rsllm.study import study as study_module
from rsllm.study import variants as confirm
from rsllm.study.search import TrialRecord
from rsllm.study.study import Study
from rsllm.study.variants import (
    best_trials,
    compare_training,
    confirm_best,
    confirm_table,
    learning_curve,
    train,
)

SEEDS, CHOOSING = [1000, 1001], [1002, 1003]
"""Under which methods are compared, and under which the winner was chosen before."""


def trial(number: int, score: float, alpha: float, state: str = "finished") -> TrialRecord:
    curve = [{"score": score, "samples": 4}] if state != "failed" else []
    return TrialRecord(number=number, state=state, overrides={"alpha": alpha}, curve=curve)


def test_candidates_are_the_best_distinct_finished_trials() -> None:
    records = [
        trial(0, 0.3, alpha=0.1),
        trial(1, 0.5, alpha=0.2, state="stopped"),
        trial(2, 0.4, alpha=0.3),
        trial(3, 0.4, alpha=0.3),
        replace(trial(4, 0.9, alpha=0.4), state="failed"),
        trial(5, 0.0, alpha=0.5, state="failed"),
    ]
    assert list(best_trials(records, 2)) == ["trial 2", "trial 0"]
    assert list(best_trials(records, 9)) == ["trial 2", "trial 0", "trial 1"]
    assert list(best_trials(records[-2:], 9)) == ["trial 4"], "it at least began"


def fake(folder: Path, seed: int, points: list[tuple[float, float, float]]) -> Any:
    """What stands for a trained pipeline: (samples, seconds, MRR) per validation of stage 2."""
    folder.mkdir()
    curve = [{"samples": n, "seconds": s, "MRR": mrr, "score": mrr} for n, s, mrr in points]
    (folder / "training.json").write_text(json.dumps({"curve": curve}))
    stages = SimpleNamespace(stage1=SimpleNamespace(steps=0), stage2=SimpleNamespace(seed=seed))
    return SimpleNamespace(experiment=stages, watched="stage2", run=lambda: folder)


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, list[Any]]:
    return {
        "fast": [
            fake(tmp_path / "f0", 1000, [(8, 10, 0.2), (16, 20, 0.4)]),
            fake(tmp_path / "f1", 1001, [(8, 10, 0.3), (16, 20, 0.5)]),
        ],
        "slow": [
            fake(tmp_path / "s0", 1000, [(8, 15, 0.3), (16, 31, 0.7)]),
            fake(tmp_path / "s1", 1001, [(8, 15, 0.3), (16, 29, 0.6)]),
        ],
        "late": [
            fake(tmp_path / "l0", 1000, [(16, 40, 0.9)]),
            fake(tmp_path / "l1", 1001, [(16, 40, 0.9)]),
        ],
    }


def test_recommenders_are_trained_anew_under_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(Pipeline, "layout", SimpleNamespace(concurrent_trials=1))

    def run(pipeline: Pipeline) -> Path:
        score = pipeline.experiment.recommender.dropout
        runs.append((pipeline.run_name, pipeline.experiment.recommender.seed))
        curve = [{"score": score, "samples": 8, "seconds": 1}]
        (tmp_path / "training.json").write_text(json.dumps({"curve": curve}))
        return tmp_path

    monkeypatch.setattr(Pipeline, "run", run)
    records = [
        TrialRecord(
            number=number,
            state="finished",
            overrides={"recommender.dropout": number / 10},
            curve=[{"score": 0.5 - number / 10, "samples": 8}],
        )
        for number in range(3)
    ]
    where = (Experiment(), range(7, 9), tmp_path, "recommender")
    table, ranked = confirm_best(records, 2, *where)  # type: ignore[arg-type]
    assert list(ranked) == [row["name"] for row in table]
    assert set(ranked) == {"trial 0", "trial 1"}
    assert [row["seeds"] for row in table] == [[7, 8]] * 2
    names = dict.fromkeys(runs)
    assert [seed for _, seed in names] == [7, 8] * 2
    assert [re.sub("-[0-9a-f]{6}$", "", name) for name, _ in names] == [
        f"trial.{number}-seed-{seed}" for number in (0, 1) for seed in (7, 8)
    ]


def simulated(monkeypatch: pytest.MonkeyPatch, draw: int, top: int) -> tuple[list[float], bool]:
    """The means of the winner, its equal twin and those it beat, all of equal quality; whether
    the seeds that chose took part."""

    def score(experiment: Experiment) -> float:
        parts = [draw, experiment.stage2.seed, round(1e6 * experiment.stage2.loss.alpha)]
        return float(np.random.default_rng(parts).normal(0.3, 0.02))

    def made(variants: Any, base: Experiment, seeds: range, *where: Any) -> dict[str, list[Any]]:
        asked.append((list(variants), list(seeds)))
        return {
            name: [
                SimpleNamespace(experiment=replace_in(base, {**own, "stage2.seed": seed}))
                for seed in seeds
            ]
            for name, own in variants.items()
        }

    def table(trained: dict[str, list[Any]], searched: Any) -> list[dict[str, Any]]:
        means = {n: np.mean([score(p.experiment) for p in group]) for n, group in trained.items()}
        return [{"name": name, "mean": mean} for name, mean in means.items()]

    asked: list[tuple[list[str], list[int]]] = []
    monkeypatch.setattr(confirm, "train", made)
    monkeypatch.setattr(study_module, "train", made)
    monkeypatch.setattr(confirm, "confirm_table", table)
    monkeypatch.setattr(study_module, "trial_rows", list)
    records = [
        TrialRecord(
            number=number,
            state="finished",
            overrides={"stage2.loss.alpha": 0.1 * (number + 1)},
            curve=[{"score": 0.3, "samples": 8}],
        )
        for number in range(3)
    ]
    asked_for = Study(
        title="?",
        question="?",
        base=Experiment(),
        twins=lambda best: {"best": dict(best), "twin": {"stage2.loss.alpha": 0.7}},
        num_seeds=2,
        confirm_top=top,
    )
    search: Any = SimpleNamespace(run=lambda trials: records)
    _, twins, _ = study_module._train(asked_for, search, "nowhere")
    (_, chose), (names, compared) = asked
    assert names == list(twins) == ["best", "twin", *names[2:]]
    assert len(names) == 1 + top
    assert compared == list(asked_for.seeds)
    means = [float(np.mean([score(p.experiment) for p in group])) for group in twins.values()]
    return means, bool(set(chose) & set(compared))


def test_a_winner_does_not_lead_its_equals_by_the_luck_it_was_chosen_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three that are equal the best mean of two seeds is 0.012 above the truth."""
    found = [simulated(monkeypatch, draw, top=3) for draw in range(300)]
    assert not any(shared for _, shared in found)
    means = np.array([means for means, _ in found])
    leads = means[:, :1] - means[:, 1:]
    assert abs(leads.mean()) < 3 * leads.std() / np.sqrt(len(leads)) < 0.006
    assert (leads > 0).mean() == pytest.approx(0.5, abs=0.06)


def test_one_that_nobody_was_chosen_over_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulated(monkeypatch, 0, top=1)[1]


def test_confirm_table_has_every_seed_beside_the_search(trained: dict[str, list[Any]]) -> None:
    found = confirm_table({"fast": trained["fast"]}, {"fast": trial(3, 0.6, alpha=0.1)})
    (row,) = found
    assert row.pop("mean") == pytest.approx(0.45)
    assert row == {
        "name": "fast",
        "seeds": SEEDS,
        "scores": [0.4, 0.5],
        "search_score": 0.6,
        "search_samples": 4,
        "samples": 16,
    }


def test_equal_seconds_are_read_off_mean_curves(trained: dict[str, list[Any]]) -> None:
    assert learning_curve(trained["slow"])[1] == pytest.approx(
        {"samples": 16, "seconds": 30, "MRR": 0.65, "score": 0.65}
    )
    file = trained["slow"][1].run() / "training.json"
    curve = json.loads(file.read_text())["curve"]
    curve[1]["health/slot_scale"] = 1.0
    file.write_text(json.dumps({"curve": curve}))
    assert set(learning_curve(trained["slow"])[1]) == {"samples", "seconds", "MRR", "score"}
    pair = {"first": "slow", "second": "fast", "metric": "MRR"}
    found = compare_training(trained, pair)
    assert (found["samples"], found["seconds"]) == ([16, 16], [30, 20])
    equal = found["equal_seconds"]
    assert equal["seconds"] == 20
    # A third of the way from 0.3 after 15 s to 0.65 after 30 s, against the end of the faster one.
    assert equal["values"] == pytest.approx([0.3 + 0.35 / 3, 0.45])
    assert found["ahead"] == "fast"
    again = compare_training(trained, {**pair, "second": "slow"})
    assert again["ahead"] is None, "nobody is ahead of itself"
    assert set(compare_training(trained, {**pair, "first": "late"})) == {"samples", "seconds"}
    assert compare_training(trained, {**pair, "second": "recommender"}) == {}


@pytest.mark.ray
def test_a_mistake_is_told_as_such_where_trainings_run_side_by_side(
    tmp_path: Path, random_llm: Path, ray_cluster: str
) -> None:
    settings = {"data.source": "movies", "compute.threads": 1, "backbone.source": str(random_llm)}
    base = replace_in(Experiment(), settings)
    with pytest.raises(ConfigError, match=r"^no asset is called 'movies'") as raised:
        train({"a": {}, "b": {}}, base, range(2), tmp_path)
    assert type(raised.value) is ConfigError


class Finished:
    """A study that ran to its end, and what it left."""

    def __init__(self, output: str, store: Path) -> None:
        self.output, self.store = output, store
        (self.file,) = store.glob("studies/*/results.json")
        self.results: dict[str, Any] = json.loads(self.file.read_text())

    def artifacts(self, kind: str) -> dict[Path, int]:
        found = self.store.glob(f"{kind}/[0-9a-f]*/manifest.json")
        return {path.parent: path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def words(
    tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory, trained_here: None
) -> list[str]:
    script = Path(__file__).with_name("small_study.py")
    store = tmp_path_factory.mktemp("confirm") / "store"
    return [str(script), str(tiny_llm), str(store)]


@pytest.fixture(scope="module")
def study(words: list[str]) -> Finished:
    """The search's own trainings run under Ray Tune, all after it in this process."""
    return Finished(jobs.run_here(*words), Path(words[-1]))


@pytest.fixture(scope="module")
def trainings(study: Finished) -> dict[tuple[float, int], Path]:
    """The artifacts of stage 2 by alpha and seed."""
    found = {}
    for folder in study.artifacts("stage-2"):
        stage = manifest(folder)["inputs"]["stage"]
        found[stage["loss"]["alpha"], stage["seed"]] = folder
    return found


def metrics(study: Finished, split: Any, artifact: str, **inputs: Any) -> np.ndarray:
    """Reciprocal ranks and hits [2, users], means over draws, from scores in the store."""
    (data,) = study.artifacts("data")
    (folder,) = [
        folder
        for folder in study.artifacts("evaluation")
        if {"split": split, "artifact": artifact, "shuffle_items": False, **inputs}.items()
        <= manifest(folder)["inputs"].items()
    ]
    scores_DRC = read_scores(folder)["scores"]
    draws = held_out(PreparedData.open(data), split, scores_DRC.shape[1])
    assert len(draws) == len(scores_DRC) == SETTINGS["data.num_draws"]
    ranks_DR = [
        [
            sum(score >= scores[list(candidates).index(target)] for score in scores)
            for scores, candidates, target in zip(
                scores_RC, rows.candidates_RC, rows.target_R, strict=True
            )
        ]
        for scores_RC, rows in zip(scores_DRC, draws, strict=True)
    ]
    return np.array([1 / np.array(ranks_DR), np.array(ranks_DR) == 1.0]).mean(axis=1)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_configuration_is_trained_on_the_same_seeds(
    study: Finished, trainings: dict[tuple[float, int], Path]
) -> None:
    trials = study.results["trials"]
    tried = {t["parameters"]["alpha"]: t["state"] for t in trials}
    finished = {(alpha, 0) for alpha, state in tried.items() if state == "finished"}
    again = {(alpha, seed) for alpha in (*tried, 0.0) for seed in SEEDS}
    again |= {(alpha, seed) for alpha in tried for seed in CHOOSING}
    # A trial that is stopped may have reached its end before it heard of it.
    assert finished | again <= set(trainings) <= {(alpha, 0) for alpha in tried} | again
    assert len(study.artifacts("stage-2")) == len(trainings)
    assert len(study.artifacts("recommender")) == len(study.artifacts("data")) == 1
    assert study.results["seeds"] == SEEDS


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_best_mean_on_validation_wins(
    study: Finished, trainings: dict[tuple[float, int], Path]
) -> None:
    trials = {f"trial {t['number']}": t for t in study.results["trials"]}
    confirm = study.results["confirm"]
    assert {row["name"] for row in confirm} == set(trials)
    for row in confirm:
        alpha = trials[row["name"]]["parameters"]["alpha"]
        curves = [
            json.loads((trainings[alpha, seed] / "training.json").read_text())["curve"]
            for seed in CHOOSING
        ]
        assert row["scores"] == [curve[-1]["MRR"] for curve in curves]
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 2)
        assert row["search_score"] == trials[row["name"]]["MRR"]
    best = max(confirm, key=lambda row: float(row["mean"]))
    assert study.results["search"]["best"] == trials[best["name"]]["number"]
    for seed, score in zip(CHOOSING, best["scores"], strict=True):
        folder = trainings[trials[best["name"]]["parameters"]["alpha"], seed]
        assert (folder / "manifest.json").exists()
        assert 0 < score <= 1


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_numbers_equal_those_recomputed_from_stored_scores(
    study: Finished, trainings: dict[tuple[float, int], Path]
) -> None:
    results = study.results
    best = next(t for t in results["trials"] if t["number"] == results["search"]["best"])
    alphas = {WINNER: best["parameters"]["alpha"], PLAIN: 0.0}
    (recommender,) = study.artifacts("recommender")
    vectors = {
        name: np.stack([metrics(study, "test", trainings[a, seed].name) for seed in SEEDS], axis=1)
        for name, a in alphas.items()
    }
    vectors["recommender"] = metrics(study, "test", recommender.name)[:, None]
    vectors["zero-shot"] = metrics(study, "test", "", scorer="likelihood")[:, None]
    methods = {method["name"]: method for method in results["methods"]}
    for name, values_MSR in vectors.items():
        for metric, values_SR in zip(("MRR", "HR@1"), values_MSR, strict=True):
            found = methods[name]["metrics"][metric]
            assert found["value"] == pytest.approx(values_SR.mean())
            assert found == pytest.approx(vars_of(mean_interval(values_SR)))
            by_seed = methods[name]["by_seed"]
            assert list(by_seed) == ([str(s) for s in SEEDS] if name in alphas else [])
            means = [by_seed[seed][metric]["value"] for seed in by_seed]
            assert means == pytest.approx(values_SR.mean(axis=1)[: len(means)].tolist())
    assert Counter(pair["metric"] for pair in results["pairs"]) == {"MRR": 7, "HR@1": 7}
    for pair in results["pairs"]:
        if {pair["first"], pair["second"]} <= vectors.keys():
            row = ("MRR", "HR@1").index(pair["metric"])
            first_SR, second_SR = vectors[pair["first"]][row], vectors[pair["second"]][row]
            difference = (first_SR.mean(axis=0) - second_SR.mean(axis=0)).mean()
            assert pair["difference"]["value"] == pytest.approx(difference)
            assert pair["p"] == pytest.approx(paired(first_SR, second_SR).p)
    validated = [metrics(study, "validation", trainings[alphas[WINNER], s].name) for s in SEEDS]
    assert np.shape(validated) == (2, 2, SETTINGS["evaluation.test_rows"]), "not as in training"


def vars_of(estimate: Any) -> dict[str, float]:
    return {name: getattr(estimate, name) for name in ("value", "low", "high", "n")}


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_outcome_shows_costs_and_opens_the_test_split_once(study: Finished) -> None:
    assert study.output.count("opening the test split") == 1
    assert study.output.index("twins of trial") < study.output.index("opening the test split")
    assert "Validation MRR on fresh seeds" in study.output
    pairs = {(pair["first"], pair["second"]): pair for pair in study.results["pairs"]}
    pair = pairs[WINNER, PLAIN]
    assert pair["samples"] == [16, 16]
    best = study.results["search"]["best"]
    assert pairs[WINNER, f"trial {1 - best}"]["samples"] == [16, 16], "beside the one it beat"
    assert min(pair["seconds"]) > 0
    assert "seconds" not in pairs[WINNER, "recommender"]
    answered = {m["name"] for m in study.results["methods"] if m["generation"]}
    assert {WINNER, PLAIN, "zero-shot"} <= answered


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_same_study_again_trains_and_changes_nothing(study: Finished, words: list[str]) -> None:
    kinds = ("stage-2", "evaluation", "recommender", "data")
    before = [study.artifacts(kind) for kind in kinds]
    again = Finished(jobs.run_here(*words), study.store)
    assert [again.artifacts(kind) for kind in kinds] == before
    for results in (study.results, again.results):
        del results["provenance"], results["budget"]
    assert again.results == study.results
