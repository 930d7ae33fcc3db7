"""Lists for everybody: files, what is left after a kill, and mistakes."""

from __future__ import annotations

import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_data import TITLES

from rsllm import plan
from rsllm.cli import main
from rsllm.errors import ConfigError, DataError
from rsllm.flags import recommend_command
from rsllm.recommend import users
from rsllm.recommend.items import UnknownItem
from rsllm.recommend.load import open_ranker
from rsllm.recommend.ranker import Filter, Ranker
from rsllm.recommend.users import COLUMNS, Task, make_lists, read_histories, read_lists, write_out
from rsllm.store.artifacts import Store


def task(ranker: Ranker, **how: Any) -> tuple[Task, Ranker]:
    own = replace(ranker, by="catalogue")
    return Task.of(own, 3, precision="fp32", **how), own


def test_everybody_gets_a_list_of_what_is_new(
    made: tuple[Store, dict[str, str]], history_model: Ranker
) -> None:
    table = read_lists(make_lists(*task(history_model), made[0]))
    events = history_model.data.events()
    assert table.columns.tolist() == COLUMNS
    assert table["user_id"].unique().tolist() == history_model.data.user_ids()
    assert table["rank"].tolist() == [1, 2, 3] * 22
    for number, user in enumerate(history_model.data.user_ids()):
        seen = {TITLES[item] for item in events.item_E[events.user_E == number]}
        own = table[table["user_id"] == user]
        assert not seen & set(own["title"])
        alone = replace(history_model, by="catalogue").recommend(users=[user], k=3)
        assert own["item_id"].tolist() == alone["item_id"].tolist()
        np.testing.assert_allclose(own["score"], alone["score"], atol=2e-6)


