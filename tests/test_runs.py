"""What a store holds is listed, shown, compared, and cleared of what nothing will read again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rsllm
from rsllm import runs
from rsllm.cli import main
from rsllm.errors import CheckpointError, ConfigError
from rsllm.store import artifacts
from rsllm.store.artifacts import MANIFEST, Store
from rsllm.store.remote import Remote
from rsllm.store.versions import VERSIONS

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Empty, in a folder or at a URI."""
    return Store.open(
        request.getfixturevalue("bucket") if request.param == "bucket" else tmp_path / "store"
    )


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts an artifact into a store; returns its name."""

    def make(
        store: Store, kind: str, inputs: Any, *, days: float = 0.0, version: int = 0, mrr: Any = ()
    ) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * DAY))
        made = {"rsllm": rsllm.__version__, "time": moment}
        monkeypatch.setattr(artifacts, "provenance", lambda: made)
        current = VERSIONS[kind]
        monkeypatch.setitem(VERSIONS, kind, version or current)
        with store.commit(kind, inputs) as folder:
            (folder / "part.bin").write_bytes(bytes(1024 * 1024))
            curve = [{"MRR": value, "HR@1": 0.5, "samples": 8.0} for value in mrr]
            if curve:
                (folder / "training.json").write_text(json.dumps({"curve": curve}))
        name = store.name(store.path(kind, inputs))
        monkeypatch.setitem(VERSIONS, kind, current)
        return name

    return make


@pytest.fixture
def chain(store: Store, make: Callable[..., str]) -> list[str]:
    """Data of 40 days ago, a recommender of 30 and two stages 2 of it, of 20 days and of today."""
    data = make(store, "data", {"config": {"source": "mine"}}, days=40)
    inputs = {"data": data.split("/")[1], "recommender": {"model": "gru4rec", "width": 64}}
    names = [data, make(store, "recommender", inputs, days=30, mrr=[0.3, 0.4, 0.2])]
    for gamma, days in ((1.0, 20), (3.00000001, 0)):
        sources = {"data": inputs["data"], "recommender": names[1].split("/")[1], "start": None}
        stage = {"stage": {"loss": {"gamma": gamma, "alpha": 0.1}, "samples": 96}}
        names.append(make(store, "stage-2", sources | stage, days=days, mrr=[0.5, 0.25]))
    return names


def lines(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(name)]


def test_list(store: Store, chain: list[str]) -> None:
    """Sources come first; a recommender has the score of its best epoch, others of their last."""
    text = runs.listing(store)
    assert [line.split()[0] for line in text.splitlines()[2:]] == chain
    (recommender,), (first,), (second,) = (lines(text, name) for name in chain[1:])
    assert " 1.0  0.400" in recommender
    assert first.endswith(" 1.0  0.250  stage.loss.gamma=1")
    assert second.endswith(" 1.0  0.250  stage.loss.gamma=3")


def test_list_of_what_has_not_ended(store: Store, chain: list[str]) -> None:
    for step in (6, 12):
        with artifacts.commit_dir(
            store.root / "running" / "stage-2-abc" / f"step-{step:06}"
        ) as folder:
            (folder / "part.bin").write_bytes(b"x")
        artifacts.Mirror(store.below("running/stage-2-abc")).upload(
            f"step-{step:06}", store.root / "running" / "stage-2-abc" / f"step-{step:06}"
        )
    (store.root / "studies" / "search").mkdir(parents=True)
    (store.root / "studies" / "search" / "results.json").write_text("{}")
    store.share("studies/search")
    with store.lock("stage-2-abc", wait=False):
        (run,) = lines(runs.listing(store), "stage-2-abc")
        assert f"  step-000012, process {os.getpid()} on " in run
    (store.root / "locks" / "stage-2-abc.holder").write_text("process 1, which was killed")
    (run,) = lines(runs.listing(store), "stage-2-abc")
    assert run.endswith("  step-000012, nobody at it")
    assert lines(runs.listing(store), "search") == ["search   there"]


def test_show_and_difference(store: Store, chain: list[str]) -> None:
    data, recommender, first, second = chain
    shown = runs.details(store, recommender)
    assert lines(shown, "made of ")[0].split()[2:] == [data]
    assert lines(shown, "made from it")[0].split()[3:] == [first, second]
    assert lines(shown, "recommender.model")[0].split()[1:] == ["gru4rec"]
    assert lines(shown, "part.bin")[0].split()[1:] == [str(1024 * 1024)]
    differs = runs.difference(store, str(store.root / first), second.split("/")[1][:6])
    loss, moment = (line.split() for line in differs.splitlines()[2:])
    assert loss == ["stage.loss.gamma", "1.0", "3.00000001"]
    assert moment[0] == "time"
    assert runs.difference(store, data, data).endswith("differ in nothing")


def test_names_that_mean_none_or_several(store: Store, chain: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^gone means nothing in .*; see rsllm runs ls"):
        runs.details(store, "gone")
    with pytest.raises(ConfigError, match=f"means {chain[2]}, {chain[3]} in "):
        runs.details(store, "stage-2")


def checkpoint(store: Store, run: str) -> None:
    with artifacts.commit_dir(store.root / "running" / run / "step-000006") as folder:
        (folder / "part.bin").write_bytes(b"x")
    place = store.root / "running" / run / "step-000006"
    artifacts.Mirror(store.below(f"running/{run}")).upload("step-000006", place)


def told(text: str) -> list[str]:
    """What a table of things to remove names."""
    return [line.split()[0] for line in text.splitlines()[2:-2]]


def test_what_nothing_will_read_again(store: Store, chain: list[str]) -> None:
    """It is listed, and removed when told so; all else stays."""
    ended = chain[3].replace("/", "-")
    for run in (ended, "stage-1-0123"):
        checkpoint(store, run)
    fresh, left = (store.root / "stage-2" / f".{n}.staging" for n in ("fresh", "left"))
    for folder in (fresh, left):
        folder.mkdir(parents=True)
    os.utime(left, (time.time() - 25 * HOUR,) * 2)
    gone = [f"running/{ended}", "stage-2/.left.staging"]
    text = runs.clear(store, days=None, remove=False)
    assert told(text) == gone
    assert text.endswith("MiB could be removed: --yes does it")
    assert left.exists()
    assert told(runs.clear(store, days=None, remove=True)) == gone
    assert runs.clear(store, days=None, remove=True) == "nothing to remove"
    assert not left.exists()
    assert fresh.exists()
    assert [one.name for one in runs.read_artifacts(store)] == chain
    assert runs._names(store, "running") == ["stage-1-0123"]


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_what_nothing_has_used_for_long(store: Store, chain: list[str], make: Any) -> None:
    """Data and a recommender of long ago stay while something young was made of them."""
    other = make(store, "stage-1", {"samples": 1}, days=12, version=9)
    young = make(store, "stage-1", {"samples": 2}, days=8, version=9)
    text = runs.clear(store, days=10, remove=True)
    assert told(text) == [other, chain[2]]
    assert "12 days old, by other code, nothing" in text
    assert "20 days old, nothing that stays was made of it" in text
    assert [one.name for one in runs.read_artifacts(store)] == [*chain[:2], young, chain[3]]
    runs.clear(store, days=0, remove=True)
    assert runs.listing(store).startswith("no artifacts")


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_what_was_judged_stays(store: Store, chain: list[str], make: Any) -> None:
    judged = make(store, "evaluation", {"artifact": chain[2].split("/")[1]}, days=19)
    runs.clear(store, days=0, remove=True)
    assert [one.name for one in runs.read_artifacts(store)] == [*chain[:3], judged]


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_no_source_goes_while_a_run_has_not_ended(store: Store, chain: list[str]) -> None:
    """What it reads is known to it alone."""
    checkpoint(store, "stage-2-0123")
    assert runs.clear(store, days=5, remove=True) == "nothing to remove"
    for path in store.root.glob("running/**/*"):
        os.utime(path, (time.time() - 6 * DAY,) * 2)
    gone = ["running/stage-2-0123", chain[2]]
    assert told(runs.clear(store, days=5, remove=True)) == gone


def test_at_a_uri_nobody_knows_who_uses_what(bucket: str) -> None:
    with pytest.raises(ConfigError, match="--older-than is for folders"):
        runs.clear(Store.open(bucket), days=5, remove=False)


def test_what_cannot_be_removed_is_said(
    bucket: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(bucket)
    run = make(store, "stage-2", {}).replace("/", "-")
    checkpoint(store, run)

    def refuse(self: Remote, path: str) -> None:
        raise CheckpointError("not yours")

    monkeypatch.setattr(Remote, "remove", refuse)
    with pytest.raises(ConfigError, match=f"running/{run} cannot be removed"):
        runs.clear(store, days=None, remove=True)


def test_folders_that_are_not_rsllms_are_none_of_its_business(folder: Store) -> None:
    for name in ("myapp/public", "stage-2/public", "running/0123456789abcdef"):
        (folder.root / name).mkdir(parents=True)
        (folder.root / name / MANIFEST).write_text("{}")
    assert runs.read_artifacts(folder) == []
    assert runs.clear(folder, days=0, remove=False).count("\n") == 4, "the old run alone"


def test_checkpoints_of_what_is_damaged_stay(folder: Store, make: Any) -> None:
    """It is made again, from there."""
    name = make(folder, "stage-2", {})
    checkpoint(folder, name.replace("/", "-"))
    (folder.root / name / "part.bin").unlink()
    assert told(runs.clear(folder, days=None, remove=True)) == [name]
    assert runs._names(folder, "running") == [name.replace("/", "-")]


@pytest.mark.parametrize("days", [-1.0, float("nan")])
def test_days_that_are_none(tmp_path: Path, days: float) -> None:
    with pytest.raises(ConfigError, match="is no number of days; give 0 or more"):
        runs.clear(Store.open(tmp_path), days=days, remove=True)


def test_nothing_is_removed_while_something_runs(store: Store, chain: list[str]) -> None:
    checkpoint(store, chain[3].replace("/", "-"))
    with (
        store.lock("search-mine", wait=False),
        pytest.raises(ConfigError, match=f"process {os.getpid()} on .* runs search-mine; clear"),
    ):
        runs.clear(store, days=None, remove=True)
    assert runs._names(store, "running")


def test_old_notes_and_checkpoints_go_too(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    for name in ("running/stage-2-abc/step-000006", "ray/search"):
        (store.root / name).mkdir(parents=True)
        (store.root / name / "note").write_text("x")
    young = runs.clear(store, days=1, remove=True)
    for path in store.root.rglob("*"):
        os.utime(path, (time.time() - 3 * DAY,) * 2)
    assert young == "nothing to remove"
    gone = ["running/stage-2-abc", "ray/search"]
    assert told(runs.clear(store, days=1, remove=True)) == gone
    assert not [*store.root.glob("running/*"), *store.root.glob("ray/*")]


@pytest.mark.parametrize("harm", ["manifest", "deep", "facts", "time", "file", "curve"])
def test_damaged_artifacts_are_listed_and_cleared(tmp_path: Path, make: Any, harm: str) -> None:
    store = Store.open(tmp_path)
    name = make(store, "stage-2", {"samples": 1}, mrr=[0.5])
    if harm == "manifest":
        (store.root / name / MANIFEST).write_text("[]")
    elif harm == "deep":
        (store.root / name / MANIFEST).write_text("[" * 100_000)
    elif harm in ("facts", "time"):
        nonsense = {"inputs": [], "provenance": {"time": "soon" if harm == "time" else ""}}
        with artifacts.commit_dir(tmp_path / "new", **nonsense) as folder:
            (folder / "part.bin").write_bytes(b"x")
        shutil.rmtree(store.root / name)
        (tmp_path / "new").rename(store.root / name)
    elif harm == "file":
        (store.root / name / "part.bin").write_bytes(b"")
    else:
        text = json.dumps({"curve": ["x" * 5]})
        (store.root / name / "training.json").write_text(text)
    assert lines(runs.listing(store), name)[0].endswith("damaged")
    assert "is damaged" in runs.details(store, name)
    assert f"{name} " in runs.clear(store, days=None, remove=True)
    assert not (store.root / name).exists()


def test_no_text_of_a_store_commands_the_terminal(tmp_path: Path, make: Any) -> None:
    store = Store.open(tmp_path)
    name = make(store, "data", {"source": "\x1b]0;gone\x07\u202e"})
    shown = runs.details(store, name)
    assert "?]0;gone??" in shown
    assert shown.replace("\n", "").isprintable()


def test_verbs(tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(tmp_path / "store")
    names = [make(store, "stage-2", {"samples": number}) for number in (1, 2)]
    where = ["--storage", str(store.root)]
    for words in (["ls"], ["show", names[0]], ["diff", *names], ["gc", "--older-than", "0"]):
        assert main(["runs", *words, *where]) == 0
        assert names[0] in capsys.readouterr().out
    for deed in ("ls", "gc"):
        assert main(["runs", deed, "--storage", str(tmp_path / "none")]) == 2
        assert "none is no store; name one with --storage" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
