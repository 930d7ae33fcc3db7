"""From raw files to a model that is trained and judged on what its recommender ranks highest."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pandas as pd
import pytest
from ranked_data import naive_best

from rsllm.cli import main
from rsllm.config import Experiment
from rsllm.config.plain import from_dict
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM
from rsllm.data.synthetic import write_world
from rsllm.evaluate.rank import candidate_sets, catalogue_scores, held_out
from rsllm.evaluate.recommender_candidates import POOL
from rsllm.recommenders import load
from rsllm.recommenders.base import Recommender
from rsllm.store.artifacts import manifest
from rsllm.train.recommender import RecommenderTask

pytestmark = pytest.mark.ray
FOLDS = 2
SETTINGS = {
    "data.candidates": "recommender",
    "recommender.folds": FOLDS,
    "stage1.samples": 0,
    "evaluation.generation_rows": -1,
    "evaluation.candidate_orders": 0,
}


def test_raw_files_become_a_model_that_reranks_what_its_recommender_names(
    tiny_llm: Path, tmp_path: Path, trained_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    write_world(raw, num_users=60, num_items=70, length=9, noise=0.3, text_share=0.5, seed=0)
    words = [*jobs.SMALL, "--backbone", str(tiny_llm), "--storage", str(store), "--data", str(raw)]
    words += [word for path, value in SETTINGS.items() for word in ("--set", f"{path}={value}")]
    said = jobs.run_here("experiments/train_rsllm.py", *words, "--only", "RSLLM + pointer")
    (path,) = (store / "studies").glob("*/results.json")
    results = json.loads(path.read_text())
    experiment = from_dict(Experiment, results["experiment"])

    def of(kind: str) -> dict[Path, Any]:
        """The inputs of each artifact, by its folder."""
        folders = [file.parent for file in jobs.artifacts(store, kind)]
        return {folder: manifest(folder)["inputs"] for folder in folders}

    prepared = of("data")
    drawn, ranked = sorted(prepared, key=lambda folder: "pool" in prepared[folder])
    tuned = of("stage-2")
    assert {inputs["data"] for inputs in tuned.values()} == {ranked.name}
    data, before = PreparedData.open(ranked), PreparedData.open(drawn)
    items, window, size = len(data.titles), experiment.data.window, experiment.data.num_candidates

    fitted = of("recommender")
    assert {inputs["data"] for inputs in fitted.values()} == {drawn.name}
    models: dict[int, Recommender] = {}
    for folder, inputs in fitted.items():
        fold, _ = inputs.get("fold", (-1, FOLDS))
        models[fold] = load(folder, experiment.recommender, items, window)
    assert sorted(models) == [-1, 0, 1]

    rows = data.rows("train")
    assert rows.pool_RP is not None
    from_others = 0
    for fold in range(FOLDS):
        learned_from = {*RecommenderTask(experiment, before, None, fold).rows.user_R.tolist()}
        for row in np.flatnonzero(rows.user_R % FOLDS == fold)[:40]:
            assert rows.user_R[row] not in learned_from
            kept = {item for item in rows.pool_RP[row].tolist() if item != NO_ITEM}
            best = {
                number: set(naive_best(m, rows, row, data)[: POOL * size])
                for number, m in models.items()
            }
            assert kept == best[fold]
            from_others += kept != best[1 - fold]
    assert from_others > 0, "it matters which one names them"

    (tested,) = held_out(data, "test", experiment.evaluation.test_rows)
    scores_RI = catalogue_scores(models[-1], tested)
    first = []
    for row, found in enumerate(candidate_sets(tested).tolist()):
        target = int(tested.target_R[row])
        others = naive_best(models[-1], tested, row, data)[: size - 1]
        assert sorted(found) == sorted([*others, target])
        first.append(all(scores_RI[row, target] > scores_RI[row, item] for item in others))
    methods = {method["name"]: method for method in results["methods"]}
    assert methods["recommender"]["metrics"]["HR@1"]["value"] == pytest.approx(np.mean(first))
    assert methods["RSLLM + pointer"]["n"] == len(tested) == 6
    assert any("what the recommender ranks highest" in note for note in results["notes"])

    (shown,) = re.findall(r"^a list for every user: (.+)$", said, re.MULTILINE)
    assert shown in html.unescape(path.with_name("report.html").read_text())
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(shown)[1:], "--ranker", "pointer"]) == 0
    lists = pd.read_csv("lists.csv")
    assert lists["user_id"].nunique() == 60
    assert f"stage-2/{next(iter(tuned)).name}" == lists["model"].unique().item()
