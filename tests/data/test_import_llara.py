"""LLaRA's own files: what they hold, what comes out of them, and what is refused."""

from __future__ import annotations

import pickle
import runpy
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jobs import ROOT

from rsllm.cli import main
from rsllm.config import DataConfig
from rsllm.config.plain import replace_in
from rsllm.data.audit import audit
from rsllm.data.prepare import prepare
from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError, ConfigError, DataError
from rsllm.store.artifacts import Store, manifest

SCRIPT = runpy.run_path(str(ROOT / "experiments" / "import_llara.py"))
import_folder, read_frame = SCRIPT["import_folder"], SCRIPT["read_frame"]
rows, together = SCRIPT["rows"], SCRIPT["together"]


@pytest.fixture(scope="session")
def files(assets: Path | None) -> Path:
    """The folder of LLaRA's folders."""
    folder = assets / "data" / "llara" if assets else None
    if folder is None or not folder.is_dir():
        pytest.skip("no data/llara under RSLLM_TEST_ASSETS")
    return folder


def _prepared(name: str, origin: Path, tmp_path: Path, monkeypatch: Any) -> PreparedData:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    folder = import_folder(name, origin)
    assert import_folder(name, tmp_path / "nowhere") == folder, "once is enough"
    config = replace_in(DataConfig(source=str(folder)), {"split": "given"})
    return PreparedData.open(prepare(config, Store.open(tmp_path / "store"), Path))


def _theirs(path: Path, padding: int) -> Counter[tuple[int, ...]]:
    """LLaRA's rows as it loads them: history of at least three, then the next item."""
    frame = read_frame(path.read_bytes(), path.name)
    columns = (frame["seq"], frame["len_seq"], frame["next"])
    ids = [
        ([i[0] if isinstance(i, tuple) else i for i in s], n, x)
        for s, n, x in zip(*columns, strict=True)
    ]
    plain = [(s[:n], x[0] if isinstance(x, tuple) else x) for s, n, x in ids if n >= 3]
    assert all(padding not in history for history, _ in plain)
    return Counter((*map(int, history), int(following)) for history, following in plain)


def _ours(data: PreparedData, split: Any) -> Counter[tuple[int, ...]]:
    found, ids = data.rows(split), [int(item) for item in data.source_ids]
    return Counter(
        tuple(ids[item] for item in [*found.histories(i), found.target_R[i]])
        for i in range(len(found))
    )


@pytest.mark.ray
def test_lastfm_is_theirs_row_by_row_and_no_sequence_in_time(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: str
) -> None:
    raw = files / "lastfm"
    assert len(list(together(rows(raw / "train_data.df", 4606)))) == 976
    data = _prepared("llara-lastfm", raw, tmp_path, monkeypatch)
    sizes = {split: len(data.rows(split)) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert sizes == {"train": 47_872, "validation": 122, "test": 122}
    assert len(data.titles) == 4606
    assert data.domain == "artist"
    for split, name in (("train", "train"), ("validation", "Val"), ("test", "Test")):
        assert _ours(data, split) == _theirs(raw / f"{name}_data.df", 4606)
    every = DataConfig(source=data.config["source"], split="leave-one-out")
    held_out = PreparedData.open(prepare(every, Store.open(tmp_path / "store"), Path)).rows("test")
    assert len(held_out) == 976 + 122 + 122
    (finding,) = (f for f in audit(data.path) if f.check == "order artefact")
    assert finding.verdict == "leak"
    assert finding.evidence.startswith("1.00 of the item pairs")


@pytest.mark.ray
def test_all_sequences_can_be_held_out_from(tmp_path: Path, ray_cluster: str) -> None:
    """The last item of each, whatever split the files bring; other splits would lose theirs."""
    draw, raw = np.random.default_rng(0), tmp_path / "raw"
    raw.mkdir()
    splits = ["train"] * 20 + ["validation"] * 6 + ["test"] * 6
    own = {f"{split}-{n}": draw.permutation(40)[:7].tolist() for n, split in enumerate(splits)}
    lines = [
        {"user_id": user, "item_id": str(item), "timestamp": place, "split": user.split("-")[0]}
        for user, items in own.items()
        for place, item in enumerate(items)
    ]
    titles = [{"item_id": str(item), "title": f"Artist {item}"} for item in range(40)]
    pd.DataFrame(lines).to_parquet(raw / "llara-lastfm.parquet")
    pd.DataFrame(titles).to_parquet(raw / "llara-lastfm-items.parquet")
    config = DataConfig(source=str(raw), split="leave-one-out")
    data = PreparedData.open(prepare(config, Store.open(tmp_path / "store"), Path))
    assert _ours(data, "test") == Counter(map(tuple, own.values()))
    assert _ours(data, "validation") == Counter(tuple(items[:-1]) for items in own.values())
    for split in ("user", "time"):
        with pytest.raises(ConfigError, match=r"brings its own split; set data\.split=given"):
            prepare(replace_in(config, {"split": split}), Store.open(tmp_path / "store"), Path)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "folder", "padding", "held_out"),
    [
        ("llara-steam-sample", "steam", 3581, (1184, 1186)),
        ("llara-movielens-heldout", "movielens", 1682, (94, 95)),
    ],
)
def test_partial_files(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: str,
    name: str,
    folder: str,
    padding: int,
    held_out: tuple[int, int],
) -> None:
    """The test rows are theirs; half of the validation rows train."""
    raw = files / folder
    data = _prepared(name, raw, tmp_path, monkeypatch)
    theirs = [_theirs(raw / f"{split}_data.df", padding) for split in ("Val", "Test")]
    assert (theirs[0].total(), theirs[1].total()) == held_out
    assert _ours(data, "test") == theirs[1]
    validation = _ours(data, "validation")
    assert validation <= theirs[0]
    assert 0.4 < validation.total() / held_out[0] < 0.6
    assert (theirs[0] - validation) <= _ours(data, "train")
    ids = set(data.user_ids())
    assert {"test-0", "validation-0"} <= ids
    finding = {f.check: f for f in audit(data.path)}
    assert {f.check for f in finding.values() if f.verdict == "leak"} == set()
    for check in ("time order", "time ties"):
        assert (finding[check].verdict, finding[check].evidence) == ("ok", "no times in this data")
    if folder == "steam":
        share = float(finding["order artefact"].evidence.split()[0])
        assert share < 0.15


