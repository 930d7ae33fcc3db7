"""What a search knows of its trials: an Optuna study in a file or a database, and nothing else.

A trial's state is Optuna's own. One that was running when its driver died still runs there: the
next driver goes on with it, under the same number and values. What is drawn for a new trial
depends on the seed and on the trials before it, not on how often the driver was started.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import rsllm
from rsllm.config.plain import content_hash, replace_in
from rsllm.errors import ConfigError, require
from rsllm.pipeline import Pipeline

Space = Callable[[optuna.Trial], dict[str, Any]]
"""Asks Optuna for values and returns paths into `Experiment`."""

METRIC = "score"
"""Validation MRR that the trial would end with: of its last validation, or of the best where the
stage goes back to it. Over one shared draw or exact; never a loss, never the test split."""
COST = "device_seconds"
"""Seconds that the watched stage has trained, times the workers that did."""
FILE = "optuna.journal"
SAMPLES = 20
STATES = {"RUNNING": "running", "COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed"}
OVERRIDES, VALIDATION, ERROR = "overrides", "validation", "error"
MADE_BY = "made by"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial, as it ended."""

    number: int
    state: str
    """finished, stopped (early) or failed; running while the search does."""
    overrides: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per validation."""
    error: str | None = None

    @classmethod
    def from_optuna(cls, trial: FrozenTrial) -> "TrialRecord":
        """Read what a journal has written of a trial."""
        notes = trial.user_attrs
        return cls(
            number=trial.number,
            state=STATES[trial.state.name],
            overrides=notes[OVERRIDES],
            curve=[notes[key] for key in sorted(notes) if key.startswith(VALIDATION)],
            error=notes.get(ERROR) or None,
        )

    @property
    def end(self) -> dict[str, float]:
        """The last validation; empty before the first."""
        return self.curve[-1] if self.curve else {}

    @property
    def score(self) -> float | None:
        """The last validation's score."""
        return self.end.get(METRIC)


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Turn what a space's code, Optuna or a database raises, or warns of, into the user's error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ConfigError(f"{what}: {reason.splitlines()[-1]}") from error


