"""A search: Ray Tune runs the trials that a journal begins and ends.

**A trial starts** when Tune has room for it. `Journal.begin` draws its values, and `_trial` runs in
an actor of its own, a driver that trains the watched stage under these values with Ray Train. It is
idempotent: an artifact that exists is not trained again.

**It reports** each validation to Tune. `_Notes` writes the report into the journal and prints the
table of all trials. The last report names the artifact, whose whole curve is then read, and the
journal ends the trial as finished.

**It is stopped early** when ASHA finds it in the weaker half at one of its `_Rungs`. Tune completes
a trial that the journal has not ended, which `_Notes` therefore ends as stopped. What it left of
its training is removed once the search is done.

**It fails** when its own code raises. The journal ends it with the reason, and nobody tries again.

**It is killed** when its driver or its node dies. The journal leaves it running, so that it is
begun once more, under the same number and values; if it dies again, it has failed. Where the whole
search is killed, all trials that were running are begun again by the next `run`. Either way they go
on from the newest whole checkpoint. What Ray noted of trials is thrown away and never read.
"""

import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.trainable.function_trainable import FunctionTrainable

from rsllm.compute.layout import DRIVER_CPUS
from rsllm.config import Experiment
from rsllm.config.plain import content_hash, replace_in, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError, TrainingError, require
from rsllm.evaluate.metrics import METRICS
from rsllm.evaluate.rank import held_out
from rsllm.flags import recommend_command
from rsllm.pipeline import Pipeline
from rsllm.prompts.templates import wording
from rsllm.report.page import write_report
from rsllm.store.artifacts import provenance, read_json
from rsllm.store.versions import deciding_results
from rsllm.study.journal import COST, FILE, METRIC, Journal, as_config_error, check_space, storage
from rsllm.study.journal import Space as Space
from rsllm.study.journal import TrialRecord as TrialRecord
from rsllm.study.progress import run_name, short_names, summarise, table, trial_rows
from rsllm.study.results import results_folder
from rsllm.study.variants import best_trials
from rsllm.train.assignment import Stage


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search over what a pipeline watches, begun or to be continued.

    Raises:
        ConfigError: a space or a first guess that cannot work, a study that is another, or one
            that another process is at; before Ray starts.
    """

    pipeline: Pipeline
    """The base experiment, where it is stored, and the stage that is tuned."""
    space: Space
    name: str
    """Of its folder under `studies`; the same name continues the search."""
    first_guesses: Sequence[Mapping[str, Any]] = ()
    """Values, as the space names them, that are tried first."""
    cost: bool = False
    """Minimise device-seconds beside maximising the score; then no trial is stopped early, and the
    report has the Pareto front."""
    seed: int = 0
    optuna_storage: str = ""
    """URL of a database instead of the journal file."""
    track: str = ""
    """mlflow or wandb, beside TensorBoard."""

    def __post_init__(self) -> None:
        _quieten()
        _ = self.backbones
        installed = not self.track or find_spec(self.track) is not None
        require(installed, f"--track {self.track} needs it: pip install rsllm[trackers]")
        with as_config_error(f"--track {self.track}"):
            for tracker in self._trackers:
                tracker.setup()
        with self.pipeline.store.lock(f"search-{self.name}", wait=False):
            for guess in self.first_guesses:
                self.journal.study.enqueue_trial(dict(guess), skip_if_exists=True)

    @property
    def folder(self) -> Path:
        """Where the journal is, and results may go."""
        return self.pipeline.store.root / "studies" / self.name

    @cached_property
    def backbones(self) -> list[str]:
        """Fingerprints of those that it may draw; the whole space is looked at."""
        return check_space(self.pipeline, self.space, self.first_guesses)

    @cached_property
    def journal(self) -> Journal:
        """What is known of its trials."""
        file, remote = self.folder / FILE, self.pipeline.store.remote
        shared = remote.read(f"studies/{self.name}/{FILE}") if remote else None
        if shared and not (file.exists() and file.stat().st_size >= len(shared)):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(shared)
        place = storage(file, self.optuna_storage)
        varied = to_dict(self.pipeline.experiment.anywhere)
        base = content_hash([varied, deciding_results(), wording(), self.backbones])
        return Journal(place, self.name, base, self.space, self.cost, self.seed)

    def run(self, trials: int) -> list[TrialRecord]:
        """Run what is missing of so many trials.

        Returns:
            All trials in order of creation.

        Raises:
            ConfigError: more workers than the cluster has, or another process is at it.
            TrainingError: every trial failed.
        """
        base, store = self.pipeline.experiment, self.pipeline.store
        watched = self.pipeline.watched
        with store.lock(f"search-{self.name}", wait=False):
            if known := self.journal.records():
                print(f"continuing the search {self.name}\n{table(known, trials)}", flush=True)
            while trials > self.journal.ended:  # again where a driver was lost with its node
                self._tune(trials)
            records = [r for r in self.journal.records() if r.state != "running"]
            for record in records:
                if record.state == "stopped":
                    experiment = replace_in(base, record.overrides)
                    Pipeline(experiment, store.location, watched=watched).discard()
        if not any(record.curve for record in records):
            reasons = "; ".join(sorted({str(record.error) for record in records}))
            raise TrainingError(f"every trial failed: {reasons}; more --trials try other values")
        return records

    def _tune(self, trials: int) -> None:
        """Let Ray Tune run trials until so many have ended, or the last one's driver has died."""
        self.pipeline.prepare()
        base, store = self.pipeline.experiment, self.pipeline.store
        shutil.rmtree(store.root / "ray" / self.name, ignore_errors=True)
        trainable = tune.with_parameters(
            _trial, base=base, storage=store.location, watched=self.pipeline.watched
        )
        trainable.__mixins__ = (_Named,)
        name = partial(_trial_name, self.name)
        tune.Tuner(
            tune.with_resources(trainable, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                num_samples=trials - self.journal.ended,
                max_concurrent_trials=self.pipeline.layout.concurrent_trials,
                search_alg=_Suggestions(self.journal),
                scheduler=self._scheduler(),
                trial_name_creator=name,
                trial_dirname_creator=name,
            ),
            run_config=tune.RunConfig(
                name=self.name,
                storage_path=str(store.root / "ray"),
                verbose=0,
                callbacks=[_Notes(self, trials), *self._trackers],
            ),
        ).fit()

    def _scheduler(self) -> TrialScheduler:
        """ASHA, which has seen what the trials of earlier drivers reported; FIFO under a cost.

        Its rungs are at validations before the last, and the first leaves every trial a sixth.
        """
        if self.cost:
            return FIFOScheduler()
        stage, recommender = self.pipeline.experiment.stage2, self.pipeline.experiment.recommender
        validations = min(stage.validations, stage.steps)
        if self.pipeline.watched == "recommender":
            validations = math.ceil(recommender.max_epochs)
        grace = max(1, validations // 6)
        scheduler = _Rungs(
            "validations", METRIC, "max", max_t=validations, grace_period=grace, reduction_factor=2
        )
        for record in self.journal.records():
            earlier = SimpleNamespace(trial_id=f"{record.number} of an earlier driver")
            scheduler.on_trial_add(None, earlier)
            for entry in record.curve:
                scheduler.on_trial_result(None, earlier, entry)
        return scheduler

    @property
    def _trackers(self) -> list[tune.Callback]:
        """Ray's own; their environment variables say where they log to."""
        if self.track == "mlflow":
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            return [MLflowLoggerCallback(experiment_name=self.name)]
        if self.track == "wandb":
            from ray.air.integrations.wandb import WandbLoggerCallback

            return [WandbLoggerCallback(project="rsllm", group=self.name)]
        return []


class _Suggestions(Searcher):  # type: ignore[misc]
    """Starts trials: those that the journal begins."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.journal = journal

    def suggest(self, trial_id: str) -> dict[str, Any]:
        number, overrides = self.journal.begin()
        return {"number": number, "overrides": overrides}

    def on_trial_complete(self, *args: Any, **more: Any) -> None:
        """Leave it to `_Notes`, for a searcher does not learn why a trial failed."""

    def save_to_dir(self, *args: Any, **more: Any) -> None:
        """Write nothing, for the journal has it all."""


def _trial(config: dict[str, Any], base: Experiment, storage: str, watched: Stage) -> None:
    """Train what the trial's artifact lacks, reporting each validation, and say where it is."""
    pipeline = Pipeline(
        replace_in(base, config["overrides"]),
        storage,
        run_name=tune.get_context().get_trial_name(),
        callbacks=[TuneReportCallback()],
        watched=watched,
    )
    artifact = pipeline.finished() or pipeline.run()
    last = read_json(artifact / "training.json")["curve"][-1]
    tune.report(last | {"artifact": str(artifact)})


class _Rungs(ASHAScheduler):  # type: ignore[misc]
    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """At its last report a trial has only its artifact to write, whatever rungs it missed."""
        last = result["validations"] >= self._max_t
        return self.CONTINUE if last else str(super().on_trial_result(controller, trial, result))


class _Notes(tune.Callback):  # type: ignore[misc]
    """Tells the journal, and the user, what becomes of the trials."""

    def __init__(self, search: Search, total: int) -> None:
        self.journal, self.store, self.folder = search.journal, search.pipeline.store, search.folder
        self.total = total

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Keep a validation, or all of them where the artifact is there."""
        number = trial.config["number"]
        if artifact := result.get("artifact"):
            curve = read_json(self.store.local(artifact) / "training.json")["curve"]
            self.journal.finish(number, list(map(_entry, curve)))
        else:
            self.journal.report(number, _entry(result))
            self._print()
        for name in [name for name in result if "@" in name]:  # which MLflow would refuse
            result[name.replace("@", "_at_")] = result.pop(name)

    def on_trial_complete(self, *, trial: Any, **info: Any) -> None:
        """End a trial that was stopped early; one that finished has ended already."""
        self.journal.end_unfinished(trial.config["number"])
        self._print()

    def on_trial_error(self, *, trial: Any, **info: Any) -> None:
        """Begin a trial once more whose driver died; explain another failure and keep its log."""
        number, log = trial.config["number"], Path(trial.error_file).read_text()
        _, first, *lines = log.strip().splitlines()
        # Ray heads an error of the trial's own code with "ray::"; without, its driver or node died.
        if "ray::" not in first and self.journal.requeue(number):
            print(f"the driver of trial {number} died; it goes on in a new one later", flush=True)
            return
        kept = self.folder / "failures" / f"trial-{number:03d}.txt"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(log)
        error = next((line for line in reversed(lines) if re.match(r"[\w.]+(: |$)", line)), first)
        self.journal.end_unfinished(number, error=re.sub(r"^[\w.]+: ", "", error))
        self._print()
        print(f"all that was said of it: {kept}", flush=True)

    def _print(self) -> None:
        print(table(self.journal.records(), self.total), flush=True)
        with suppress(CheckpointError):  # it comes to the URI with the next one
            self.store.share(f"studies/{self.folder.name}")


def _entry(row: Mapping[str, Any]) -> dict[str, float]:
    """rsllm's own metrics of a report, without what Tune adds."""
    groups = ("loss", "contrast/", "health/", "prompts/", "tokens_per", METRIC, COST)
    ours = (*groups, "step", "samples", "seconds", "data_wait", "checkpoint_share", "validations")
    return {n: float(value) for n, value in row.items() if n in METRICS or n.startswith(ours)}


class _Named(FunctionTrainable):  # type: ignore[misc]
    """Make Ray's dashboard and logs call a trial's driver by the trial's name."""

    def setup(self, config: dict[str, Any]) -> None:
        super().setup(config)
        self._name = self.trial_name


def _trial_name(search: str, trial: Any) -> str:
    """Number and tuned values, and what sets it apart from the trials of other searches."""
    values = "-".join(
        f"{name}_{value:.3g}" if isinstance(value, float) else f"{name}_{value}"
        for name, value in short_names(trial.config["overrides"]).items()
    )
    return run_name(f"{trial.config['number']:03d}-{values}", search)


def _quieten() -> None:
    """Leave the terminal to the table of trials, and Ctrl-C to Python: Tune would go on."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"


def publish(
    pipeline: Pipeline,
    name: str,
    records: Sequence[TrialRecord],
    best: TrialRecord | None = None,
    *,
    model: Path | None = None,
    cost: bool = False,
    **found: Any,
) -> Path:
    """Write and print the report of a search's trials and of what else was found.

    Args:
        pipeline: what they varied.
        name: of the study.
        records: the trials.
        best: the chosen one; without it the best score.
        model: the artifact that the report says how to recommend with.
        cost: they were also to be cheap.
        found: further entries of results.json, or others than these.

    Returns:
        The folder on this node.
    """
    experiment, data = pipeline.experiment, PreparedData.open(pipeline.prepare())
    speaks = pipeline.watched != "recommender"
    rows = held_out(data, "validation", experiment.evaluation.validation_rows if speaks else 0)[0]
    best = best or next(iter(best_trials(records, 1).values()))
    nothing: dict[str, Any] = {"methods": [], "pairs": [], "notes": [], "recommender": {}}
    results = nothing | {
        "budget": {},
        "backbone": experiment.backbone.source if speaks else "",
        "data": {"source": experiment.data.source, **data.facts["counts"]},
        "experiment": to_dict(experiment),
        "provenance": provenance(),
        "search": summarise(best, records, len(rows), experiment.data.num_candidates),
        "trials": trial_rows(records, cost=cost),
    }
    with results_folder(pipeline.store, name, "report.html") as folder:
        how = recommend_command(model, pipeline.store.location) if model else ""
        print(write_report(folder, results | found, how) + "\n")
        if how:
            print(f"a list for every user: {how}")
    return folder
