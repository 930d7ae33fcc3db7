"""The pipeline end to end: counts of the paper, determinism, every switch, damage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from raw_folders import write_csv, write_dat, write_grouplens, write_lines, write_recbole
from scipy import stats

from rsllm.config import DataConfig, TableConfig
from rsllm.config.plain import replace_in
from rsllm.data import tables
from rsllm.data.prepare import prepare
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import SPLITS, split_sizes
from rsllm.data.synthetic import write_world
from rsllm.errors import CheckpointError, ConfigError, DataError
from rsllm.store.artifacts import Store, sha256

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
MIN_RATING, MIN_HISTORY, WINDOW = 3, 3, 10


def _no_fetch(name: str) -> Path:
    raise ConfigError(f"no data set {name}")


def _hashes(folder: Path) -> dict[str, str]:
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    facts = json.loads((folder / "counts.json").read_text())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    return hashes | {"counts.json": str(facts | {"source": "", "changes": ""})}


def _lines(seed: int) -> tuple[list[str], dict[str, str]]:
    rng = np.random.default_rng(seed)
    items = {str(n): f"Title {n // 2} (1990)" for n in range(1, 61)}
    lines = [
        f"{user}\t{item}\t{rng.integers(1, 6)}\t{start * 1000 + rng.integers(50)}"
        for user, start in enumerate(rng.permutation(40), start=1)
        for item in rng.permutation(60)[: rng.integers(1, 20)] + 1
    ]
    return lines, items


def _prepared(folder: Path, store: Path, **changes: Any) -> PreparedData:
    config = replace_in(DataConfig(source=str(folder)), changes)
    return PreparedData.open(prepare(config, Store.open(store), _no_fetch))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> PreparedData:
    """The prepared synthetic world."""
    store = Store.open(tmp_path_factory.mktemp("store"))
    return PreparedData.open(prepare(DataConfig(source="synthetic"), store, _no_fetch))


def test_synthetic_world_is_known(world: PreparedData, tmp_path: Path) -> None:
    cycle = write_world(tmp_path, num_users=120, num_items=60, length=16, seed=0) - 1
    following = {int(a): int(b) for a, b in zip(cycle, np.roll(cycle, -1), strict=True)}
    for split in SPLITS:
        rows = world.rows(split)
        for i, target in enumerate(rows.target_R):
            walk = [*rows.histories(i).tolist(), int(target)]
            assert [following[a] for a in walk[:-1]] == walk[1:]
    assert len(set(world.titles)) == 60
    assert [len(set(world.rows(split).user_R)) for split in SPLITS] == [96, 12, 12]


def test_the_keys_of_known_data_stay(world: PreparedData, tmp_path: Path) -> None:
    """What was prepared by earlier builds is found; a table's key says all that reads it."""
    assert world.path.name == "44b645012b363efe"
    assert world.config["split"] == "user"


def test_rows_candidates_and_order(world: PreparedData) -> None:
    users = [set(world.rows(split).user_R.tolist()) for split in SPLITS]
    assert sum(map(len, users)) == len(set().union(*users))
    for split in SPLITS:
        rows = world.rows(split)
        assert (np.lexsort((rows.position_R, rows.user_R)) == np.arange(len(rows))).all()
        if split == "train":
            assert rows.candidates_RC is None
            continue
        assert rows.candidates_RC is not None
        assert rows.candidates_RC.shape == (12, 20)
        assert ((rows.candidates_RC == rows.target_R[:, None]).sum(axis=1) == 1).all()


