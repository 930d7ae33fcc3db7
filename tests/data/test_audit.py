"""A laboratory: every known leak is planted, and the audit names it; clean data passes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import NUM_CANDIDATES, TITLES, small_data

from rsllm.data import audit as checks
from rsllm.data.audit import accept, audit, refuse_leaks, table
from rsllm.data.candidates import Sampling, draw_candidates, row_keys
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import (
    Catalogue,
    Events,
    Rows,
)
from rsllm.errors import ConfigError, DataError
from rsllm.store.artifacts import MANIFEST, Store, read_json, seal

Change = Callable[[dict[str, list[Any]]], None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def clean(store: Store) -> Path:
    """Clean data of many users, under its key in a store."""
    return small_data(store.root / "data" / "clean", num_train=300, num_held_out=150).path


def plant(folder: Path, file: str, change: Change) -> None:
    """Change the columns of one file, and seal the folder as if it had been made so."""
    path = folder / file
    found = pq.read_table(path)
    columns = found.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, found.schema), path, write_page_checksum=True)
    reseal(folder)


def reseal(folder: Path, **config: str) -> None:
    facts = {k: v for k, v in read_json(folder / MANIFEST).items() if k != "files"}
    facts["inputs"]["config"].update(config)
    (folder / MANIFEST).unlink()
    seal(folder, facts)


def leaks(path: Path) -> set[str]:
    return {finding.check for finding in audit(path) if finding.verdict == "leak"}


def test_clean_data_passes(clean: Path) -> None:
    findings = audit(clean)
    assert {finding.check for finding in findings if finding.verdict == "leak"} == set()
    refuse_leaks(findings)
    shown = table(findings)
    assert "2 of 24 items share their title" in shown
    assert len(shown.splitlines()) == len(findings) + 2


def test_what_is_meant_can_be_accepted_and_a_fault_cannot(store: Store) -> None:
    course = small_data(store.root / "data" / "course", num_train=300, ordered=True).path
    assert leaks(course) == {"order artefact"}
    accept(course, ["order artefact"])
    accept(course, ["duplicate titles"])
    found = {finding.check: finding.verdict for finding in audit(course)}
    assert (found["order artefact"], found["duplicate titles"]) == ("accepted", "accepted")
    assert found["histories"] == "ok"
    refuse_leaks(audit(course))
    assert PreparedData.open(course).facts["accepted"] == ["duplicate titles", "order artefact"]
    with pytest.raises(ConfigError, match="'histories' is no finding that may be meant; choose of"):
        accept(course, ["histories"])
    with pytest.raises(ConfigError, match="is no artifact"):
        accept(store.root, ["order artefact"])


def test_places_in_a_sequence_are_no_times(store: Store) -> None:
    found = {f.check: f for f in audit(small_data(store.root / "data" / "p", timed=False).path)}
    for check in ("time order", "time ties"):
        assert found[check] == checks.Finding(check, "ok", "no times in this data")


def test_targets_in_their_own_history_are_counted_in_both_splits(clean: Path) -> None:
    def repeat(columns: dict[str, list[Any]]) -> None:
        columns["history"][2][-1] = columns["target"][2]

    plant(clean, "validation.parquet", repeat)
    finding = {finding.check: finding for finding in audit(clean)}["own history"]
    data, items, titles = PreparedData.open(clean), 0, 0
    for split in checks.HELD_OUT:
        rows = data.rows(split)
        for row, target in enumerate(rows.target_R.tolist()):
            past = rows.histories(row).tolist()
            items += target in past
            title = data.titles[target]
            titles += target not in past and title in [data.titles[item] for item in past]
    assert items == 1
    assert finding.verdict == "warning"
    assert finding.evidence == (
        f"{1 / 300:.1%} of held-out targets are in their history,"
        f" {titles / 300:.1%} by another item of the same title (n = 300)"
    )


def test_a_future_item_in_a_history(clean: Path) -> None:
    def future(columns: dict[str, list[Any]]) -> None:
        columns["history"][5][-1] = columns["target"][6]

    plant(clean, "train/part-00000.parquet", future)
    assert leaks(clean) == {"histories"}


def test_a_target_of_another_time(clean: Path) -> None:
    plant(clean, "test.parquet", lambda columns: columns["time"].__setitem__(0, 0))
    assert leaks(clean) == {"histories"}


def test_a_history_cut_short(clean: Path) -> None:
    def cut(columns: dict[str, list[Any]]) -> None:
        columns["history"][5] = columns["history"][5][-1:]

    plant(clean, "train/part-00000.parquet", cut)
    assert leaks(clean) == {"histories"}


def test_a_history_reordered_into_the_future(clean: Path) -> None:
    """The events themselves are out of order: the row agrees with them, time does not."""

    def later(columns: dict[str, list[Any]]) -> None:
        columns["time"][0] += 10**6

    plant(clean, "events/part-00000.parquet", later)
    assert leaks(clean) == {"histories"}


def test_a_held_out_user_in_training(clean: Path) -> None:
    held_out = pq.read_table(clean / "test.parquet").to_pydict()

    def smuggle(columns: dict[str, list[Any]]) -> None:
        for name, values in columns.items():
            values.append(held_out[name][-1])

    plant(clean, "train/part-00001.parquet", smuggle)
    assert leaks(clean) == {"overlap"}


def _reorder(order: Callable[[int, list[int]], list[int]]) -> Change:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["candidates"] = [order(i, row) for i, row in enumerate(columns["candidates"])]

    return change


def test_targets_in_a_telling_place(clean: Path) -> None:
    targets = pq.read_table(clean / "test.parquet")["target"].to_pylist()

    def first(i: int, row: list[int]) -> list[int]:
        return sorted(row, key=lambda item: (item != targets[i], item)) if i % 2 else row

    plant(clean, "candidates/test-0.parquet", _reorder(first))
    assert leaks(clean) == {"test places"}


@pytest.mark.parametrize("draw", [0, 1])
def test_negatives_seeded_by_the_target(store: Store, draw: int) -> None:
    folder = store.root / "data" / "draws"
    data = small_data(folder, num_train=300, num_held_out=150, num_draws=2)
    rows, keys = data.rows("validation"), data.catalogue.title_keys_I

    def seeded(i: int, row: list[int]) -> list[int]:
        target = int(rows.target_R[i])
        rng = np.random.default_rng(target)
        taken = set(keys[[target, *rows.histories(i)]].tolist())
        order = rng.permutation(len(TITLES))
        allowed = [n for n in order if keys[n] not in taken and n in data.catalogue.representatives]
        place = row.index(target)
        drawn = [int(n) for n in allowed[: NUM_CANDIDATES - 1]]
        return [*drawn[:place], target, *drawn[place:]]

    plant(folder, f"candidates/validation-{draw}.parquet", _reorder(seeded))
    assert leaks(folder) == {"validation negatives"}


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("cycle", [False, True])
def test_few_titles_are_no_leak(sampling: Sampling, cycle: bool) -> None:
    """Rows of one target have more titles in common to draw, all the more with equal histories."""
    rng = np.random.default_rng(0)
    num_items, num_rows, window = 60, 1000, 10
    weights_I = 1 / np.arange(1, num_items + 1)
    race_RI = np.log(weights_I) + rng.gumbel(size=(num_rows, num_items))
    walk_RI = (rng.integers(num_items, size=(num_rows, 1)) + np.arange(num_items)) % num_items
    items_RI = (walk_RI if cycle else (-race_RI).argsort(axis=1)).astype(np.int32)
    history_RH, target_R = items_RI[:, :window], items_RI[:, window]
    counts_I = rng.multinomial(1000, weights_I / weights_I.sum())
    catalogue = Catalogue.of([str(item) for item in range(num_items)], counts_I)
    user_R, length_R = np.arange(num_rows, dtype=np.int32), np.full(num_rows, window, np.int32)
    keys_R = row_keys(0, "test", user_R, length_R, 0)
    sets = draw_candidates(keys_R, history_RH, target_R, catalogue, 20, sampling)
    rows = Rows(user_R, length_R, history_RH, length_R, target_R, user_R.astype(np.int64), sets)
    finding = checks._shared_negatives([sets], rows, catalogue, "negatives")
    assert finding.verdict == "ok"
    assert float(finding.evidence.rsplit(" ", 1)[1]) < 4


def test_shared_and_open_titles_agree_with_sets(clean: Path) -> None:
    data = PreparedData.open(clean)
    rows, keys = data.rows("test"), data.catalogue.title_keys_I
    assert rows.candidates_RC is not None
    pairs_2P = np.random.default_rng(0).choice(len(rows), (2, 50), replace=False)
    shared_P, open_P = checks._num_shared([rows.candidates_RC], rows, data.catalogue, pairs_2P)
    for (a, b), shared, still_open in zip(pairs_2P.T, shared_P, open_P, strict=True):
        negatives = [set(rows.candidates_RC[i].tolist()) - {int(rows.target_R[i])} for i in (a, b)]
        assert shared == len(negatives[0] & negatives[1])
        barred = {int(keys[j]) for i in (a, b) for j in (*rows.histories(i), rows.target_R[i])}
        assert still_open == len(set(keys.tolist()) - barred)


@pytest.mark.parametrize("kind", ["equal titles", "no target", "history"])
def test_broken_sets(clean: Path, kind: str) -> None:
    rows = PreparedData.open(clean).rows("test")

    def broken(i: int, row: list[int]) -> list[int]:
        place = row.index(int(rows.target_R[i]))
        if i:
            return row
        if kind == "no target":
            row[place] = row[place - 1]
        elif kind == "history":
            row[place - 1] = int(rows.histories(i)[0])
        else:
            row[place - 1], row[place - 2] = 3, 7
        return row

    plant(clean, "candidates/test-0.parquet", _reorder(broken))
    assert leaks(clean) == {"test candidates"}


def test_two_draws_that_are_one(store: Store) -> None:
    folder = small_data(store.root / "data" / "x", num_held_out=60, num_draws=2).path
    assert leaks(folder) == set()
    shutil.copy(folder / "candidates" / "test-0.parquet", folder / "candidates" / "test-1.parquet")
    reseal(folder)
    assert leaks(folder) == {"test draws"}


def test_a_split_in_time_that_is_none(clean: Path) -> None:
    def early(columns: dict[str, list[Any]]) -> None:
        columns["time"][0] = 0

    plant(clean, "validation.parquet", early)
    reseal(clean, split="time")
    assert leaks(clean) == {"time order", "histories"}


def test_full_sets_of_several_lengths(store: Store) -> None:
    """What pads the shorter ones is no item."""
    folder = store.root / "data" / "full"
    data = small_data(folder, num_train=60, num_held_out=40)
    rows, keys = data.rows("test"), data.catalogue.title_keys_I

    def full(i: int, row: list[int]) -> list[int]:
        seen = set(keys[[*rows.histories(i), rows.target_R[i]]].tolist())
        others = [int(n) for n in data.catalogue.representatives if keys[n] not in seen]
        return [*others[:i], int(rows.target_R[i]), *others[i:]]

    plant(folder, "candidates/test-0.parquet", _reorder(full))
    reseal(folder, candidates="full")
    assert leaks(folder) == set()


def test_rows_in_the_wrong_place_under_leave_one_out(clean: Path) -> None:
    """A validation row of a training user makes later training targets leaks; none is a crash."""
    train = pq.read_table(clean / "train" / "part-00000.parquet").to_pydict()

    def earlier(columns: dict[str, list[Any]]) -> None:
        for name in ("user", "position"):
            columns[name][:2] = [train[name][1]] * 2

    plant(clean, "validation.parquet", earlier)
    plant(clean, "candidates/validation-0.parquet", earlier)
    reseal(clean, split="leave-one-out")
    assert leaks(clean) == {"histories", "overlap"}
    (finding,) = (finding for finding in audit(clean) if finding.check == "overlap")
    assert "5 training targets behind held-out ones" in finding.evidence


def _naive_fixed_share(users: list[list[int]]) -> tuple[int, int]:
    seen: dict[tuple[int, int], list[bool]] = {}
    for items in users:
        distinct = list(dict.fromkeys(items))
        for i, j in itertools.combinations(range(len(distinct)), 2):
            a, b = distinct[i], distinct[j]
            seen.setdefault((min(a, b), max(a, b)), []).append(a < b)
    often = [orders for orders in seen.values() if len(orders) >= 5]
    return sum(len(set(orders)) == 1 for orders in often), len(often)


@pytest.mark.parametrize("ordered", [False, True])
def test_an_order_of_items_instead_of_time(ordered: bool) -> None:
    rng = np.random.default_rng(0)
    users = [rng.integers(0, 30, size=rng.integers(2, 12)).tolist() for _ in range(80)]
    users = [sorted(items) if ordered else items for items in users]
    lengths = [len(items) for items in users]
    events = Events(
        np.repeat(np.arange(80, dtype=np.int32), lengths),
        np.concatenate(users).astype(np.int32),
        np.arange(sum(lengths)),
    )
    finding = checks.order_artefact(events)
    fixed, pairs = _naive_fixed_share(users)
    assert f"({fixed:,} of {pairs:,};" in finding.evidence
    assert finding.verdict == ("leak" if ordered else "ok")


def _artifact(store: Store, kind: str, key: str, **inputs: Any) -> Path:
    folder = store.root / kind / key
    folder.mkdir(parents=True)
    (folder / "weights").write_text(key)
    seal(folder, {"kind": kind, "inputs": inputs})
    return folder


def test_ancestors_that_trained_on_held_out_rows(store: Store, clean: Path) -> None:
    other = small_data(store.root / "data" / "other", num_train=450, num_held_out=75).path
    good = _artifact(store, "recommender", "good", data="clean", recommender={})
    assert leaks(good) == set()
    leaky = _artifact(store, "recommender", "leaky", data=other.name, recommender={})
    text = _artifact(store, "stage-1", "text", data=other.name, mixture=[])
    mixed = _artifact(store, "stage-1", "mixed", data="clean", mixture=[[other.name, 0.5]])
    for start, recommender, found in (
        ("", good, set()),
        ("", leaky, {"recommender leaky"}),
        (text.name, good, {"stage-1 text"}),
        (mixed.name, good, {"stage-1 mixed"}),
    ):
        key = f"run-{start}-{recommender.name}"
        inputs = {"data": "clean", "recommender": recommender.name, "start": start or None}
        run = _artifact(store, "stage-2", key, **inputs)
        assert leaks(run) == found
        judged = _artifact(store, "evaluation", f"of-{key}", data="clean", artifact=key)
        assert leaks(judged) == found
    (good / "weights").write_text("oops")
    assert leaks(good) == {"recommender good"}


def test_ancestors_that_are_gone(store: Store, clean: Path) -> None:
    _artifact(store, "recommender", "orphan", data="gone", recommender={})
    run = _artifact(store, "stage-2", "run", data="clean", recommender="orphan", start="lost")
    found = {finding.check: finding for finding in audit(run)}
    assert found["recommender orphan"].verdict == found["start lost"].verdict == "warning"
    assert "gone cannot be read" in found["recommender orphan"].evidence
    assert "unknown" in found["start lost"].evidence


def test_leaks_and_missing_folders_are_errors(clean: Path, tmp_path: Path) -> None:
    plant(clean, "test.parquet", lambda columns: columns["time"].__setitem__(0, 0))
    with pytest.raises(DataError, match=r"1 of 13 checks found a leak: histories"):
        refuse_leaks(audit(clean))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="is no artifact; name a folder"):
            audit(folder)


def test_an_artifact_may_be_named_from_within(
    store: Store, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _artifact(store, "recommender", "fit", data=clean.name)
    monkeypatch.chdir(run)
    assert audit(Path()) == audit(run)
