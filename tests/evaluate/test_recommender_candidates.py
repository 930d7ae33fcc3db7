"""Candidates that a recommender ranks highest, against a loop over rows and items."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ranked_data import EXPERIMENT, loaded, naive_best, ranked_data
from small_data import NUM_CANDIDATES, small_data

from rsllm.config import DataConfig
from rsllm.config.plain import replace_in
from rsllm.data.audit import audit
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM
from rsllm.errors import DataError
from rsllm.evaluate import recommender_candidates as candidates
from rsllm.evaluate.compare import per_user
from rsllm.evaluate.rank import (
    CATALOGUE,
    EXPECTED,
    candidate_sets,
    catalogue_metrics,
    catalogue_scores,
    named,
    rank_catalogue,
    target_places,
)
from rsllm.pipeline import Pipeline, StageInputs
from rsllm.recommenders.base import Recommender
from rsllm.store.artifacts import MANIFEST, Store, sha256
from rsllm.study.external import export_candidates, judge

FOLDS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Uniform candidates, in a store."""
    store = Store.open(tmp_path_factory.mktemp("ranked") / "store")
    return small_data(store.root / "data" / "small", num_train=30, num_held_out=40)


@pytest.fixture(scope="module")
def ranked(data: PreparedData) -> PreparedData:
    """The same under cross-fitted recommenders."""
    return ranked_data(data, FOLDS)


def recommenders(data: PreparedData) -> list[Recommender]:
    folder = data.path.parents[1] / "recommender"
    return [loaded(folder / f"ranked-{number}") for number in range(1 + FOLDS)]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_sets_are_the_first_titles_of_the_whole_recommender(
    ranked: PreparedData, split: str
) -> None:
    rows = ranked.rows(split)  # type: ignore[arg-type]
    whole = recommenders(ranked)[0]
    for row, found in enumerate(candidate_sets(rows).tolist()):
        best = naive_best(whole, rows, row, ranked)[: NUM_CANDIDATES - 1]
        assert sorted(found) == sorted([*best, int(rows.target_R[row])])
    places = np.bincount(target_places(rows), minlength=NUM_CANDIDATES)
    assert places.min() > 0, "the target stands anywhere"
    with pytest.raises(DataError, match="draws 0 to 0, not 1"):
        ranked.rows(split, 1)  # type: ignore[arg-type]


def test_training_pools_are_ranked_by_the_recommender_that_has_not_seen_the_user(
    ranked: PreparedData,
) -> None:
    rows, models = ranked.rows("train"), recommenders(ranked)
    assert rows.candidates_RC is None
    assert rows.pool_RP is not None
    sizes, others = set(), 0
    for row, pool in enumerate(rows.pool_RP.tolist()):
        user = int(rows.user_R[row])
        size = candidates.POOL * NUM_CANDIDATES
        kept = {item for item in pool if item != NO_ITEM}
        by_model = [set(naive_best(model, rows, row, ranked)[:size]) for model in models]
        assert kept == by_model[1 + user % FOLDS]
        sizes.add(len(kept))
        others += kept != by_model[1 + (user + 1) % FOLDS]
    assert max(sizes) == size > min(sizes) >= NUM_CANDIDATES - 1, "some rows have fewer titles left"
    assert others > 0


