"""The record of a search: what survives a killed driver, and which studies are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import rsllm
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.errors import ConfigError, DataError
from rsllm.pipeline import Pipeline
from rsllm.report.trials import pareto_front
from rsllm.study.journal import (
    COST,
    FILE,
    METRIC,
    Journal,
    Space,
    TrialRecord,
    check_space,
    storage,
)
from rsllm.study.progress import short_names, summarise, table, trial_rows

TRIALS = 9
FILE_AND_DATABASE = ("", "sqlite:///{}/optuna.db")


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Conditional: only some trials have a projector, whose depth is asked for."""
    dropout = trial.suggest_float("dropout", 0.0, 0.5)
    if trial.suggest_categorical("slots", [True, False]):
        depth = trial.suggest_int("depth", 0, 3)
        return {"recommender.dropout": dropout, "projector.depth": depth}
    return {"recommender.dropout": dropout, "stage2.representation": "text"}


def curve(overrides: dict[str, Any]) -> list[dict[str, float]]:
    """Three validations that depend on the values alone."""
    best = 0.3 + 0.1 * overrides.get("projector.depth", 0) - overrides["recommender.dropout"] / 5
    cost = 10.0 + 5 * overrides.get("projector.depth", 0)
    return [{"validations": i, METRIC: best * i / 3, COST: cost * i / 3} for i in (1.0, 2.0, 3.0)]


def opened(folder: Path, *, cost: bool = False, url: str = "", **changes: Any) -> Journal:
    given = {"name": "made-up", "base": "b", "space": space, "cost": cost, "seed": 3, **changes}
    return Journal(storage(folder / FILE, url.format(folder)), **given)


def drive(
    journal: Journal, trials: int, meets: Callable[[str], object] = lambda moment: None
) -> list[TrialRecord]:
    """What a driver does, one trial after the other; every third is stopped, every fifth fails."""
    while journal.ended < trials:
        meets("before")
        number, overrides = journal.begin()
        meets("begun")
        entries = curve(overrides)
        journal.report(number, entries[0])
        meets("reported")
        if number % 3 == 2:
            journal.end_unfinished(number)
        elif number % 5 == 4:
            journal.end_unfinished(number, error="out of memory")
        else:
            journal.finish(number, entries)
    return journal.records()


@pytest.mark.parametrize("cost", [False, True])
@pytest.mark.parametrize("url", FILE_AND_DATABASE)
def test_states_values_and_curves(tmp_path: Path, url: str, cost: bool) -> None:
    records = drive(opened(tmp_path, url=url, cost=cost), TRIALS)
    assert records == opened(tmp_path, url=url, cost=cost).records()
    assert [record.number for record in records] == list(range(TRIALS))
    for record in records:
        state = "stopped" if record.number % 3 == 2 else "finished"
        state = "failed" if record.number == 4 else state
        assert record.state == state
        whole = curve(record.overrides)
        assert record.curve == (whole if state == "finished" else whole[:1])
        assert record.error == ("out of memory" if state == "failed" else None)


@pytest.mark.parametrize("url", FILE_AND_DATABASE)
def test_plain_optuna_reads_it(tmp_path: Path, url: str) -> None:
    """As optuna-dashboard does."""
    records = drive(opened(tmp_path, url=url), TRIALS)
    where: Any = url.format(tmp_path)
    if not url:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / FILE))
        where = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="made-up", storage=where)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    finished = [record for record in records if record.state == "finished"]
    best = max(finished, key=lambda record: record.score or 0)
    assert study.best_trial.number == best.number
    assert study.best_value == best.score
    assert {t.number: t.state.name for t in study.trials}[2] == "PRUNED"
    assert study.trials[0].intermediate_values == {
        int(entry["validations"]): entry[METRIC] for entry in records[0].curve
    }


DRIVER = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from pathlib import Path
from test_journal import TRIALS, drive, opened, space

folder, moment, times, where = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
seen = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def meets(name):
    seen.append(name)
    if seen.count(moment) == times:
        die()

def torn_space(trial):
    \"\"\"Killed between two values of one trial.\"\"\"
    suggest = trial.suggest_categorical
    def suggest_and_die(*args):
        meets("suggested")
        return suggest(*args)
    if not isinstance(trial, __import__("optuna").trial.FixedTrial):
        trial.suggest_categorical = suggest_and_die
    return space(trial)

