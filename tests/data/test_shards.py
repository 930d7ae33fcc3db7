"""The pipeline end to end: counts of the paper, determinism, damage, a known world."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from raw_folders import write_grouplens, write_recbole

from rsllm.config import DataConfig
from rsllm.data.interactions import to_events
from rsllm.data.prepared import PreparedData
from rsllm.data.raw import read
from rsllm.data.sequences import SPLITS, Catalogue, Rows, split_sizes
from rsllm.data.shards import prepare, write_splits
from rsllm.data.synthetic import write_world
from rsllm.errors import CheckpointError, ConfigError, DataError
from rsllm.runs import Store, sha256

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def _no_fetch(name: str) -> Path:
    raise ConfigError(f"no data set {name}")


def _hashes(folder: Path) -> dict[str, str]:
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def _lines(seed: int) -> tuple[list[str], dict[str, str]]:
    rng = np.random.default_rng(seed)
    items = {str(n): f"Title {n // 2} (1990)" for n in range(1, 61)}
    lines = [
        f"{user}\t{item}\t{rng.integers(1, 6)}\t{start * 1000 + rng.integers(50)}"
        for user, start in enumerate(rng.permutation(40), start=1)
        for item in rng.permutation(60)[: rng.integers(1, 20)] + 1
    ]
    return lines, items


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
    assert world.facts["counts"]["users"] == {"train": 96, "validation": 12, "test": 12}


def _check_no_leak(splits: dict[str, Rows]) -> None:
    users = [set(rows.user_R.tolist()) for rows in splits.values()]
    assert sum(map(len, users)) == len(set().union(*users))
    for rows in splits.values():
        order = np.lexsort((rows.position_R, rows.user_R))
        assert (order == np.arange(len(rows))).all()
        same_user = np.diff(rows.user_R) == 0
        assert (np.diff(rows.time_R)[same_user] >= 0).all()


def test_rows_candidates_and_leaks(world: PreparedData) -> None:
    splits = {split: world.rows(split) for split in SPLITS}
    _check_no_leak(splits)
    assert splits["train"].candidates_RC is None
    for split in ("validation", "test"):
        candidates_RC = splits[split].candidates_RC
        assert candidates_RC is not None
        assert candidates_RC.shape == (12, 20)
        assert ((candidates_RC == splits[split].target_R[:, None]).sum(axis=1) == 1).all()
    picked = splits["test"].take(np.array([3, 1]))
    assert picked.user_R.tolist() == splits["test"].user_R[[3, 1]].tolist()


def test_files_do_not_depend_on_blocks_or_row_order(tmp_path: Path) -> None:
    lines, items = _lines(seed=0)
    data = read(write_grouplens(tmp_path / "raw", lines, items), max_rejected_rows=0)
    catalogue = Catalogue.of(data.items["title"].tolist())
    found = []
    for num_blocks in (1, 2, 7):
        table = data.interactions.sample(frac=1, random_state=num_blocks)
        events, _ = to_events(table, data.items, min_rating=3, seed=0)
        shuffled = events.sample(frac=1, random_state=num_blocks)
        folder = tmp_path / str(num_blocks)
        write_splits(shuffled, catalogue, DataConfig(), folder, num_blocks=num_blocks)
        found.append(_hashes(folder))
    assert len(found[0]) == DataConfig().num_shards + 2
    assert found[0] == found[1] == found[2]


def test_files_do_not_depend_on_layout_or_line_order(tmp_path: Path) -> None:
    lines, items = _lines(seed=1)
    store = Store.open(tmp_path / "store")
    folders = (
        write_grouplens(tmp_path / "grouplens", lines, items),
        write_recbole(tmp_path / "recbole", lines[::-1], items),
    )
    first, second = (prepare(DataConfig(source=str(f)), store, _no_fetch) for f in folders)
    assert first != second
    assert _hashes(first) == _hashes(second)
    _check_against_the_words(PreparedData.open(first), lines, items)


def _check_against_the_words(data: PreparedData, lines: list[str], items: dict[str, str]) -> None:
    """Every row, up to the order of ties, from a plain reading of the lines."""
    numbers = {item: number for number, item in enumerate(items)}
    kept: dict[str, dict[int, int]] = {}
    for user, item, rating, time in (line.split("\t") for line in lines):
        if int(rating) >= 3:
            kept.setdefault(user, {})[numbers[item]] = int(time)
    users = sorted(kept.values(), key=lambda times: min(times.values()))
    sizes = split_sizes(len(users), 0.8)
    assert data.facts["counts"]["users"] == sizes
    starts = np.cumsum([0, *sizes.values()])
    for split, start, stop in zip(SPLITS, starts, starts[1:], strict=False):
        lengths = {u: len(users[u]) for u in range(start, stop)}
        expected = [
            (u, position)
            for u, length in lengths.items()
            for position in range(3, length)
            if split == "train" or position == length - 1
        ]
        rows = data.rows(split)
        assert list(zip(rows.user_R, rows.position_R, strict=True)) == expected
        for i, (u, position) in enumerate(expected):
            walked = [users[u][item] for item in [*rows.histories(i), rows.target_R[i]]]
            assert walked == sorted(users[u].values())[max(0, position - 10) : position + 1]
            assert rows.time_R[i] == walked[-1]


def test_rejects_are_kept_beside_the_data(tmp_path: Path) -> None:
    lines, items = _lines(seed=2)
    folder = write_grouplens(tmp_path / "raw", [*lines, "1\t1\t9\t5"], items)
    store = Store.open(tmp_path / "store")
    with pytest.raises(DataError, match=r"1 of .* rows rejected \(1 bad rating\)"):
        prepare(DataConfig(source=str(folder)), store, _no_fetch)
    assert not list((tmp_path / "store" / "data").iterdir())
    path = prepare(DataConfig(source=str(folder), max_rejected_rows=1), store, _no_fetch)
    (reject,) = map(json.loads, (path / "rejects.jsonl").read_text().splitlines())
    assert reject == {"file": "u.data", "line": len(lines) + 1, "reason": "bad rating"}
    raw = PreparedData.open(path).facts["counts"]["raw"]
    assert raw == {"read": len(lines) + 61, "used": len(lines) + 60, "rejected": 1}


def test_user_mistakes_are_named(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    with pytest.raises(ConfigError, match="is no folder"):
        prepare(DataConfig(source=str(tmp_path / "nowhere")), store, _no_fetch)
    with pytest.raises(ConfigError, match="no data set movies"):
        prepare(DataConfig(source="movies"), store, _no_fetch)
    folder = write_grouplens(tmp_path / "few", *_lines(0))
    with pytest.raises(DataError, match=r"31 distinct titles are too few .* need 32; lower"):
        prepare(DataConfig(source=str(folder), num_candidates=22), store, _no_fetch)
    folder = write_grouplens(tmp_path / "raw", ["1\t1\t4\t5", "1\t2\t4\t6"], _lines(0)[1])
    with pytest.raises(DataError, match="the train split is empty: 0 of 0 rows"):
        prepare(DataConfig(source=str(folder)), store, _no_fetch)


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
    store = Store.open(tmp_path)
    paths = [prepare(DataConfig(source=str(f)), store, _no_fetch) for f in (recbole, grouplens)]
    assert _hashes(paths[0]) == _hashes(paths[1])
    data = PreparedData.open(paths[0])
    counts = data.facts["counts"]
    assert counts["interactions"]["kept"] == 82_520
    assert counts["users"] == {"train": 754, "validation": 94, "test": 95}
    assert counts["rows"]["train"] == {"seen": 68_389, "short_history": 2_262, "kept": 66_127}
    assert [len(data.rows(split)) for split in SPLITS] == [66_127, 94, 95]


def test_a_second_prepare_changes_nothing(world: PreparedData) -> None:
    before = (world.path / "manifest.json").stat().st_mtime_ns
    store = Store.open(world.path.parent.parent)
    assert prepare(DataConfig(source="synthetic"), store, _no_fetch) == world.path
    assert (world.path / "manifest.json").stat().st_mtime_ns == before