@pytest.mark.ray
def test_movielens_held_out_rows_agree_up_to_ties(
    files: Path, recbole: Path, tmp_path: Path, ray_cluster: str
) -> None:
    """Rebuilt from the raw ratings, every row that no tie in time touches is one of theirs.

    And each of our held-out users has a row of theirs, its own, that is a valid order in time of
    the user's last ratings.
    """
    lines = (recbole / "ml-100k.inter").read_text().splitlines()[1:]
    rated: dict[str, dict[int, int]] = defaultdict(dict)
    for user, item, rating, time in (line.split("\t") for line in lines):
        if float(rating) >= 3:
            rated[user][int(item) - 1] = int(float(time))
    data = PreparedData.open(prepare(DataConfig(source=str(recbole)), Store.open(tmp_path), Path))
    ids, events = np.array([int(item) - 1 for item in data.source_ids]), data.events()
    users = data.user_ids()
    for split, name in (("validation", "Val"), ("test", "Test")):
        theirs = Counter(map(tuple, rows(files / "movielens" / f"{name}_data.df", 1682)))
        found = data.rows(split)  # type: ignore[arg-type]
        assert theirs.total() == len(found)
        equal = free = 0
        for i in range(len(found)):
            row = tuple(ids[[*found.histories(i), found.target_R[i]]].tolist())
            times = events.time_E[events.user_E == found.user_R[i]][-len(row) - 1 :]
            no_tie = len(set(times)) == len(times)
            equal += row in theirs
            free += no_tie
            assert row in theirs or not no_tie
        print(f"{split}: {equal} of {len(found)} rows equal, {free} have no tie in time")
        assert equal >= free > 0
        left = list(theirs.elements())
        for number in found.user_R:
            own = rated[users[number]]
            last = sorted(own.values())
            (row, *_) = (
                row
                for row in left
                if len({*row} & own.keys()) == len(row)
                and [own[item] for item in row] == last[-len(row) :]
            )
            left.remove(row)
        assert left == []


def _frame(**columns: Any) -> bytes:
    return pickle.dumps(pd.DataFrame(columns))


class _Payload:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


@pytest.mark.parametrize("content", [pickle.dumps(_Payload()), b"no pickle", _frame(a=[1])[:50]])
def test_other_pickles_build_nothing(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"asks for builtins\.print|x\.df is no frame of LLaRA's"):
        read_frame(content, "x.df")
    assert capsys.readouterr().out == ""


def test_only_known_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"No such file or directory: .*train_data\.df"):
        import_folder("llara-lastfm", tmp_path)
    for name, _, _ in SCRIPT["FILES"]["llara-lastfm"]["files"]:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"train_data\.df is not the known file"):
        import_folder("llara-lastfm", tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "train_data.df" / "cache"))
    with pytest.raises(ConfigError, match="set RSLLM_CACHE"):
        import_folder("llara-lastfm", tmp_path)


def test_the_command_line_says_which_script_imports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path / "cache"))
    for words in (["fetch", "llara-steam"], ["fetch", "llara-steam", "--from", str(tmp_path)]):
        assert main(words) == 1
        told = "download it, then: python experiments/import_llara.py llara-steam FOLDER"
        assert told in capsys.readouterr().err
    assert main(["fetch", "movielens-100k", "--from", str(tmp_path)]) == 2
    assert "movielens-100k is not imported from a folder" in capsys.readouterr().err


def test_a_damaged_import_is_not_used(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path))
    folder = import_folder("llara-movielens-heldout", files / "movielens")
    assert manifest(folder)["source"] == str(files / "movielens")
    names = {"manifest.json", "llara-movielens.parquet", "llara-movielens-items.parquet"}
    assert {path.name for path in folder.iterdir()} == names
    (folder / "llara-movielens.parquet").write_bytes(b"")
    with pytest.raises(CheckpointError, match="altered"):
        import_folder("llara-movielens-heldout", files / "movielens")


def test_sequences_from_prefixes() -> None:
    users = [[1, 2, 3], [4, *range(20, 36)], [5, 6]]
    prefixes = [user[max(0, n - 11) : n] for user in users for n in range(1, len(user) + 1)]
    assert list(together(prefixes)) == users