drive(opened(folder, url=where, space=torn_space), TRIALS, meets)
"""


@pytest.mark.parametrize("url", FILE_AND_DATABASE)
@pytest.mark.parametrize("moment", ["before", "begun", "suggested", "reported"])
def test_a_killed_driver_loses_and_repeats_nothing(tmp_path: Path, moment: str, url: str) -> None:
    """Two kills, and what the third driver has is what one would have had without them."""
    twin, killed = tmp_path / "twin", tmp_path / "killed"
    twin.mkdir()
    killed.mkdir()
    expected = drive(opened(twin, url=url), TRIALS)
    for times in ("2", "4"):
        command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(killed)]
        done = subprocess.run([*command, moment, times, url], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    begun: list[int] = []
    journal = opened(killed, url=url)
    before = {record.number for record in journal.records() if record.state != "running"}
    begin = journal.begin
    journal.begin = lambda: begun.append((found := begin())[0]) or found  # type: ignore[method-assign,func-returns-value]
    records = drive(journal, TRIALS)
    if moment != "suggested":  # then one never ran, and what it had not drawn is drawn anew
        assert records == expected
    assert before
    assert sorted({*before, *begun}) == list(range(TRIALS)), "none lost"
    assert len(before) + len(begun) == TRIALS, "none run twice"


@pytest.mark.parametrize("torn", [1, 7, 40])
def test_half_a_line_at_the_end(tmp_path: Path, torn: int) -> None:
    """Optuna alone would write its next line behind the half one and lose both."""
    drive(opened(tmp_path), 4)
    path = tmp_path / FILE
    os.truncate(path, path.stat().st_size - torn)
    records = drive(opened(tmp_path), TRIALS)
    assert len(records) == TRIALS
    assert opened(tmp_path).records() == records
    for line in path.read_text().splitlines():
        json.loads(line)


def test_more_trials_later(tmp_path: Path) -> None:
    first = drive(opened(tmp_path), 4)
    assert drive(opened(tmp_path), TRIALS) == drive(opened(tmp_path / "at once"), TRIALS)
    assert drive(opened(tmp_path), TRIALS)[:4] == first


def test_seeds_draw_differently(tmp_path: Path) -> None:
    drawn = [drive(opened(tmp_path / str(seed), seed=seed), 3) for seed in (0, 1, 0)]
    drawn.append(drive(opened(tmp_path / "again", seed=0), 3))
    values = [[record.overrides for record in records] for records in drawn]
    assert values[0] == values[2] == values[3]
    assert all(a != b for a in values[0] for b in values[1])


def test_trials_side_by_side_draw_apart(tmp_path: Path) -> None:
    """The next is not where one that runs already is, though that has no score yet."""

    def line(trial: optuna.Trial) -> dict[str, Any]:
        return {"recommender.dropout": trial.suggest_float("dropout", 0.0, 0.9)}

    def score(dropout: float) -> list[dict[str, float]]:
        return [{"validations": 1.0, METRIC: 1 - abs(dropout - 0.3), COST: 1.0}]

    journal = opened(tmp_path, space=line)
    for _ in range(30):
        number, values = journal.begin()
        journal.finish(number, score(values["recommender.dropout"]))
    beside = [journal.begin()[1]["recommender.dropout"] for _ in range(8)]
    assert len({round(value, 3) for value in beside}) == 8
    assert sum(abs(value - 0.3) < 0.2 for value in beside) >= 4, "the sampler has learnt"


def test_two_objectives_find_a_front(tmp_path: Path) -> None:
    records = drive(opened(tmp_path, cost=True), 40)
    study = opened(tmp_path, cost=True).study
    front = pareto_front(trial_rows(records, cost=True))
    assert {trial.number for trial in study.best_trials} == {row["number"] for row in front}


def narrow(trial: optuna.Trial) -> dict[str, Any]:
    return {"recommender.dropout": trial.suggest_float("dropout", 0.0, 1e-6)}


def renamed(trial: optuna.Trial) -> dict[str, Any]:
    return {"recommender.dropout": trial.suggest_float("rate", 0.0, 0.5)}


def smaller(trial: optuna.Trial) -> dict[str, Any]:
    return {"recommender.dropout": trial.suggest_float("dropout", 0.0, 0.5)}


def other_use(trial: optuna.Trial) -> dict[str, Any]:
    """The same values, for another setting."""
    found = space(trial)
    return {"projector.scale": 1 + found.pop("recommender.dropout"), **found}


@pytest.mark.parametrize("other", [narrow, renamed, smaller, other_use])
def test_a_study_of_another_space(tmp_path: Path, other: Space) -> None:
    records = drive(opened(tmp_path), 6)
    with pytest.raises(ConfigError, match="the study made-up is another; rename this one"):
        opened(tmp_path, space=other)
    assert opened(tmp_path).records() == records


def test_a_study_of_another_version_experiment_or_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(opened(tmp_path), 1)
    for changes in ({"base": "c"}, {"cost": True}):
        with pytest.raises(ConfigError, match="the study made-up is another"):
            opened(tmp_path, **changes)
    monkeypatch.setattr(rsllm, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"is another.*9\.9"):
        opened(tmp_path)


def test_storage_that_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not JSON\n" * 3)
    with pytest.raises(ConfigError, match="is no Optuna storage; move it away"):
        storage(tmp_path / FILE)
    for url in ("postgresql://me:secret@nowhere/db", "nothing", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(ConfigError, match="correct --optuna-storage") as refused:
            storage(tmp_path / FILE, url)
        assert "secret" not in str(refused.value)


BAD: dict[str, tuple[Space, str]] = {
    "an unknown path": (
        lambda trial: {"projector.width": trial.suggest_int("w", 1, 2)},
        "has no setting 'projector.width'",
    ),
    "refused in a part": (
        lambda trial: {"stage2.loss.alpha": trial.suggest_float("a", 0.0, 1.5)},
        "keep the sum below 1",
    ),
    "upside down": (
        lambda trial: {"projector.scale": trial.suggest_float("s", 2.0, 1.0)},
        "low.*high",
    ),
    "no choice": (
        lambda trial: {"projector.depth": trial.suggest_categorical("d", [])},
        "choices.*one or more",
    ),
    "a wrong type": (
        lambda trial: {"projector.depth": trial.suggest_float("d", 0.5, 1.0)},
        "should be a valid integer",
    ),
    "not JSON": (lambda trial: {"projector.depth": {1}}, "not JSON serializable"),
    "nothing": (lambda trial: None, "NoneType"),  # type: ignore[arg-type,return-value]
    "a typo": (lambda trial: {"projector.depth": {}["x"]}, "'x'"),
    "layout": (
        lambda trial: {"compute.workers": trial.suggest_int("w", 1, 64)},
        "compute.workers.*changes no result",
    ),
    "a recommender that decides the sets": (
        lambda trial: {
            "data.candidates": "recommender",
            "recommender.width": trial.suggest_categorical("w", [32, 64]),
        },
        r"recommender\.width.*sets of its own; choose uniform or popularity",
    ),
    "data that is not there": (
        lambda trial: {"data.source": trial.suggest_categorical("s", ["synthetic", "nope"])},
        "no asset is called 'nope'",
    ),
    "a backbone that is not there": (
        lambda trial: {"backbone.source": trial.suggest_categorical("s", ["nope"])},
        "backbone 'nope' is no local folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_space_that_cannot_work(tmp_path: Path, tiny_llm: Path, case: str) -> None:
    bad, message = BAD[case]
    base = {"data.source": "synthetic", "backbone.source": str(tiny_llm)}
    pipeline = Pipeline(replace_in(Experiment(), base), tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        check_space(pipeline, bad, [])
    check_space(pipeline, space, [{"dropout": 0.1, "slots": False}])


@pytest.mark.parametrize(
    ("guess", "message"),
    [
        ({"droput": 0.1}, "droput.*does not ask for"),
        ({"dropout": 0.9}, "out of range"),
        ({"dropout": 0.1, "slots": "maybe"}, "'maybe' not in"),
        ({"dropout": 0.1, "slots": False, "depth": 1}, "depth.*does not ask for"),
    ],
)
def test_a_first_guess_that_is_none_of_the_space(
    tmp_path: Path, tiny_llm: Path, guess: dict[str, Any], message: str
) -> None:
    base = {"data.source": "synthetic", "backbone.source": str(tiny_llm)}
    pipeline = Pipeline(replace_in(Experiment(), base), tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_space(pipeline, space, [guess])


def test_tuned_values_keep_apart() -> None:
    """Two of one last name, and one that a column has: by more of their paths, in every trial."""
    both = {"stage1.samples": 8, "stage2.samples": 16, "backbone.source": "x", "data.source": "y"}
    assert short_names({"stage2.loss.alpha": 0.1}) == {"alpha": 0.1}
    assert short_names(both) == both
    records = [
        TrialRecord(number=0, state="finished", overrides=both, curve=[{METRIC: 0.5}]),
        TrialRecord(number=1, state="finished", overrides={"data.source": "z"}),
    ]
    assert [row["parameters"] for row in trial_rows(records)] == [both, {"data.source": "z"}]
    assert "data.source" in table(records, 2)
    assert short_names({"stage2.samples": 16}) == {"stage2.samples": 16}


def test_the_best_of_many_guesses_is_no_finding() -> None:
    """Without the number of trials 95 % of such searches would have p below 5 %."""
    rng = np.random.default_rng(0)

    def search() -> float:
        guesses = (1 / rng.integers(1, 21, size=(60, 48))).mean(axis=1)
        trials = [
            TrialRecord(number=n, state="finished", overrides={}, curve=[{METRIC: float(score)}])
            for n, score in enumerate(guesses)
        ]
        best = max(trials, key=lambda trial: trial.score or 0.0)
        return float(summarise(best, trials, 48, 20)["p_beats_chance"])

    assert np.mean([search() < 0.05 for _ in range(40)]) <= 0.15
