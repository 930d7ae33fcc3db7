"""A search whose driver is ended again and again: no trial is lost, none is trained twice."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jobs
import optuna
import pytest

from rsllm.study.journal import FILE, OVERRIDES, TrialRecord

pytestmark = [pytest.mark.faults, pytest.mark.long]
TRIALS = 4
SETTINGS = {
    "data.window": 5,
    "data.num_candidates": 8,
    "recommender.max_epochs": 6.0,
    "compute.threads": os.cpu_count(),  # one trial at a time
}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
Moment = Callable[[list[TrialRecord], int], bool]
MOMENTS: dict[str, Moment] = {
    "start": lambda found, ended: any(r.state == "running" and not r.curve for r in found),
    "middle": lambda found, ended: any(r.state == "running" and r.curve for r in found),
    "between": lambda found, ended: sum(r.state != "running" for r in found) > ended,
}


def records(store: Path) -> list[TrialRecord]:
    """What the journal says, read by plain Optuna."""
    journals = list(store.glob(f"studies/*/{FILE}"))
    if not journals:
        return []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(journals[0]))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    begun = [trial for trial in study.trials if OVERRIDES in trial.user_attrs]
    return list(map(TrialRecord.from_optuna, begun))


def artifacts(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.glob("recommender/*/manifest.json")}


def tear(folder: Path) -> None:
    """Half of every file that Ray keeps of the search."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(3), ids=[number.name for number in CODES])
def test_every_driver_but_the_last_is_ended(first: int, tmp_path: Path) -> None:
    """One signal at each moment, one after the other; each of the three starts with another."""
    store, log = tmp_path / "store", tmp_path / "log"
    sets = [word for path, value in SETTINGS.items() for word in ("--set", f"{path}={value}")]
    command = [sys.executable, "experiments/tune_recommender.py", "--budget", "quick", *sets]
    command += ["--data", "synthetic", "--trials", str(TRIALS), "--seeds", "1"]
    command += ["--storage", str(store)]
    made: dict[Path, int] = {}
    known: list[TrialRecord] = []
    numbers = itertools.islice(itertools.cycle(CODES), first, None)
    for number, reached in zip(numbers, MOMENTS.values(), strict=False):
        ended = sum(record.state != "running" for record in known)
        with jobs.started(command, log) as job:
            jobs.wait_until(lambda e=ended, r=reached: r(records(store), e), job, log)  # type: ignore[misc]
            job.send_signal(number)
            assert job.wait(timeout=120) == CODES[number], log.read_text()
        assert "Traceback" not in log.read_text()
        tear(store / "ray")
        assert made.items() <= artifacts(store).items()
        before, known, made = known, records(store), artifacts(store)
        assert keeps(before, known)
    done = jobs.run(command, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(store)
    assert keeps(known, found)
    assert [record.number for record in found] == list(range(TRIALS))
    assert {record.state for record in found} <= {"finished", "stopped"}
    assert made.items() <= artifacts(store).items(), "one was trained twice"


def keeps(before: list[TrialRecord], after: list[TrialRecord]) -> bool:
    """Whether trials keep their numbers and values, and what ended stays as it was."""
    pairs = list(zip(before, after, strict=False))
    same = all(old.overrides == new.overrides for old, new in pairs)
    ended = all(old == new for old, new in pairs if old.state != "running")
    return len(after) >= len(before) and same and ended
