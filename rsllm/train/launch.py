"""Run a stage under Ray Train, and again after lost workers for as long as that can help."""

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util import get_current_placement_group, placement_group_table

from rsllm.compute.layout import Layout
from rsllm.errors import ConfigError, DataError, Interrupted, RsllmError, TrainingError
from rsllm.store.artifacts import Mirror
from rsllm.train.assignment import Assignment
from rsllm.train.watch import hear_sigterm
from rsllm.train.worker import out_of_memory, work

SHOWN_LETTERS = 24
"""Of a run's name, which stands before each line that a worker prints."""


def run(assignment: Assignment, *, name: str, storage: Path, callbacks: Sequence[Any] = ()) -> None:
    """Train one stage with Ray Train and wait for it; the workers commit the artifact.

    Every attempt goes on from the newest checkpoint, and uses nothing that Ray noted of the last.

    Raises:
        TrainingError: workers were lost too often without a step forward, the cluster has no room
            for them, or the same error of ours came twice.
        ConfigError, DataError: a mistake, which would be the same at every attempt.
        Interrupted: Ray Tune stopped the trial that this is.
    """
    allowed = assignment.experiment.compute.max_failures
    reached, fruitless, last = _newest_step(assignment), 0, ""
    for attempt in itertools.count(1):
        attempt_name = f"{name}-attempt-{attempt}" if attempt > 1 else name
        shutil.rmtree(storage / attempt_name, ignore_errors=True)
        try:
            _trainer(assignment, attempt_name, storage, callbacks).fit()
            return
        except Exception as error:
            if _stopped():
                raise Interrupted(f"the trial {name} was stopped") from error
            reason = _explained(error, assignment)
            before, reached = reached, _newest_step(assignment)
            fruitless = 0 if reached > before else fruitless + 1
            again = str(reason) == last and not isinstance(reason, Interrupted | _LostError)
            final = again or isinstance(reason, ConfigError | DataError | _NoRoomError)
            if final or fruitless > allowed:
                raise reason from error
        last = str(reason)
        print(f"rsllm: {last}; attempt {attempt + 1} goes on from step {reached}", flush=True)


def _trainer(
    assignment: Assignment, name: str, storage: Path, callbacks: Sequence[Any]
) -> TorchTrainer:
    compute, layout = assignment.experiment.compute, assignment.layout
    os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = str(compute.wait_seconds)
    trainer = _Trainer(
        work,
        train_loop_config={"assignment": assignment},
        torch_config=_TorchConfig(timeout_s=compute.timeout_seconds),
        scaling_config=ScalingConfig(
            num_workers=layout.workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=_resources(layout),
            placement_strategy="STRICT_SPREAD" if compute.placement == "spread" else "PACK",
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            # Attempts are counted by `run`, which knows whether they gained anything.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            callbacks=[_Named(name), *callbacks],
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    # Ray Train's handler would end the process with exit code 0, and outlive the run.
    trainer._register_sigint_handler = lambda controller: None
    return trainer


def _resources(layout: Layout) -> dict[str, float]:
    return {"CPU": layout.cpus_per_worker} | ({"GPU": 1} if layout.use_gpu else {})


class _Trainer(TorchTrainer):  # type: ignore[misc]
    def _create_default_callbacks(self) -> list[Any]:
        """Start no process for data sets: a worker reads its own."""
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, DatasetsCallback)]


@dataclass
class _TorchConfig(TorchConfig):  # type: ignore[misc]
    """Starts the workers' process group, and lets them hear SIGTERM."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(hear_sigterm)


class _Named(ControllerCallback):  # type: ignore[misc]
    """Makes Ray's dashboard and logs call the workers by the beginning of their run's name."""

    def __init__(self, run: str) -> None:
        self.run = run[:SHOWN_LETTERS]

    def after_controller_start(self, train_run_context: Any) -> None:
        run, worker = self.run, worker_group.RayTrainWorker
        named = type(worker.__name__, (worker,), {"__repr__": lambda self: run})
        worker_group.WorkerGroup._worker_cls = named


def _newest_step(assignment: Assignment) -> int:
    """Return the step of the newest checkpoint, by which an attempt's gain is judged."""
    names = Mirror(assignment.checkpoints).names()
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def _stopped() -> bool:
    """Tell whether this is a trial whose resources Ray Tune took away; its process ends next."""
    group = get_current_placement_group()
    return group is not None and placement_group_table(group).get("state") == "REMOVED"


def _explained(error: Exception, assignment: Assignment) -> RsllmError:
    """Return the workers' own error, if it is one of ours; otherwise what Ray Train says."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, RsllmError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    if any(isinstance(failure, ray.exceptions.OutOfMemoryError) for failure in failures.values()):
        return ConfigError(out_of_memory(assignment))
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        compute, layout = assignment.experiment.compute, assignment.layout
        apart = " on nodes of their own" if compute.placement == "spread" else ""
        return _NoRoomError(
            f"{assignment.stage} needs {layout.workers} workers of {_resources(layout)}{apart}, and"
            f" within {compute.wait_seconds:.0f} s the cluster had no room for them; see ray status"
        )
    first = str(next(iter(failures.values()))).strip() or type(error).__name__
    print(first, flush=True)
    return _LostError(f"{assignment.stage} lost a worker: {first.splitlines()[-1]}")


class _NoRoomError(TrainingError):
    """The cluster did not have what the workers need in time."""


class _LostError(TrainingError):
    """A worker ended without an error of ours."""