@pytest.mark.ray
def test_killed_and_given_again_the_bytes_are_the_same(
    made: tuple[Store, dict[str, str]],
    history_model: Ranker,
    tmp_path: Path,
    ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One actor, two of them, and a part that an earlier process left behind."""
    monkeypatch.setattr(users, "USERS_A_PART", 8)
    written = []
    for name, workers in {"one": 1, "two": 2}.items():
        store = Store.open(tmp_path / name)
        for kind in ("data", "recommender", "stage-2"):
            shutil.copytree(made[0].root / kind, store.root / kind)
        asked, ranker = task(history_model)
        left = store.root / "running" / f"{users.KIND}-{store.path(users.KIND, asked.plain).name}"
        if written:
            left.mkdir(parents=True)
            (left / "part-00001.parquet").write_bytes(written[0][1])
            (left / "part-00002.half").write_bytes(b"half a file")
        lists = make_lists(asked, ranker, store, workers)
        written.append([path.read_bytes() for path in sorted(lists.glob("part-*"))])
        assert not left.exists()
    assert len(written[0]) == 3
    assert written[0] == written[1]


def test_files_for_a_user(
    made: tuple[Store, dict[str, str]], history_model: Ranker, tmp_path: Path
) -> None:
    lists = make_lists(*task(history_model), made[0])
    whole = read_lists(lists)
    write_out(lists, str(tmp_path / "lists.csv"))
    write_out(lists, str(tmp_path / "lists.parquet"))
    write_out(lists, str(tmp_path / "folder"))
    write_out(lists, str(tmp_path / "folder"))  # the same again
    write_out(lists, f"file://{tmp_path}/uri")
    for name in ("folder", "uri"):
        pd.testing.assert_frame_equal(read_lists(tmp_path / name), whole)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "lists.parquet"), whole)
    read = pd.read_csv(tmp_path / "lists.csv", dtype={"item_id": str, "user_id": str})
    pd.testing.assert_frame_equal(read, whole, check_dtype=False)
    assert (tmp_path / "lists.csv.manifest.json").exists()
    other = make_lists(*task(history_model, allowed=Filter(include_seen=True)), made[0])
    for name in ("lists.csv", "folder"):
        with pytest.raises(ConfigError, match="is there already"):
            write_out(other, str(tmp_path / name))


def test_histories_of_a_file(history_model: Ranker, tmp_path: Path) -> None:
    items = history_model.items
    rows = {"user_id": ["b", "a", "b"], "title": [TITLES[2], TITLES[5], TITLES[1]]}
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "plain.csv", index=False)
    found = read_histories(tmp_path / "plain.csv", items)
    assert {user: past.tolist() for user, past in found.items()} == {"b": [2, 1], "a": [5]}
    table.assign(timestamp=[9, 1, 3]).to_parquet(tmp_path / "timed.parquet")
    timed = read_histories(tmp_path / "timed.parquet", items)
    assert timed["b"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("user,item_id\nu,i1\n", DataError, "has the columns user, item_id; histories need"),
        ("user_id,item_id\nu,i1\nu,\n", DataError, "row 2: user_id or item_id is empty"),
        ("user_id,item_id\nu,i1\nu,i77\n", UnknownItem, "row 2: no item is called 'i77'"),
        ("user_id,title\nNA,null\n", UnknownItem, "row 1: no item is called 'null'"),
        ("user_id,item_id,timestamp\nu,i1,soon\n", DataError, "row 1: timestamp 'soon'"),
        ("", DataError, "cannot be read"),
    ],
)
def test_histories_with_mistakes(
    history_model: Ranker, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "histories.csv"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_histories(path, history_model.items)


def test_unknown_items_are_counted_where_they_are_left_out(
    history_model: Ranker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "histories.csv"
    path.write_text("user_id,item_id\nu,i1\nu,i77\nv,i78\n")
    found = read_histories(path, history_model.items, skip=True)
    assert {user: past.tolist() for user, past in found.items()} == {"u": [1]}
    assert "2 rows name items" in capsys.readouterr().out


def test_the_verb(
    made: tuple[Store, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, names = made
    storage = ["--storage", store.location]
    asked = ["--history", "Last Matrix", "--history", "i9", "--k", "2", "--ranker", "catalogue"]
    assert main(["recommend", names["history"], *storage, *asked]) == 0
    said = capsys.readouterr().out
    assert f"{names['history']} ranks by catalogue (as asked)" in said
    expected = open_ranker(names["history"], store.location, "auto")[0]
    table = replace(expected, by="catalogue").recommend(["Last Matrix", "i9"], k=2)
    assert all(title in said for title in table["title"])
    assert (
        main(["recommend", names["recommender"], *storage, "--out", str(tmp_path / "a.csv")]) == 0
    )
    assert pd.read_csv(tmp_path / "a.csv")["user_id"].nunique() == 22
    assert main(["recommend", names["history"], *storage, "--history", "Last Matricks"]) == 2
    assert "'Last Matrix'" in capsys.readouterr().err
    assert main(["recommend", "stage-2/ffff", *storage]) == 2
    assert main(["recommend", f"data/{'0' * 16}", *storage]) == 2


def test_what_cannot_be_loaded(made: tuple[Store, dict[str, str]], tmp_path: Path) -> None:
    store, names = made
    data = next((store.root / "data").iterdir())
    with pytest.raises(ConfigError, match="ranks nothing; load a recommender or a stage-1"):
        open_ranker(data, store.location, "fp32")
    with pytest.raises(ConfigError, match="means nothing in"):
        open_ranker("stage-2/ffff", store.location, "fp32")
    assert open_ranker(store.root / names["history"], tmp_path, "fp32")[0].name == names["history"]


def test_a_plan_says_what_lists_will_need(
    made: tuple[Store, dict[str, str]],
    history_model: Ranker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(users, "USERS_A_PART", 8)
    monkeypatch.setattr(plan, "ROWS_AT_ONCE", 3)
    store = Store.open(tmp_path / "store")
    shutil.copytree(made[0].root, store.root, dirs_exist_ok=True)
    shutil.rmtree(store.root / "deployed", ignore_errors=True)
    before = {path.name for path in store.root.iterdir()}
    name, said = made[1]["history"], ["plan", "--recommend", made[1]["history"]]
    assert main([*said, "--storage", store.location]) == 0
    first, header, _, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{name}: lists of 10")
    assert header.split("  ")[-1].strip() == "MiB written"
    rows = {row[0]: [float(value) for value in row[1:]] for row in map(str.split, lines)}
    assert list(rows) == history_model.rankers
    parts = [8, 8, 6]  # of 22 users
    passes = sum(math.ceil(part / 3) for part in parts)
    assert [row[:2] for row in rows.values()] == [[22, 3], [22, passes], [22, passes]]
    assert all(seconds >= 0 < gibibytes for _, _, seconds, gibibytes, _ in rows.values())
    asked = len(history_model.data.rows("validation"))
    assert last.startswith(f"choosing what ranks: {asked} validation users")
    assert {path.name for path in store.root.iterdir()} == before, "a plan leaves nothing behind"

    monkeypatch.undo()
    assert main([*said, "--storage", store.location]) == 0
    planned = float(capsys.readouterr().out.splitlines()[-2].split()[-1])
    own = replace(history_model, by="fused")
    (part,) = make_lists(Task.of(own, 10), own, store).glob("*.parquet")
    assert abs(planned - part.stat().st_size / 2**20) < 1e-3
    for words in (["--set", "seed=1"], ["--cluster", "x.yaml"], ["--backbone", "x"]):
        assert main([*said, *words]) == 2
        assert "give --storage alone beside --recommend" in capsys.readouterr().err


@pytest.mark.parametrize("activated", [True, False])
def test_the_command_that_is_shown_works_as_it_is(
    made: tuple[Store, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    activated: bool,
) -> None:
    """With the store in the usual place and elsewhere, in an activated environment and without."""
    program = tmp_path / "bin" / "rsllm"
    program.parent.mkdir()
    program.touch(mode=0o700)
    monkeypatch.setenv("PATH", str(program.parent) if activated else "")
    for number, usual in enumerate([True, False]):
        here = tmp_path / f"here-{number}"
        store = Store.open(here / ("rsllm-store" if usual else "else where"))
        shutil.copytree(made[0].root, store.root, dirs_exist_ok=True)
        monkeypatch.chdir(here)
        command = recommend_command(store.root / made[1]["recommender"], store.location)
        found, *words = shlex.split(command)
        assert ("--storage" in words) != usual
        assert found == "rsllm" if activated else Path(found).is_file()
        assert main(words) == 0
        assert pd.read_csv("lists.csv")["user_id"].nunique() == 22