def check_space(
    search: Pipeline, space: Space, first_guesses: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Look at first guesses and random trials: their settings, data and backbones.

    Returns:
        What the backbones compute with, which is to stay as it is while the search goes on.

    Raises:
        ConfigError, DataError: a space that cannot be sampled, a value that cannot work, or a
            first guess that is none of the space's.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    fingerprints = set()
    for guess in [*first_guesses, *[{}] * SAMPLES]:
        study.enqueue_trial(dict(guess))
        with as_config_error("the search space"):
            trial = study.ask()
            paths = json.loads(json.dumps(space(trial)))
            experiment = replace_in(search.experiment, paths)
            unknown = sorted(guess.keys() - trial.params.keys())
            require(not unknown, f"a first guess has {unknown}, which it does not ask for")
            fixed = [path for path in paths if path.startswith("compute.")]
            require(not fixed, f"{fixed} changes no result; set it for all trials, with --set")
            ranked = experiment.data.candidates == "recommender" and "stage" in search.watched
            moved = [path for path in paths if ranked and path.startswith("recommender.")]
            own = "decides data.candidates = recommender, so each trial had sets of its own"
            require(not moved, f"{moved} {own}; choose uniform or popularity")
        pipeline = Pipeline(experiment, search.store.location, watched=search.watched)
        pipeline.check()
        if pipeline.needs_backbone:
            fingerprints.add(pipeline.fingerprint)
    return sorted(fingerprints)


def replay(space: Space, params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Overrides and distributions of a trial whose values are known."""
    trial = optuna.trial.FixedTrial(dict(params))
    return json.loads(json.dumps(space(trial))), trial.distributions  # type: ignore[arg-type]


def storage(journal: Path, url: str = "") -> BaseStorage:
    """The journal file, or the database that takes its place.

    Half a line at the end of a journal goes, for Optuna would write on behind it.

    Raises:
        ConfigError: it cannot be opened.
    """
    name = url.split("://")[0] or journal  # what follows may hold a password
    remedy = "move it away, or correct --optuna-storage"
    with as_config_error(f"{name} is no Optuna storage; {remedy}"):
        if url:
            return RDBStorage(url)
        journal.parent.mkdir(parents=True, exist_ok=True)
        written = journal.read_bytes() if journal.exists() else b""
        if not written.endswith(b"\n"):
            journal.touch()
            os.truncate(journal, written.rfind(b"\n") + 1)
        return JournalStorage(JournalFileBackend(str(journal)))


class Journal:
    """The trials of one search.

    Args:
        place: where they are kept, under `name`.
        base: content hash of the experiment that they vary.
        space: what is searched.
        cost: minimise device-seconds beside maximising the score.
        seed: of all that is drawn.

    Raises:
        ConfigError: the study there varies another experiment, is of another space or version.
    """

    def __init__(
        self, place: BaseStorage, name: str, base: str, space: Space, cost: bool, seed: int
    ) -> None:
        self.space, self.cost, self.seed = space, cost, seed
        self._live: dict[int, optuna.Trial] = {}
        self._lost: set[int] = set()
        directions: Any = ["maximize", "minimize"] if cost else ["maximize"]
        self.study = optuna.create_study(
            storage=place, study_name=name, load_if_exists=True, directions=directions
        )
        this = {"rsllm": rsllm.__version__, "experiment": base, "cost": cost}
        origin = self.study.user_attrs.get(MADE_BY, this)
        with as_config_error(f"the study {name} is another; rename this one, or move that away"):
            require(origin == this, f"it is of {origin}, not {this}")
            for trial in self._own():
                found, distributions = replay(space, trial.params)
                same = found == trial.user_attrs[OVERRIDES] and distributions == trial.distributions
                require(same, f"its space draws {trial.params} otherwise or for another use")
        self.study.set_user_attr(MADE_BY, this)

    def __getstate__(self) -> dict[str, Any]:
        """Show Ray nothing: it writes its searcher down, and a database may have a password."""
        return {}

    def _own(self) -> list[FrozenTrial]:
        """Trials that were begun, not those that only wait as first guesses."""
        return [t for t in self.study.get_trials(deepcopy=False) if OVERRIDES in t.user_attrs]

    @property
    def ended(self) -> int:
        """How many trials finished, were stopped or failed."""
        return sum(trial.state.is_finished() for trial in self._own())

    def records(self) -> list[TrialRecord]:
        """Its trials in order of creation."""
        return [TrialRecord.from_optuna(trial) for trial in self._own()]

    def begin(self) -> tuple[int, dict[str, Any]]:
        """Number and overrides of the next trial: one whose driver died, or else a new one.

        Raises:
            ConfigError: the space cannot draw there.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = [trial for trial in running if trial.number not in self._live]
        trial = optuna.Trial(self.study, left[0]._trial_id) if left else self.study.ask()
        seed = int(content_hash([self.seed, trial.number])[:8], 16)
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=5, multivariate=True, group=True, constant_liar=True
        )
        if self.cost:  # TPE models one objective well, NSGA-II a front
            self.study.sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=10)
        with as_config_error("the search space"):
            overrides = self.space(trial)
        trial.set_user_attr(OVERRIDES, overrides)
        self._live[trial.number] = trial
        return trial.number, overrides

    def report(self, number: int, entry: dict[str, float]) -> None:
        """Keep one validation of a running trial; the same one again takes its place."""
        trial, place = self._live[number], int(entry["validations"])
        key = f"{VALIDATION} {place:04d}"
        if not self.cost and key not in trial.user_attrs:
            trial.report(entry[METRIC], place)
        trial.set_user_attr(key, entry)

    def finish(self, number: int, curve: Sequence[dict[str, float]]) -> None:
        """End a trial that trained to its end."""
        for entry in curve:
            self.report(number, entry)
        values = [curve[-1][METRIC], curve[-1][COST]] if self.cost else curve[-1][METRIC]
        self.study.tell(self._live.pop(number), values)

    def requeue(self, number: int) -> bool:
        """Leave a trial running whose driver died, for `begin`; False if that was so before."""
        if number in self._lost:
            return False
        self._lost.add(number)
        del self._live[number]
        return True

    def end_unfinished(self, number: int, error: str = "") -> None:
        """End a trial that was stopped early or failed; one that has finished stays so."""
        if number in self._live:
            trial = self._live.pop(number)
            trial.set_user_attr(ERROR, error)
            self.study.tell(trial, state=TrialState.FAIL if error else TrialState.PRUNED)
