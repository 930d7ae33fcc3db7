"""Attempts under Ray Train: what ends them, and what they are called."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rsllm.config import Experiment
from rsllm.errors import ConfigError, DataError, Interrupted, RsllmError, TrainingError
from rsllm.train import launch as attempts


class Dying:
    """A trainer whose controller dies, or whose workers raise an error of ours."""

    error: Exception = RuntimeError("The actor is dead because its placement group was removed.")

    def fit(self) -> None:
        raise self.error


@pytest.fixture
def assignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose every attempt dies."""
    monkeypatch.setattr(attempts, "_trainer", lambda *given: Dying())
    return SimpleNamespace(stage="stage2", experiment=Experiment(), checkpoints=str(tmp_path))


def run(assignment: Any) -> None:
    attempts.run(assignment, name="a-trial", storage=Path(assignment.checkpoints))


def test_a_lost_worker_is_said_and_tried_again(
    assignment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempts, "_stopped", lambda: False)
    with pytest.raises(TrainingError, match="stage2 lost a worker: The actor is dead"):
        run(assignment)
    shown, allowed = capsys.readouterr().out, assignment.experiment.compute.max_failures
    assert shown.count("goes on from step 0") == allowed


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_a_mistake_is_not_tried_again(
    kind: type[RsllmError],
    assignment: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However deep in what Ray Train says of its workers it lies."""
    failed = RuntimeError("rank 0 failed")
    failed.worker_failures = {0: RuntimeError()}  # type: ignore[attr-defined]
    failed.worker_failures[0].__cause__ = kind("a title is empty")  # type: ignore[attr-defined]
    monkeypatch.setattr(attempts, "_stopped", lambda: False)
    monkeypatch.setattr(Dying, "error", failed)
    with pytest.raises(kind, match="a title is empty"):
        run(assignment)
    assert capsys.readouterr().out == ""


@pytest.mark.ray
def test_a_trial_that_is_stopped_ends_quietly(
    ray_cluster: str,
    assignment: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its Ray Train dies with the placement group that Ray Tune takes away."""
    from ray.util import placement_group, remove_placement_group

    assert not attempts._stopped(), "this test is no trial"
    group = placement_group([{"CPU": 0.01}])
    monkeypatch.setattr(attempts, "get_current_placement_group", lambda: group)
    assert group.wait(60)
    assert not attempts._stopped()
    remove_placement_group(group)
    with pytest.raises(Interrupted, match="the trial a-trial was stopped"):
        run(assignment)
    assert capsys.readouterr().out == ""
