"""Ray Tune + Optuna over experiments: each trial is the watched stage under other settings.

A trial is a driver that runs Ray Train and is idempotent: an artifact that exists is not trained
again. Everything before that stage is made once, before the first trial, and shared.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import optuna
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from rsllm.config import Experiment
from rsllm.errors import TrainingError
from rsllm.pipeline import Pipeline
from rsllm.plan import DRIVER_CPUS
from rsllm.runs import Store, read_json
from rsllm.settings import replace_in
from rsllm.train.launch import Stage
from rsllm.tune.progress import TrialTable, overrides

Space = Callable[[optuna.Trial], dict[str, Any]]
"""Asks Optuna for values and returns paths into `Experiment`."""

METRIC = "score"
"""Validation MRR that the trial would end with: of its last validation, or of the best where the
stage goes back to it. Over one shared draw or exact; never a loss, never the test split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial, as it ended."""

    number: int
    state: str
    """finished, stopped (early) or failed."""
    overrides: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per validation."""
    error: str | None = None

    @property
    def score(self) -> float | None:
        """The last validation's score."""
        return self.curve[-1][METRIC] if self.curve else None


def search(
    pipeline: Pipeline,
    space: Space,
    *,
    trials: int,
    first_guesses: Sequence[dict[str, Any]],
    name: str,
    seed: int,
) -> list[TrialRecord]:
    """Run, or continue, a search over what the pipeline watches.

    Returns:
        Its trials in order of creation.

    Raises:
        TrainingError: every trial failed.
    """
    _quieten()
    base = pipeline.experiment
    folder, system = _notes(pipeline.store)
    trainable = tune.with_resources(
        tune.with_parameters(
            _trial, base=base, storage=pipeline.store.location, watched=pipeline.watched
        ),
        {"CPU": DRIVER_CPUS},
    )
    if tune.Tuner.can_restore(f"{folder}/{name}", system):
        print(f"continuing the search {name}", flush=True)
        tuner = tune.Tuner.restore(
            f"{folder}/{name}",
            trainable,
            resume_unfinished=True,
            resume_errored=True,
            storage_filesystem=system,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=trials,
                max_concurrent_trials=pipeline.layout.concurrent_trials,
                search_alg=_sampler(space, first_guesses, trials, seed),
                scheduler=_scheduler(_num_validations(pipeline)),
                trial_name_creator=lambda trial: f"trial-{trial.trial_id}",
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=folder,
                storage_filesystem=system,
                verbose=0,
                callbacks=[TrialTable(METRIC, trials)],
            ),
        )
    results = sorted(tuner.fit(), key=_first_report)
    records = [_record(number, result, pipeline) for number, result in enumerate(results)]
    if not any(record.curve for record in records):
        reasons = {record.error for record in records}
        raise TrainingError(f"every trial failed: {'; '.join(str(r) for r in reasons)}")
    return records


def _notes(store: Store) -> tuple[str, Any]:
    """Where Tune notes how a search stands: a path, and the file system of a URI's."""
    if store.remote is None:
        return store.below("ray"), None
    system, path = fsspec.core.url_to_fs(store.below("ray"))
    return path, PyFileSystem(FSSpecHandler(system))


def _sampler(
    space: Space, first_guesses: Sequence[dict[str, Any]], trials: int, seed: int
) -> OptunaSearch:
    return OptunaSearch(
        space,
        metric=METRIC,
        mode="max",
        points_to_evaluate=list(first_guesses),
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(5, trials)),
    )


def _num_validations(pipeline: Pipeline) -> int:
    """Of a trial that is not stopped early."""
    base = pipeline.experiment
    epochs, validations = base.recommender.max_epochs, base.stage2.validations
    return math.ceil(epochs) if pipeline.watched == "recommender" else validations


def _scheduler(validations: int) -> TrialScheduler:
    """Rungs at the validations before the last: the weaker half of the trials stops there.

    The first one leaves every trial a sixth of its validations. At its last report a trial has yet
    to write its artifact, so there is no rung.
    """
    if validations == 1:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="validations",
        metric=METRIC,
        mode="max",
        grace_period=max(1, validations // 6),
        reduction_factor=2,
        max_t=validations - 1,
        stop_last_trials=False,
    )


def _trial(config: dict[str, Any], base: Experiment, storage: str, watched: Stage) -> None:
    """One trial: report an artifact that exists, or train it."""
    pipeline = Pipeline(
        replace_in(base, overrides(config)),
        storage,
        run_name=f"train-{tune.get_context().get_trial_id()}",
        callbacks=[TuneReportCallback()],
        watched=watched,
    )
    finished = pipeline.finished()
    if finished is None:
        pipeline.run()
        return
    for entry in read_json(finished / "training.json")["curve"]:
        tune.report(entry)


def _first_report(result: Any) -> float:
    """When a trial first reported, in seconds since 1970; those that never did come last."""
    frame = result.metrics_dataframe
    return float("inf") if frame is None or frame.empty else float(frame["timestamp"].iloc[0])


def _record(number: int, result: Any, search: Pipeline) -> TrialRecord:
    frame, values = result.metrics_dataframe, overrides(result.config)
    trial = Pipeline(
        replace_in(search.experiment, values), search.store.location, watched=search.watched
    )
    if result.error is not None:
        state = "failed"
    elif trial.finished():
        state = "finished"
    else:
        state = "stopped"
        trial.discard()
    return TrialRecord(
        number=number,
        state=state,
        overrides=values,
        curve=[] if frame is None else [_numbers(row) for row in frame.to_dict("records")],
        error=None if result.error is None else str(result.error).strip().splitlines()[-1],
    )


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """rsllm's own metrics of a report, without what Tune adds."""
    groups = ("loss", "contrast/", "health/", "prompts/", "HR@", "NDCG@", "tokens_per")
    ours = (*groups, "MRR", "step", "samples", "seconds", "data_wait", "checkpoint_share", METRIC)
    return {name: float(value) for name, value in row.items() if name.startswith(ours)}


def _quieten() -> None:
    """Leave the terminal to the table of trials, and Ctrl-C to Python: Tune would go on."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