def test_without_folds_the_whole_recommender_ranks_all_rows_and_says_so(
    data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ranked_data(data, name="alone")
    assert capsys.readouterr().out.count("recommender.folds=2") == 1
    rows, whole = alone.rows("train"), loaded(data.path.parents[1] / "recommender" / "alone-0")
    assert rows.pool_RP is not None
    for row in range(0, len(rows), 7):
        size = candidates.POOL * NUM_CANDIDATES
        best = set(naive_best(whole, rows, row, alone)[:size])
        assert set(rows.pool_RP[row].tolist()) - {NO_ITEM} == best


def test_blocks_of_rows_decide_nothing_and_all_else_stays(
    data: PreparedData, ranked: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashes(folder: Path) -> dict[str, str]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        return {path.relative_to(folder).as_posix(): sha256(path) for path in files}

    def sets(found: PreparedData) -> list[list[list[int]]]:
        held_out = [candidate_sets(found.rows(split)) for split in ("validation", "test")]
        pool_RP = found.rows("train").pool_RP
        assert pool_RP is not None
        return [part.tolist() for part in (*held_out, pool_RP)]

    monkeypatch.setattr(candidates, "CELLS_AT_ONCE", 3 * len(data.titles))
    again = ranked_data(data, FOLDS, name="again")
    assert sets(again) == sets(ranked)
    before, after = hashes(data.path), hashes(ranked.path)
    made = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert {name.split("/")[0] for name in made} == {"candidates", "pools"}


def test_the_recommender_hits_as_it_does_over_the_whole_catalogue(ranked: PreparedData) -> None:
    """The target beside what is ranked highest is as far from the top as among all titles."""
    rows, whole = ranked.rows("test"), recommenders(ranked)[0]
    found = rank_catalogue(lambda some: catalogue_scores(whole, some), [rows], ranked)
    assert named(found, EXPECTED) == {}, "a closed form is of uniform draws"
    of_sets, of_all = per_user(found["scores"], [rows]), named(found, CATALOGUE)
    np.testing.assert_array_equal(of_sets["HR@1"], of_all["HR@1"])
    assert of_sets["HR@1"].mean() < of_sets["HR@5"].mean() == 1.0
    judged = catalogue_metrics(lambda some: catalogue_scores(whole, some), rows, ranked)
    np.testing.assert_array_equal(judged["HR@1"], of_all["HR@1"])


def test_the_pipeline_ranks_once_and_shares_all_else(
    data: PreparedData, ranked: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, done = data.path.parents[1], list[Any]()

    def fitted(self: Pipeline, stage: str, inputs: StageInputs) -> Path:
        assert inputs.key["data"] == data.path.name
        fold, _ = inputs.key.get("fold", (-1, FOLDS))
        done.append(fold)
        return storage / "recommender" / f"ranked-{fold + 1}"

    def prepared(self: Pipeline, config: DataConfig) -> Path:
        assert config.candidates == "uniform"
        return data.path

    def here(self: Pipeline, work: Callable[[], None]) -> None:
        done.append("ranked")
        work()

    monkeypatch.setattr(Pipeline, "_train", fitted)
    monkeypatch.setattr(Pipeline, "_prepare", prepared)
    monkeypatch.setattr(Pipeline, "_remote", here)
    plain = replace_in(EXPERIMENT, {"recommender.folds": FOLDS})
    experiment = replace_in(plain, {"data.candidates": "recommender"})
    pipelines = [Pipeline(which, storage) for which in (plain, experiment, experiment)]
    uniform, path, again = (pipeline.prepare() for pipeline in pipelines)
    assert uniform == data.path != path == again
    assert done == [-1, 0, 1, "ranked", -1, 0, 1], "ranked by all of them, once"
    assert pipelines[0]._recommender == pipelines[1]._recommender
    made = PreparedData.open(path)
    for split in ("validation", "test"):
        expected_RC = candidate_sets(ranked.rows(split))
        np.testing.assert_array_equal(candidate_sets(made.rows(split)), expected_RC)
    first_RP, second_RP = (found.rows("train").pool_RP for found in (made, ranked))
    np.testing.assert_array_equal(first_RP, second_RP)
    assert audit(path)[-1].check == "recommender ranked-0"


def test_another_system_is_judged_on_these_sets(ranked: PreparedData, tmp_path: Path) -> None:
    table = pd.read_csv(export_candidates(ranked, "test", tmp_path / "sets.csv"))
    rows, whole = ranked.rows("test"), recommenders(ranked)[0]
    scores_RI = catalogue_scores(whole, rows)
    place = {user: row for row, user in enumerate(np.array(ranked.user_ids())[rows.user_R])}
    item = {name: number for number, name in enumerate(ranked.source_ids)}
    pairs = zip(table["user_id"], table["item_id"], strict=True)
    table["score"] = [scores_RI[place[u], item[i]] for u, i in pairs]
    scored = tmp_path / "mine.csv"
    table[["draw", "user_id", "item_id", "score"]].to_csv(scored, index=False)
    (mine,) = judge(scored, ranked, "test", Store.open(ranked.path.parents[1]))["methods"]
    best = [naive_best(whole, rows, row, ranked)[0] for row in range(len(rows))]
    first = [
        scores_RI[row, rows.target_R[row]] > scores_RI[row, item] for row, item in enumerate(best)
    ]
    assert mine["metrics"]["HR@1"]["value"] == pytest.approx(np.mean(first))


def test_the_audit_says_what_holds_of_such_sets(data: PreparedData, ranked: PreparedData) -> None:
    findings = {finding.check: finding for finding in audit(ranked.path)}
    assert [f.check for f in findings.values() if f.verdict == "leak"] == []
    for split in ("validation", "test"):
        assert findings[f"{split} candidates"].verdict == "ok"
        assert findings[f"{split} places"].verdict == "ok"
        found, rows = findings[f"{split} negatives"], ranked.rows(split)
        counts_I, popular = data.catalogue.counts_I, []
        for row, chosen in enumerate(candidate_sets(rows).tolist()):
            target = int(rows.target_R[row])
            popular += [counts_I[item] > counts_I[target] for item in chosen if item != target]
        assert found.verdict == "warning"
        assert f"{np.mean(popular):.0%} are more popular than the target" in found.evidence
    assert findings["recommender ranked-0"].verdict == "ok", "it trained on these very rows"


def test_a_recommender_that_trained_on_held_out_rows_is_a_leak(data: PreparedData) -> None:
    small_data(data.path.with_name("more"), num_train=70, num_held_out=20)
    leaky = ranked_data(data, name="leaky", fitted_on="more")
    leaks = [finding.check for finding in audit(leaky.path) if finding.verdict == "leak"]
    assert leaks == ["recommender leaky-0"]
