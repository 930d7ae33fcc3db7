"""Interrupted runs, damaged checkpoints and early stopping: what is restored, bit for bit."""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from object_store import ObjectStore
from small_tasks import history_task, keys_task, language_task, recommender_task
from torch import Tensor

from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError
from rsllm.store.artifacts import MANIFEST, manifest
from rsllm.train.checkpoints import Checkpoints, State
from rsllm.train.engine import Engine
from rsllm.train.loop import Task, train
from rsllm.train.watch import Watch

Report = dict[str, float]


class Killed(Exception):
    """What ends a run between two checkpoints."""


def unlogged(step: int, values: Report) -> None:
    pass


def ignore(report: Report) -> None:
    """A run that nobody watches."""


def patient() -> Watch:
    """Saves at validations only."""
    return Watch(checkpoint_seconds=1e9)


def make_engine(task: Task, zero_stage: int = 2) -> Engine:
    return Engine(task.objective, task.optimization, zero_stage=zero_stage, bf16=False)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


Maker = Callable[[], tuple[Any, Engine]]
STAGES = [("recommender", 0), ("recommender", 2), ("stage2", 0), ("stage2", 2), ("stage2", 3)]
STAGES += [("full stage2", 0), ("full stage2", 2), ("full stage2", 3)]
STAGES += [("history stage2", 0), ("history stage2", 3), ("keys", 0)]


@pytest.fixture(params=STAGES, ids=lambda stage: "{} under ZeRO {}".format(*stage))
def make(request: pytest.FixtureRequest, data: PreparedData, random_llm: Path) -> Maker:
    """Makes task and engine afresh, as a restarted worker does; all but the keys have dropout."""
    stage, zero_stage = request.param
    tasks: dict[str, Callable[[], Any]] = {
        "recommender": lambda: recommender_task(data),
        "keys": lambda: keys_task(data),
        "stage2": lambda: language_task(data, random_llm),
        "full stage2": lambda: language_task(data, random_llm, tuning="full"),
        "history stage2": lambda: history_task(data, random_llm, title_width=320),
    }

    def make() -> tuple[Any, Engine]:
        task = tasks[stage]()
        return task, make_engine(task, zero_stage)

    return make


def kill_at(task: Any, step: int) -> None:
    """Let `task` raise when it is asked for the batches of `step`."""
    whole = task.feed

    def feed(start: int) -> Iterator[Any]:
        for asked, batches in enumerate(whole(start), start=start):
            if asked == step:
                raise Killed
            yield batches

    task.feed = feed


def test_resumed_equals_uninterrupted(make: Maker, tmp_path: Path) -> None:
    task, whole = make()
    expected = train(task, whole, Checkpoints(tmp_path / "whole"), patient(), ignore, unlogged)
    checkpoints = Checkpoints(tmp_path / "broken")
    task, engine = make()
    kill_at(task, step=5)
    with pytest.raises(Killed):
        train(task, engine, checkpoints, patient(), ignore, unlogged)
    task, resumed = make()
    reports: list[Report] = []
    state = train(task, resumed, checkpoints, patient(), reports.append, unlogged)

    assert 0 < len(reports) < len(expected.curve), "it did not start over"
    assert [timeless(entry) for entry in state.curve] == [timeless(e) for e in expected.curve]
    assert state.step == expected.step
    assert equal(resumed.trainable(), whole.trainable())


def timeless(entry: Report) -> Report:
    of_an_attempt = ("second", "data_wait", "checkpoint", "loss_peak")
    return {n: v for n, v in entry.items() if not any(part in n for part in of_an_attempt)}


def test_early_stopping_returns_the_best_weights(data: PreparedData, tmp_path: Path) -> None:
    """Shuffled films teach nothing, so that validation soon stops improving."""
    task = recommender_task(data, max_epochs=40, patience=2, learning_rate=0.02)
    engine = make_engine(task)
    seen: dict[int, dict[str, Tensor]] = {}
    scores: dict[int, float] = {}

    def remember(report: Report) -> None:
        step = int(report["step"])
        seen[step], scores[step] = engine.trainable(), report["MRR"]

    state = train(task, engine, Checkpoints(tmp_path), patient(), remember, unlogged)
    best = max(scores, key=lambda step: scores[step])
    assert state.best_step == best
    assert state.step == best + 2 * task.steps_per_epoch < task.steps
    assert equal(engine.trainable(), seen[best])
    assert not equal(seen[state.step], seen[best])


@pytest.mark.parametrize("keeps_best", [True, False])
def test_a_validation_says_what_the_run_would_end_with(keeps_best: bool) -> None:
    state, best = State(), []
    for step, score in enumerate([0.2, 0.5, 0.4, 0.5], start=1):
        entry = {"MRR": score, "step": float(step)}
        state = replace(state, step=step).validated(entry, "MRR", keeps_best=keeps_best)
        best.append((state.best_step, state.best_score, state.validations_since_best()))
    assert best == [(1, 0.2, 0), (2, 0.5, 0), (2, 0.5, 1), (2, 0.5, 2)], "a tie is no better"
    ends = [0.2, 0.5, 0.5 if keeps_best else 0.4, 0.5]
    assert [entry["score"] for entry in state.curve] == ends
    assert [entry["validations"] for entry in state.curve] == [1, 2, 3, 4]


