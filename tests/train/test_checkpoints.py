"""Interrupted runs, damaged checkpoints and early stopping: what is restored, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import language_task, recommender_task
from torch import Tensor

from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError
from rsllm.runs import MANIFEST
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


@pytest.fixture(params=STAGES, ids=lambda stage: "{} under ZeRO {}".format(*stage))
def make(request: pytest.FixtureRequest, data: PreparedData, random_llm: Path) -> Maker:
    """Makes task and engine afresh, as a restarted worker does; both stages have dropout."""
    stage, zero_stage = request.param

    def make() -> tuple[Any, Engine]:
        tuning = "full" if stage.startswith("full") else "lora"
        recommender = stage == "recommender"
        task = (
            recommender_task(data)
            if recommender
            else language_task(data, random_llm, tuning=tuning)
        )
        return task, make_engine(task, zero_stage)

    return make


def kill_at(task: Any, step: int) -> None:
    """Let `task` raise when it is asked for the batches of `step`."""
    original = task.batches

    def batches(asked: int) -> Any:
        if asked == step:
            raise Killed
        return original(asked)

    task.batches = batches


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
    return {name: value for name, value in entry.items() if "second" not in name}


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
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def drop_manifest(path: Path) -> None:
    (path.parent / MANIFEST).unlink()


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


@pytest.mark.parametrize("damage", [truncate, flip_bit, drop_manifest, Path.unlink])
def test_a_damaged_checkpoint_is_never_loaded(
    run: tuple[Engine, Checkpoints, list[dict[str, Tensor]]],
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine, checkpoints, weights = run
    newest = checkpoints.folder / "step-00000004"
    damage(max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size))
    with pytest.raises(CheckpointError, match="step-00000004"):
        checkpoints.restore(engine, step=4)
    assert equal(engine.trainable(), weights[4]), "nothing was loaded"
    assert checkpoints.restore(engine).step == 3
    assert equal(engine.trainable(), weights[3])
    assert "skipping step-00000004" in capsys.readouterr().out


def test_without_checkpoints_it_starts_at_step_0(data: PreparedData, tmp_path: Path) -> None:
    engine = make_engine(recommender_task(data))
    assert Checkpoints(tmp_path / "none").restore(engine) == State()
