"""Scores of another system on our candidate sets, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from small_data import small_data

from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Rows, Split
from rsllm.errors import ConfigError, DataError
from rsllm.evaluate.compare import per_user
from rsllm.evaluate.rank import candidate_scores
from rsllm.report.page import terminal_tables
from rsllm.store.artifacts import Store, commit_dir, write_json
from rsllm.study.external import export_candidates, judge, read_predictions

NUM_ROWS, DRAWS = 12, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("data") / "small"
    return small_data(folder, num_held_out=NUM_ROWS, num_draws=DRAWS)


def exported(data: PreparedData, path: Path) -> pd.DataFrame:
    export_candidates(data, "test", path)
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def scored(data: PreparedData, path: Path, seed: int = 0) -> pd.DataFrame:
    table = exported(data, path)[["draw", "user_id", "item_id"]]
    scores = np.random.default_rng(seed).normal(size=len(table))
    return table.assign(score=scores).sample(frac=1, random_state=1)


def write(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_exported_sets_say_all_but_the_target(
    data: PreparedData, tmp_path: Path, suffix: str
) -> None:
    table = exported(data, tmp_path / f"sets{suffix}")
    assert list(table) == ["draw", "user_id", "history", "item_id", "title"]
    assert len(table) == DRAWS * NUM_ROWS * 5
    rows, users = data.rows("test", 1), data.user_ids()
    for i in range(NUM_ROWS):
        own = table[(table["draw"] == 1) & (table["user_id"] == users[rows.user_R[i]])]
        assert rows.candidates_RC is not None
        assert own["item_id"].tolist() == [f"i{n}" for n in rows.candidates_RC[i]]
        assert own["title"].tolist() == [data.titles[n] for n in rows.candidates_RC[i]]
        past = own["history"].iloc[0]
        past = json.loads(past) if suffix == ".csv" else list(past)
        assert past == [f"i{n}" for n in rows.histories(i)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_scores_find_their_places(data: PreparedData, tmp_path: Path, suffix: str) -> None:
    table = scored(data, tmp_path / "sets.csv")
    found = read_predictions(write(table, tmp_path / f"mine{suffix}"), data, "test")
    assert found.shape == (DRAWS, NUM_ROWS, 5)
    known = {(r.draw, r.user_id, r.item_id): r.score for r in table.itertuples()}
    users = data.user_ids()
    for draw in range(DRAWS):
        rows = data.rows("test", draw)
        assert rows.candidates_RC is not None
        for i, items in enumerate(rows.candidates_RC):
            own = [known[draw, users[rows.user_R[i]], f"i{item}"] for item in items]
            assert found[draw, i].tolist() == own


def test_metrics_are_those_of_the_scores(data: PreparedData, tmp_path: Path) -> None:
    table = scored(data, tmp_path / "sets.csv").round(1)  # with ties
    path = write(table, tmp_path / "mine.csv")
    found = judge(path, data, "test", Store.open(tmp_path / "store"))
    users, hits, reciprocals = data.user_ids(), [], []
    for draw in range(DRAWS):
        rows = data.rows("test", draw)
        for user, target in zip(rows.user_R, rows.target_R, strict=True):
            own = table[(table["draw"] == draw) & (table["user_id"] == users[user])]
            best = own.loc[own["item_id"] == f"i{target}", "score"].item()
            rank = sum(score >= best for score in own["score"])
            hits.append(rank == 1)
            reciprocals.append(1 / rank)
    (mine,) = found["methods"]
    assert (mine["name"], mine["n"], found["draws"], found["pairs"]) == ("mine", NUM_ROWS, 2, [])
    assert mine["metrics"]["HR@1"]["value"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert mine["metrics"]["MRR"]["value"] == pytest.approx(np.mean(reciprocals), abs=1e-12)


class Ragged(PreparedData):
    """The first row has one candidate fewer, as sets of all titles may."""

    def rows(self, split: Split, draw: int = 0) -> Rows:
        rows = super().rows(split, draw)
        assert rows.candidates_RC is not None
        sets_RC = rows.candidates_RC.copy()
        fewer = [item for item in sets_RC[0] if item != rows.target_R[0]][1:]
        sets_RC[0] = [*fewer, rows.target_R[0], NO_ITEM]
        return replace(rows, candidates_RC=sets_RC)


def test_places_without_a_candidate_never_win(data: PreparedData, tmp_path: Path) -> None:
    ragged = Ragged(**vars(data))
    table = exported(ragged, tmp_path / "sets.csv")
    assert len(table) == DRAWS * (NUM_ROWS * 5 - 1)
    path = write(table.assign(score=-1e300), tmp_path / "low.csv")
    scores_DRC = read_predictions(path, ragged, "test")
    assert (scores_DRC[:, 0, 4] < -1e300).all()
    assert (np.delete(scores_DRC, 4, axis=2) == -1e300).all()
    draws = [ragged.rows("test", draw) for draw in range(DRAWS)]
    assert per_user(scores_DRC, draws)["MRR"].tolist() == [1 / 4] + [1 / 5] * (NUM_ROWS - 1)
    some_RI = np.full((NUM_ROWS, len(data.titles)), -1e300)
    assert np.array_equal(candidate_scores(some_RI, draws[0]), scores_DRC[0])


def _changed(table: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    changed = table.astype({column: object})
    changed.iloc[3, changed.columns.get_loc(column)] = value
    return changed


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("score", "high", r"mine\.csv:5 has a score that is no finite number: user_id 'u"),
        ("score", np.inf, r"mine\.csv:5 has a score that is no finite number"),
        ("draw", 2, r"mine\.csv:5 names none of 2 draws"),
        ("draw", 0.5, r"mine\.csv:5 names none of 2 draws"),
        ("draw", 1e300, r"mine\.csv:5 names none of 2 draws"),
        ("user_id", "nobody", r"mine\.csv:5 names a user that the data does not have"),
        ("item_id", "nothing", r"mine\.csv:5 names an item that the data does not have"),
        ("user_id", "u0", r"mine\.csv:5 is none of the test candidates: user_id 'u0'"),
    ],
)
def test_a_wrong_line_is_named(
    data: PreparedData, tmp_path: Path, column: str, value: Any, message: str
) -> None:
    table = _changed(scored(data, tmp_path / "sets.csv"), column, value)
    with pytest.raises(DataError, match=message):
        read_predictions(write(table, tmp_path / "mine.csv"), data, "test")


def test_a_sample_of_the_rows_is_compared_on_the_same_rows(
    data: PreparedData, tmp_path: Path
) -> None:
    """The other system is right on these five rows only, and so is the stored evaluation."""
    store, rows = Store.open(tmp_path / "store"), data.rows("test")
    five = [0, 3, 6, 8, 11]
    users = {data.user_ids()[user] for user in rows.user_R[five]}
    target = {data.user_ids()[u]: f"i{t}" for u, t in zip(rows.user_R, rows.target_R, strict=True)}
    table = scored(data, tmp_path / "sets.csv")
    right = (table["item_id"] == table["user_id"].map(target)) & table["user_id"].isin(users)
    path = write(table.assign(score=right.astype(float)), tmp_path / "mine.csv")
    draws = [data.rows("test", draw).candidates_RC for draw in range(DRAWS)]
    sets = np.stack([sets_RC for sets_RC in draws if sets_RC is not None])
    perfect = (sets == rows.target_R[:, None]).astype(float)[:, five]
    _store_evaluation(store, "a", "oracle", perfect, data=data.path.name, split="test")
    found = judge(path, data, "test", store)
    assert found["methods"][0]["metrics"]["HR@1"]["value"] == 5 / 12
    assert [pair["difference"]["value"] for pair in found["pairs"]] == [0, 0]


def test_sets_must_be_scored_as_a_whole_and_once(data: PreparedData, tmp_path: Path) -> None:
    table = scored(data, tmp_path / "sets.csv")
    twice = pd.concat([table, table.iloc[:1]])
    with pytest.raises(DataError, match=r"mine\.csv:122 repeats a candidate"):
        read_predictions(write(twice, tmp_path / "mine.csv"), data, "test")
    gone = table.sort_values(["draw", "user_id"]).iloc[:7]
    message = r"lacks 7 of 120 test candidates, in 2 sets; first: draw 0, user_id 'u"
    with pytest.raises(DataError, match=message):
        read_predictions(write(table.drop(gone.index), tmp_path / "mine.csv"), data, "test")
    one_draw = table[table["draw"] == 0].drop(columns="draw")
    with pytest.raises(DataError, match=r"lacks 60 of 120 .* in 12 sets; first: draw 1"):
        read_predictions(write(one_draw, tmp_path / "mine.csv"), data, "test")


def test_scores_of_a_spreadsheet_with_semicolons(data: PreparedData, tmp_path: Path) -> None:
    table = scored(data, tmp_path / "sets.csv")
    plain = read_predictions(write(table, tmp_path / "plain.csv"), data, "test")
    table.to_csv(tmp_path / "mine.csv", index=False, sep=";", quoting=1)
    assert np.array_equal(read_predictions(tmp_path / "mine.csv", data, "test"), plain)


def test_files_that_are_none(data: PreparedData, tmp_path: Path) -> None:
    table = scored(data, tmp_path / "sets.csv")
    with pytest.raises(ConfigError, match="there is no file"):
        read_predictions(tmp_path / "nowhere.csv", data, "test")
    with pytest.raises(ConfigError, match=r"is no \.csv, \.tsv or \.parquet file"):
        read_predictions(write(table, tmp_path / "mine.txt"), data, "test")
    with pytest.raises(ConfigError, match=r"has no column 'score'.*\. It needs user_id, item_id"):
        read_predictions(write(table.drop(columns="score"), tmp_path / "a.csv"), data, "test")
    with pytest.raises(DataError, match="has no predictions"):
        read_predictions(write(table.iloc[:0], tmp_path / "b.csv"), data, "test")
    (tmp_path / "c.csv").write_text("user_id,item_id,score\nu1,i1\n")
    with pytest.raises(DataError, match=r"c\.csv:2 is no prediction: wrong column count"):
        read_predictions(tmp_path / "c.csv", data, "test")
    (tmp_path / "c.csv").write_bytes(b"user_id,item_id,score\nAndr\xe9,i1,1\n")
    with pytest.raises(DataError, match=r"c\.csv:2 names a user .*: user_id 'Andr"):
        read_predictions(tmp_path / "c.csv", data, "test")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"d\.parquet is no whole Parquet file"):
        read_predictions(tmp_path / "d.parquet", data, "test")


def _store_evaluation(store: Store, key: str, name: str, scores: Any, **inputs: Any) -> None:
    with commit_dir(store.root / "evaluation" / key, kind="evaluation", inputs=inputs) as folder:
        save_file({"scores": np.ascontiguousarray(scores)}, folder / "scores.safetensors")
        write_json(folder / "answers.json", {"name": name, "answers": None, "seconds": 1.5})


def test_judged_against_what_the_store_holds(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(tmp_path / "store")
    rows = [data.rows("test", draw) for draw in range(DRAWS)]
    sets = np.stack([r.candidates_RC for r in rows if r.candidates_RC is not None])
    perfect = (sets == rows[0].target_R[:, None]).astype(float)
    same = {"data": data.path.name, "split": "test"}
    _store_evaluation(store, "a1", "oracle", perfect, **same)
    _store_evaluation(store, "a2", "five rows", perfect[:, [0, 3, 6, 8, 11]], **same)
    _store_evaluation(store, "a3", "other data", perfect, **same | {"data": "other"})
    table = scored(data, tmp_path / "sets.csv")
    path = write(table.assign(score=0.0), tmp_path / "flat.csv")
    with pytest.raises(ConfigError, match="there is no file"):
        judge(tmp_path / "nowhere.csv", data, "test", store)
    assert capsys.readouterr().out == ""
    found = judge(path, data, "test", store)
    by_name = {method["name"]: method for method in found["methods"]}
    assert {name: method["n"] for name, method in by_name.items()} == {
        "flat": 12,
        "oracle": 12,
        "five rows": 5,
    }
    assert capsys.readouterr().out.splitlines() == ["opening the test split for flat"]
    assert by_name["flat"]["metrics"]["HR@1"]["value"] == 0, "ties count against the target"
    assert by_name["flat"]["metrics"]["MRR"]["value"] == pytest.approx(1 / 5)
    assert by_name["oracle"]["metrics"]["MRR"]["value"] == 1
    assert [(p["first"], p["second"], p["difference"]["n"]) for p in found["pairs"]] == [
        ("flat", "oracle", 12),
        ("flat (on 5 rows)", "five rows", 5),
    ] * 2
    assert found["pairs"][0]["verdict"] == "worse here"
    assert "Methods on the test users" in terminal_tables(found)