@pytest.fixture
def run(data: PreparedData, tmp_path: Path) -> tuple[Engine, Checkpoints, list[dict[str, Tensor]]]:
    """Checkpoints of steps 1 (the best) to 4, and the weights after 0 to 4 steps."""
    task = recommender_task(data)
    engine, checkpoints = make_engine(task), Checkpoints(tmp_path / "run")
    weights = [engine.trainable()]
    for step in (1, 2, 3, 4):
        engine.step(task.batches(step - 1), step - 1)
        checkpoints.commit(engine, State(step=step, best_step=1, best_score=0.5))
        weights.append(engine.trainable())
    return engine, checkpoints, weights


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    """With that of the checkpoint before."""
    path.write_bytes((path.parents[1] / "step-00000003" / path.name).read_bytes())


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_two_and_best_are_kept(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
) -> None:
    engine, checkpoints, weights = run
    folders = sorted(path.name for path in checkpoints.folder.iterdir())
    assert folders == ["step-00000001", "step-00000003", "step-00000004"]
    assert checkpoints.restore(engine, step=1).step == 1
    assert equal(engine.trainable(), weights[1])
    assert checkpoints.restore(engine) == State(step=4, best_step=1, best_score=0.5)
    assert equal(engine.trainable(), weights[4])


@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, swap, Path.unlink])
@pytest.mark.parametrize("file", ["state-00000.safetensors", MANIFEST])
def test_a_damaged_checkpoint_is_never_loaded(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
    damage: Callable[[Path], None],
    file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, checkpoints, weights = run
    damage(checkpoints.folder / "step-00000004" / file)
    with pytest.raises(CheckpointError, match="step-00000004"):
        checkpoints.restore(engine, step=4)
    assert equal(engine.trainable(), weights[4]), "nothing was loaded"
    assert checkpoints.restore(engine).step == 3
    assert equal(engine.trainable(), weights[3])
    assert "skipping step-00000004" in capsys.readouterr().out


def test_every_bit_of_a_manifest_counts(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
) -> None:
    _, checkpoints, _ = run
    path = checkpoints.folder / "step-00000004" / MANIFEST
    facts, whole = manifest(path.parent), path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(CheckpointError):
            assert manifest(path.parent, verify=True).items() >= facts.items(), "its digest's name"


def test_where_all_are_damaged_it_does_not_start_over(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
) -> None:
    engine, checkpoints, _ = run
    for path in checkpoints.folder.rglob(MANIFEST):
        path.unlink()
    with pytest.raises(CheckpointError, match="is whole; delete the folder to start over"):
        checkpoints.restore(engine)


def test_pruning_keeps_what_can_be_loaded(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
) -> None:
    engine, checkpoints, weights = run
    truncate(checkpoints.folder / "step-00000004" / "state-00000.safetensors")
    checkpoints.commit(engine, State(step=5, best_step=1, best_score=0.5))
    truncate(checkpoints.folder / "step-00000005" / "state-00000.safetensors")
    assert checkpoints.restore(engine).step == 3
    assert equal(engine.trainable(), weights[3])


def test_a_full_disk_costs_the_checkpoint_only(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, checkpoints, weights = run
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for step in (5, 6):
            checkpoints.commit(engine, State(step=step))
        with pytest.raises(CheckpointError, match="3 checkpoints in a row"):
            checkpoints.commit(engine, State(step=7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().out
    assert shown.count("training goes on without this checkpoint") == 3
    assert "MB free" in shown
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["step-00000001", "step-00000003", "step-00000004"], "nothing half-written"
    assert checkpoints.restore(engine).step == 4
    assert equal(engine.trainable(), weights[4])


def test_resumed_from_a_uri_equals_uninterrupted(
    data: PreparedData,
    random_llm: Path,
    bucket: str,
    go_to: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """On a node that has none of the checkpoints."""
    task = language_task(data, random_llm)
    whole = make_engine(task)
    expected = train(task, whole, Checkpoints(tmp_path / "whole"), patient(), ignore, unlogged)
    task = language_task(data, random_llm)
    kill_at(task, step=5)
    with pytest.raises(Killed):
        train(task, make_engine(task), Checkpoints(bucket), patient(), ignore, unlogged)
    assert not list((tmp_path / "node-a").rglob("*.safetensors")), "all is at the URI"
    go_to("node-b")
    task = language_task(data, random_llm)
    resumed, reports = make_engine(task), list[Report]()
    state = train(task, resumed, Checkpoints(bucket), patient(), reports.append, unlogged)
    assert 0 < len(reports) < len(expected.curve), "it did not start over"
    assert [timeless(entry) for entry in state.curve] == [timeless(e) for e in expected.curve]
    assert equal(resumed.trainable(), whole.trainable())


@pytest.fixture
def run_at_uri(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]], bucket: str
) -> tuple[Engine, Checkpoints, list[dict[str, Tensor]]]:
    """The checkpoints of `run` at a URI."""
    engine, local, weights = run
    checkpoints = Checkpoints(bucket)
    for step in (1, 2, 3, 4):
        if step != 2:
            local.restore(engine, step)
        checkpoints.commit(engine, State(step=step, best_step=1, best_score=0.5))
    return engine, checkpoints, weights


def test_newest_two_and_best_are_kept_at_a_uri(
    run_at_uri: tuple[Engine, Checkpoints, list[dict[str, Tensor]]], bucket: str
) -> None:
    engine, checkpoints, weights = run_at_uri
    folders = sorted(path.name for path in Path(bucket.removeprefix("objects://")).iterdir())
    assert folders == ["step-00000001", "step-00000003", "step-00000004"]
    for step in (1, 3, 4):
        assert checkpoints.restore(engine, step=step).step == step
        assert equal(engine.trainable(), weights[step])


@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, Path.unlink])
@pytest.mark.parametrize("file", ["state-00000.safetensors", MANIFEST])
def test_a_checkpoint_that_is_damaged_at_a_uri_is_never_loaded(
    run_at_uri: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
    bucket: str,
    damage: Callable[[Path], None],
    file: str,
) -> None:
    engine, checkpoints, weights = run_at_uri
    (path,) = Path(bucket.removeprefix("objects://"), "step-00000004").rglob(file)
    damage(path)
    with pytest.raises(CheckpointError, match="step-00000004"):
        checkpoints.restore(engine, step=4)
    assert checkpoints.restore(engine).step == 3
    assert equal(engine.trainable(), weights[3])


def test_a_copy_from_another_attempt_is_not_taken_for_what_is_at_the_uri(
    run_at_uri: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
    go_to: Callable[[str], None],
) -> None:
    engine, checkpoints, weights = run_at_uri
    assert checkpoints.restore(engine).step == 4, "node a has a copy"
    checkpoints.restore(engine, step=1)
    go_to("node-b")
    Checkpoints(checkpoints.mirror.location).commit(engine, State(step=4))
    go_to("node-a")
    assert checkpoints.restore(engine) == State(step=4)
    assert equal(engine.trainable(), weights[1])


def test_a_uri_that_cannot_be_reached_costs_the_checkpoint_only(
    run_at_uri: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, checkpoints, weights = run_at_uri

    def fail(self: ObjectStore, path1: str, path2: str, **options: Any) -> None:
        raise TimeoutError("no route to the bucket")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", fail)
        for step in (5, 6):
            checkpoints.commit(engine, State(step=step))
        with pytest.raises(CheckpointError, match=r"3 checkpoints in a row.*no route"):
            checkpoints.commit(engine, State(step=7))
    assert capsys.readouterr().out.count("training goes on without this checkpoint") == 3
    assert not list(checkpoints.folder.glob(".step-*")), "nothing half-written"
    assert checkpoints.restore(engine).step == 4
    assert equal(engine.trainable(), weights[4])


def test_what_a_killed_commit_left_is_removed(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
) -> None:
    engine, checkpoints, _ = run
    left = checkpoints.folder / ".step-00000005.staging"
    shutil.copytree(checkpoints.folder / "step-00000004", left)
    assert checkpoints.restore(engine).step == 4
    assert not left.exists()


def test_large_states_are_several_files(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, checkpoints, _ = run
    monkeypatch.setattr("rsllm.train.checkpoints.PART_BYTES", 2_000)
    checkpoints.commit(engine, State(step=5))
    assert len(list((checkpoints.folder / "step-00000005").glob("*.safetensors"))) > 2
    before = engine.trainable()
    checkpoints.restore(engine, step=4)
    checkpoints.restore(engine)
    assert equal(engine.trainable(), before)


def test_saves_as_often_as_told(data: PreparedData, tmp_path: Path) -> None:
    task = recommender_task(data, max_epochs=1)
    engine, checkpoints, watch = make_engine(task), Checkpoints(tmp_path), Watch(0.0)
    watch.cost = 1e-9
    seen: list[int] = []

    def look(step: int, values: Report) -> None:
        seen.extend(int(path.name[5:]) for path in tmp_path.glob("step-*"))
        watch.cost = 1e-9

    state = train(task, engine, checkpoints, watch, ignore, look)
    assert set(range(1, state.step)) <= set(seen)


def test_costly_checkpoints_are_rarer() -> None:
    watch = Watch(checkpoint_seconds=0.0)
    with watch.saving():
        time.sleep(0.1)
    assert watch.cost >= 0.1
    watch.cost = 100.0  # a stall of the machine is short beside it
    engine = SimpleNamespace(agree=lambda rank0, any_rank: (rank0, any_rank))
    assert not watch.checkpoint_due(engine)  # type: ignore[arg-type]
    watch.saved -= watch.cost / 0.05
    assert watch.checkpoint_due(engine)  # type: ignore[arg-type]


def test_without_checkpoints_it_starts_at_step_0(data: PreparedData, tmp_path: Path) -> None:
    engine = make_engine(recommender_task(data))
    assert Checkpoints(tmp_path / "none").restore(engine) == State()