def test_files_do_not_depend_on_chunks_files_layout_or_line_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, items = _lines(seed=1)
    found = []
    for number, write in enumerate((write_grouplens, write_recbole, write_dat, write_csv)):
        shuffled = [lines[i] for i in np.random.default_rng(number).permutation(len(lines))]
        monkeypatch.setattr(tables, "CHUNK_BYTES", 10_000 // (1 + 3 * number))
        folder = write(tmp_path / str(number), shuffled, items)
        found.append(_prepared(folder, tmp_path / "store", num_draws=2))
    for pieces in (1, 2, 7):
        folder = tmp_path / f"{pieces} files"
        rows = [line.replace("\t", ",") for line in lines]
        for part in range(pieces):
            header = "user,item,stars,at"
            write_lines(folder / f"{part}.csv", [header, *rows[part::pieces]])
        titles = [f"{item},{title}" for item, title in items.items()]
        write_lines(tmp_path / "titles.csv", ["item,title", *titles])
        table = TableConfig(
            user="user",
            item="item",
            time="at",
            rating="stars",
            items=str(tmp_path / "titles.csv"),
            domain="movie",
        )
        found.append(_prepared(folder, tmp_path / "store", num_draws=2, table=table, split="user"))
    hashes = [_hashes(data.path) for data in found]
    for other in hashes[1:4]:
        assert other == hashes[0]
    family = {"counts.json": hashes[0]["counts.json"].replace("'movielens'", "''")}
    for other in hashes[4:]:
        assert other == hashes[0] | family


def _users(lines: list[str]) -> list[dict[int, int]]:
    """Kept items and their times, by user in order of the first one: a plain reading."""
    kept: dict[str, dict[int, int]] = {}
    for user, item, rating, time in (line.split("\t") for line in lines):
        if int(rating) >= MIN_RATING:
            kept.setdefault(user, {})[int(item) - 1] = int(time) * 1000
    return sorted(kept.values(), key=lambda times: min(times.values()))


def _expected_rows(split_rule: str, users: list[dict[int, int]], cuts: Any) -> dict[str, Any]:
    """The (user, position) pairs of each split, from the words of the configuration."""
    bounds = np.cumsum(list(split_sizes(len(users), 0.8).values()))
    found: dict[str, Any] = {split: [] for split in SPLITS}
    for user, times in enumerate(users):
        ordered, length = sorted(times.values()), len(times)
        held: dict[str, int] = {}
        if split_rule == "user":
            split = SPLITS[int(np.searchsorted(bounds, user, "right"))]
            trained = range(length) if split == "train" else range(0)
            held = {} if split == "train" else {split: length - 1}
        elif split_rule == "leave-one-out":
            trained = range(length - 2) if length >= 3 else range(length)
            held = {"validation": length - 2, "test": length - 1} if length >= 3 else {}
        else:
            trained = range(sum(time < cuts[0] for time in ordered))
            for split, low, high in (("validation", *cuts), ("test", cuts[1], 10**12)):
                inside = [p for p, time in enumerate(ordered) if low <= time < high]
                held |= {split: inside[0]} if inside else {}
        found["train"] += [(user, p) for p in trained if p >= MIN_HISTORY]
        for split, position in held.items():
            found[split] += [(user, position)] if position >= MIN_HISTORY else []
    return found


@pytest.mark.parametrize("split_rule", ["user", "leave-one-out", "time"])
def test_every_row_from_a_plain_reading(tmp_path: Path, split_rule: str) -> None:
    """Up to the order of ties; and the accounting adds up."""
    lines, items = _lines(seed=1)
    folder = write_grouplens(tmp_path / "raw", lines, items)
    data = _prepared(folder, tmp_path / "store", split=split_rule, num_shards=3)
    users, counts = _users(lines), data.facts["counts"]
    expected = _expected_rows(split_rule, users, counts["cuts"])
    assert counts["users"] == len(users)
    for split in SPLITS:
        rows = data.rows(split)
        assert list(zip(rows.user_R, rows.position_R, strict=True)) == expected[split]
        for i, (user, position) in enumerate(expected[split]):
            walked = [users[user][item] for item in [*rows.histories(i), rows.target_R[i]]]
            ordered = sorted(users[user].values())
            assert walked == ordered[max(0, position - WINDOW) : position + 1]
            assert rows.time_R[i] == walked[-1]
        seen = counts["rows"][split]
        assert seen["kept"] == len(rows) == seen["seen"] - seen["short_history"]
    if split_rule == "time":
        early = data.rows("train").time_R.max()
        assert early < data.rows("validation").time_R.min()
        assert data.rows("validation").time_R.max() < data.rows("test").time_R.min()
        times = sorted(time for times in users for time in times.values())
        assert sum(time < counts["cuts"][0] for time in times) == pytest.approx(
            0.8 * len(times), abs=0.02 * len(times)
        )
    events = data.events()
    numbered = zip(events.user_E, events.item_E, events.time_E, strict=True)
    assert sorted(numbered) == sorted(
        (u, item, time) for u, times in enumerate(users) for item, time in times.items()
    )


def _trained(data: PreparedData) -> Counter[int]:
    rows = data.rows("train")
    positions = {
        (int(u), int(p)): rows.target_R[i]
        for i, (u, p) in enumerate(zip(rows.user_R, rows.position_R, strict=True))
    }
    for i in range(len(rows)):
        history = rows.histories(i)
        for back, item in enumerate(history[::-1], start=1):
            positions[int(rows.user_R[i]), int(rows.position_R[i]) - back] = item
    return Counter(int(item) for item in positions.values())


def test_counts_of_training_interactions_and_cold_items(tmp_path: Path) -> None:
    lines, items = _lines(seed=3)
    lines = [line for line in lines if line.split("\t")[1] not in ("59", "58")]
    late = [f"77\t{item}\t5\t{99_000 + i}" for i, item in enumerate((1, 2, 3, 59))]
    folder = write_grouplens(tmp_path / "raw", [*lines, *late], items)
    kept = _prepared(folder, tmp_path / "store")
    assert Counter(dict(enumerate(kept.catalogue.counts_I.tolist()))) == _trained(kept) | Counter(
        dict.fromkeys(range(60), 0)
    )
    assert kept.catalogue.counts_I[58] == 0
    assert 58 in kept.rows("test").target_R
    dropped = _prepared(folder, tmp_path / "store", cold_items="drop")
    assert dropped.facts["counts"]["rows"]["test"]["cold_target"] >= 1
    for split in ("validation", "test"):
        rows = dropped.rows(split)  # type: ignore[arg-type]
        assert rows.candidates_RC is not None
        assert (dropped.catalogue.counts_I[rows.candidates_RC] > 0).all()
        assert (
            len(rows)
            == len(kept.rows(split))
            - (  # type: ignore[arg-type]
                dropped.facts["counts"]["rows"][split]["cold_target"]
            )
        )


def test_filters_are_counted(tmp_path: Path) -> None:
    lines, items = _lines(seed=4)
    again = [line for line in lines if line.endswith("7")]
    folder = write_grouplens(tmp_path / "raw", lines + again, items)
    data = _prepared(
        folder,
        tmp_path / "store",
        min_user_events=4,
        min_item_events=3,
        max_history=8,
        num_candidates=5,
    )
    found = data.facts["counts"]["interactions"]
    rated = [line for line in again if int(line.split("\t")[2]) >= MIN_RATING]
    assert (found["read"], found["duplicates"]) == (len(lines) + len(again), len(rated))
    pairs = [(u, i) for u, times in enumerate(_users(lines)) for i in times]
    while True:
        users, held = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        left = [(u, i) for u, i in pairs if users[u] >= 4 and held[i] >= 3]
        if len(left) == len(pairs):
            break
        pairs = left
    assert data.facts["counts"]["items"] == len({i for _, i in pairs})
    assert data.facts["counts"]["users"] == len({u for u, _ in pairs})
    longest = Counter(u for u, _ in pairs)
    assert found["kept"] == sum(min(8, n) for n in longest.values())
    assert found["beyond_max_history"] == sum(max(0, n - 8) for n in longest.values())
    assert max(len(times) for times in data.rows("train").history_RH) == WINDOW
    assert found["read"] == sum(
        found[name]
        for name in ("below_min_rating", "duplicates", "outside_core", "beyond_max_history", "kept")
    )


@pytest.mark.parametrize("sampling", ["uniform", "popularity", "full"])
def test_draws_are_independent_of_each_other(tmp_path: Path, sampling: str) -> None:
    lines, items = _lines(seed=5)
    folder = write_grouplens(tmp_path / "raw", lines, items)
    draws = 1 if sampling == "full" else 3
    data = _prepared(folder, tmp_path / "store", candidates=sampling, num_draws=draws)
    sets = [data.rows("test", draw).candidates_RC for draw in range(draws)]
    for first, second in itertools.combinations(sets, 2):
        assert first is not None
        assert second is not None
        assert (first != second).any(axis=1).all()
    with pytest.raises(DataError, match=f"has draws 0 to {draws - 1}, not {draws}"):
        data.rows("test", draws)


def test_given_splits(tmp_path: Path) -> None:
    rows = [
        f"{user},{item},{time},{split},Film {item}"
        for user, split in enumerate(["train"] * 30 + ["validation", "test"] * 3)
        for time, item in enumerate(np.random.default_rng(user).permutation(60)[:12])
    ]
    header = "user_id,item_id,timestamp,split,title"
    write_lines(tmp_path / "log.csv", [header, *rows])
    table = TableConfig(split="split")
    data = _prepared(tmp_path / "log.csv", tmp_path / "store", table=table, split="given")
    ids = data.user_ids()
    for split, users in (("validation", {30, 32, 34}), ("test", {31, 33, 35})):
        found = data.rows(split)  # type: ignore[arg-type]
        assert {int(ids[u]) for u in found.user_R} == users
        assert (found.position_R == 11).all()
    write_lines(tmp_path / "log.csv", [header, *rows, "0,7,99,test,Film 7"])
    with pytest.raises(DataError, match="user '0' is in several splits"):
        _prepared(tmp_path / "log.csv", tmp_path / "store", table=table, split="given")


def test_rejects_are_kept_beside_the_data(tmp_path: Path) -> None:
    lines, items = _lines(seed=2)
    folder = write_grouplens(tmp_path / "raw", [*lines, "1\t1\t9\t5"], items)
    with pytest.raises(DataError, match=r"1 of .* rows rejected \(1 bad rating\)"):
        _prepared(folder, tmp_path / "store")
    assert not list((tmp_path / "store" / "data").iterdir())
    (listed,) = (tmp_path / "store" / "rejects").iterdir()
    data = _prepared(folder, tmp_path / "store", max_rejected_rows=1)
    (reject,) = map(json.loads, (data.path / "rejects.jsonl").read_text().splitlines())
    assert reject == json.loads(listed.read_text())
    assert reject == {
        "file": "u.data",
        "line": len(lines) + 1,
        "reason": "bad rating",
        "value": "9",
    }
    raw = data.facts["counts"]["raw"]
    assert raw == {"read": len(lines) + 61, "used": len(lines) + 60, "rejected": 1}


def test_other_titles_of_an_item_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, titles = _lines(0)
    rows = [line.split("\t") for line in lines]
    named = [f"{user},{item},{time},{titles[item]}" for user, item, _, time in rows]
    (user, item, _, time), *_ = rows
    named += [f"{user},{item},{time},{title}" for title in ("A", "A", "B")]
    write_lines(tmp_path / "raw" / "log.csv", ["user_id,item_id,timestamp,title", *named])
    data = _prepared(tmp_path / "raw", tmp_path / "store")
    shown = capsys.readouterr().out
    assert ", 2 other titles," in shown
    assert "log.csv is read as --set data.table.user=user_id --set data.table.item=item_id" in shown
    tested = len(data.rows("test"))
    assert data.config["split"] == "leave-one-out"
    assert tested > 30, "of every user with enough items"
    quantiles = stats.norm.ppf((0.975, 0.8)).sum()
    least = float(shown.partition("are told apart by ")[2].split()[0])
    assert least == pytest.approx(quantiles * (0.5 / tested) ** 0.5, rel=0.08)
    assert f"test users       {tested}; methods that disagree" in shown
    assert data.facts["counts"]["other_titles"] == 2
    assert data.titles[data.source_ids.index(item)] == titles[item]


def test_user_mistakes_are_named(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(ConfigError, match="is no file or folder"):
        _prepared(tmp_path / "nowhere", store)
    with pytest.raises(ConfigError, match="no data set movies"):
        _prepared(Path("movies"), store)
    folder = write_grouplens(tmp_path / "few", *_lines(0))
    with pytest.raises(DataError, match=r"31 distinct titles are too few .* need 32; lower"):
        _prepared(folder, store, num_candidates=22)
    with pytest.raises(DataError, match=r"no interaction is left of .* data\.min_rating = 6,"):
        _prepared(folder, store, min_rating=6.0)
    with pytest.raises(DataError, match=r"data\.min_item_events = 50; lower these"):
        _prepared(folder, store, min_item_events=50)
    one = write_grouplens(tmp_path / "one", ["1\t1\t4\t5", "1\t2\t4\t6"], _lines(0)[1])
    with pytest.raises(DataError, match="the train split is empty: of 0 rows"):
        _prepared(one, store)
    (one / "u.data").write_text("")
    with pytest.raises(DataError, match=r"u\.data has no usable row"):
        _prepared(one, store)
    write_lines(tmp_path / "header" / "log.csv", ["user_id,item_id,timestamp,title"])
    with pytest.raises(DataError, match=r"log\.csv has no usable row"):
        _prepared(tmp_path / "header", store)


def test_damage_and_schema_drift_are_found(world: PreparedData, tmp_path: Path) -> None:
    copy = shutil.copytree(world.path, tmp_path / "copy")
    part = copy / "train" / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"part-00001\.parquet was altered"):
        PreparedData.open(copy)
    drifted = pq.read_table(world.path / "train" / "part-00001.parquet")
    drifted = drifted.set_column(3, "target", drifted["target"].cast("int64"))
    pq.write_table(drifted, part)
    data = dataclasses.replace(world, path=copy)
    with pytest.raises(DataError, match=r"another schema \(column target\)"):
        data.rows("train")


def test_movielens_counts(recbole: Path, grouplens: Path, tmp_path: Path) -> None:
    """LLaRA counts 68,388 and 66,126 training rows, one less than its own rule gives."""
    first, second = (_prepared(folder, tmp_path) for folder in (recbole, grouplens))
    assert _hashes(first.path) == _hashes(second.path)
    counts = first.facts["counts"]
    assert counts["interactions"]["kept"] == 82_520
    assert counts["users"] == 943
    train = counts["rows"]["train"]
    assert (train["seen"], train["short_history"], train["kept"]) == (68_389, 2_262, 66_127)
    assert [len(first.rows(split)) for split in SPLITS] == [66_127, 94, 95]


def test_a_second_prepare_changes_nothing(world: PreparedData) -> None:
    before = (world.path / "manifest.json").stat().st_mtime_ns
    store = Store.open(world.path.parent.parent)
    assert prepare(DataConfig(source="synthetic"), store, _no_fetch) == world.path
    assert (world.path / "manifest.json").stat().st_mtime_ns == before


def test_a_uri_gets_the_same_files(
    world: PreparedData, bucket: str, go_to: Callable[[str], None]
) -> None:
    prepare(DataConfig(source="synthetic"), Store.open(bucket), _no_fetch)
    go_to("node-b")
    fetched = prepare(DataConfig(source="synthetic"), Store.open(bucket), _no_fetch)
    assert _hashes(fetched) == _hashes(world.path)


def test_a_uri_needs_cpus_where_the_driver_is(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than wait for ever for room on its node."""
    without = [node | {"Resources": {}} for node in ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: without)
    with pytest.raises(ConfigError, match="Ray has no CPUs; start it with --num-cpus"):
        prepare(DataConfig(source="synthetic"), Store.open(bucket), _no_fetch)
