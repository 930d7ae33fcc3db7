"""Searches under Ray Tune: killed, torn, stopped early, failing, and what they are called."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import optuna
import pytest
import ray.util.state

from rsllm.assets.catalogue import fingerprint
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.errors import ConfigError, TrainingError
from rsllm.pipeline import Pipeline
from rsllm.prompts.templates import TEXTS
from rsllm.store.versions import VERSIONS
from rsllm.study import search as module
from rsllm.study.journal import FILE, METRIC, OVERRIDES, TrialRecord, check_space
from rsllm.study.search import Search, Space, _entry, _trial_name, publish
from rsllm.study.study import Study

BASE = replace_in(
    Experiment(),
    {
        "data.source": "synthetic",
        "data.window": 5,
        "data.num_candidates": 8,
        "recommender.max_epochs": 3.0,
        "compute.threads": 1,
    },
)


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"recommender.dropout": trial.suggest_float("dropout", 0.0, 0.5)}


def make_search(store: Path, **changes: Any) -> Search:
    pipeline = Pipeline(BASE, store, watched="recommender")
    return Search(**{"pipeline": pipeline, "space": space, "name": "made-up", **changes})


# The search of experiments/README.md, as its reader would run it.

TRIALS = 6
SETTINGS = [word for path in ("data.window=5", "data.num_candidates=8") for word in ("--set", path)]
SETTINGS += ["--set", "recommender.max_epochs=3.0", "--set", "compute.threads=1"]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = (jobs.ROOT / "experiments" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(block.strip().splitlines()) <= 30
    path = tmp_path_factory.mktemp("script") / "search.py"
    path.write_text(block)
    return [sys.executable, str(path), "--budget", "quick", "--data", "synthetic", *SETTINGS]


@dataclass(frozen=True)
class Rerun:
    """A search that was killed, whose Ray notes were torn, and that was given again."""

    store: Path
    before: list[TrialRecord]
    artifacts: dict[Path, int]
    done: subprocess.CompletedProcess[str]
    after: list[TrialRecord]


def records(store: Path) -> list[TrialRecord]:
    """What the journal says, read by plain Optuna."""
    (path,) = store.glob(f"studies/*/{FILE}")
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    storage = optuna.storages.JournalStorage(backend)
    if not optuna.get_all_study_names(storage):  # made a moment after its file
        return []
    study = optuna.load_study(study_name=None, storage=storage)
    begun = [trial for trial in study.trials if OVERRIDES in trial.user_attrs]
    return list(map(TrialRecord.from_optuna, begun))


def artifacts(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.glob("recommender/*/manifest.json")}


@pytest.fixture(scope="module")
def rerun(script: list[str], tmp_path_factory: pytest.TempPathFactory) -> Rerun:
    folder = tmp_path_factory.mktemp("killed")
    store, log = folder / "store", folder / "log"
    command = [*script, "--storage", str(store), "--trials", str(TRIALS)]

    def two_ended() -> bool:
        found = records(store) if list(store.glob(f"studies/*/{FILE}")) else []
        return sum(record.state != "running" for record in found) >= 2

    with jobs.started(command, log) as job:
        jobs.wait_until(two_ended, job, log)
    before, made = records(store), artifacts(store)
    tear(store / "ray", folder / "canary")
    done = jobs.run(command, seconds=800)
    assert not (folder / "canary").exists(), "a pickle was read"
    return Rerun(store, before, made, done, records(store))


class Payload:
    """Its pickle makes a file in whoever reads it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def tear(folder: Path, canary: Path) -> None:
    """Pickles that run code in place of Ray's, half of its other files, and none of some."""
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(Payload(canary)))
        elif number % 3:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()


@pytest.mark.ray
@pytest.mark.timeout(1500)
class TestRerun:
    def test_it_ends_well(self, rerun: Rerun) -> None:
        assert rerun.done.returncode == 0, rerun.done.stdout + rerun.done.stderr
        assert "continuing the search width-and-rate-" in rerun.done.stdout
        assert f"{TRIALS} of {TRIALS} trials done, 0 failed" in rerun.done.stdout
        for noise in ("Traceback", "lost a worker", "PlacementGroupCleaner"):
            assert noise not in rerun.done.stdout + rerun.done.stderr

    def test_no_trial_is_lost_or_trained_twice(self, rerun: Rerun) -> None:
        assert [record.number for record in rerun.after] == list(range(TRIALS))
        for old, new in zip(rerun.before, rerun.after, strict=False):
            assert new.overrides == old.overrides
            if old.state != "running":
                assert new == old
        assert {record.state for record in rerun.after} <= {"finished", "stopped"}
        made = artifacts(rerun.store)
        assert rerun.artifacts.items() <= made.items()
        # A trial that is stopped may have reached its end before it heard of it.
        finished = sum(record.state == "finished" for record in rerun.after)
        assert finished <= len(made) <= TRIALS

    def test_a_stopped_trial_makes_room_for_the_next(self, rerun: Rerun) -> None:
        """Once a stopped trial's workers stayed, and all later ones waited for ever."""
        stopped = [record for record in rerun.after if record.state == "stopped"]
        assert stopped, "nothing was stopped; the test shows nothing"
        later = [r for r in rerun.after if r.number > stopped[0].number and r.curve]
        assert later
        for record in stopped:
            assert len(record.curve) < 3
        assert not list((rerun.store / "running").glob("*"))

    def test_more_trials_and_a_database(
        self, rerun: Rerun, script: list[str], ray_cluster: str
    ) -> None:
        url = f"sqlite:///{rerun.store}/optuna.db"
        words = ["--storage", str(rerun.store), "--seed", "1", "--trials", "1"]
        words += ["--optuna-storage", url]
        assert "1 of 1 trials done" in jobs.run_here(*script[1:], *words)
        (name,) = optuna.get_all_study_names(url)
        trials = optuna.load_study(study_name=name, storage=url).trials
        assert len(trials) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optuna-storage", "nothing"], "nothing is no Optuna storage"),
        (["--set", "recommender.num_heads=3"], "recommender.width 64 is not a multiple of"),
    ],
)
def test_bad_input_is_refused_at_once(
    script: list[str],
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert jobs.exit_code(*script[1:], "--storage", str(tmp_path), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ray").exists(), "Ray ran"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tune_recommender", ["--recommender", "gru4rec", "--seeds", "2"]),
        ("tune_backbone", ["--set", "stage2.samples=8", "--set", "evaluation.validation_rows=8"]),
        ("tune_projector", ["--set", "stage1.samples=8", "--set", "stage2.samples=8"]),
    ],
)
@pytest.mark.ray
def test_other_searches_end_in_a_report(
    name: str,
    changes: list[str],
    ray_cluster: str,
    tmp_path: Path,
    tiny_llm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(jobs.ROOT / "experiments")
    flags = ["--budget", "quick", "--data", "synthetic", "--backbone", str(tiny_llm), *SETTINGS]
    flags += ["--set", "recommender.max_epochs=1.0", "--trials", "2", *changes]
    monkeypatch.setattr(sys, "argv", [name, *flags, "--storage", str(tmp_path)])
    __import__(name).main()
    (folder,) = (path.parent for path in tmp_path.glob("studies/*/report.html"))
    results = json.loads((folder / "results.json").read_text())
    assert [trial["state"] for trial in results["trials"]] == ["finished"] * 2
    page = (folder / "report.html").read_text()
    if name == "tune_backbone":
        assert all(trial["objectives"]["device_seconds"] > 0 for trial in results["trials"])
        assert "Pareto front" in page
        assert "device_seconds" in page
        return
    if name == "tune_projector":
        claims = {pair["claim"] for pair in results["pairs"]}
        assert claims >= {"tuning the projector helps", "the language model reads its slots"}
        depth = results["trials"][results["search"]["best"]]["parameters"]["depth"]
        assert ("hidden layers help" in claims) == (depth > 0)
        return
    assert [row["seeds"] for row in results["confirm"]] == [[1000, 1001]] * 2
    best = max(results["confirm"], key=lambda row: row["mean"])
    assert best["name"] == f"trial {results['search']['best']}"
    assert "Validation MRR on fresh seeds" in page
    names = {actor.repr_name for actor in ray.util.state.list_actors(limit=1000, detail=True)}
    assert any(found.startswith("trial.0-seed-1000-") for found in names)


@pytest.mark.parametrize(
    ("name", "environment", "reason"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "No WandB API key found"),
        ("wandb", {"WANDB_MODE": "offline"}, ""),
        ("mlflow", {}, ""),
    ],
)
def test_a_tracker_is_asked_before_anything_runs(
    name: str,
    environment: dict[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(name)
    for key in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    local = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "HOME": str(tmp_path)}
    for key, value in (local | environment).items():
        monkeypatch.setenv(key, value)
    if not reason:
        assert make_search(tmp_path, track=name).track == name
        return
    with pytest.raises(ConfigError, match=f"--track {name}: {reason}"):
        make_search(tmp_path, track=name)


def test_a_tracker_that_is_not_installed(tmp_path: Path) -> None:
    missing = [name for name in ("mlflow", "wandb") if not find_spec(name)]
    for name in missing:
        with pytest.raises(ConfigError, match=rf"{name}.*pip install rsllm\[trackers\]"):
            make_search(tmp_path, track=name)


# Trials that train nothing, for what only Ray Tune can show.


def made_up_trial(notes: Path) -> Callable[..., None]:
    """A trainable that reports in place of a pipeline; its cells are sent by value."""

    def trial(config: dict[str, Any], **given: Any) -> None:
        import json
        import os
        import time

        from ray import tune

        from rsllm.errors import ConfigError

        number = config["number"]
        name = tune.get_context().get_trial_name()
        note = {"number": number, "name": name, "start": time.time()}
        if number == 1:
            raise ConfigError("stage2: out of memory; lower stage2.batch_size")
        if number == 2 or (number == 3 and not (notes / "3 died").exists()):
            (notes / f"{number} died").touch()
            os._exit(9)
        curve = []
        for validations in (1.0, 2.0, 3.0):
            time.sleep(0.3)
            score = 0.5 - config["overrides"]["recommender.dropout"] / 2
            spent = {"seconds": validations, "device_seconds": 2 * validations}
            curve.append({"validations": validations, "score": score, **spent})
            tune.report(curve[-1])
        folder = notes / str(number)
        folder.mkdir()
        (folder / "training.json").write_text(json.dumps({"curve": curve}))
        (folder / "manifest.json").write_text("{}")
        (folder / "note.json").write_text(json.dumps({**note, "end": time.time()}))
        tune.report(curve[-1] | {"artifact": str(folder)})

    return trial


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where made-up trials note when they ran."""
    notes = tmp_path / "store" / "notes"
    notes.mkdir(parents=True)
    monkeypatch.setattr(module, "_trial", made_up_trial(notes))
    monkeypatch.setattr(Pipeline, "prepare", lambda self: tmp_path)
    monkeypatch.setattr(Pipeline, "discard", lambda self: None)
    return notes


@pytest.mark.ray
def test_failures_are_isolated_explained_and_not_retried(
    ray_cluster: str, made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guesses = [{"dropout": 0.1 + i / 100} for i in range(6)]
    search = make_search(tmp_path / "store", first_guesses=guesses, cost=True)
    found = search.run(6)
    states = ["finished", "failed", "failed", "finished", "finished", "finished"]
    assert [record.state for record in found] == states
    assert [record.overrides["recommender.dropout"] for record in found] == [
        guess["dropout"] for guess in guesses
    ], "a space's first guesses come first"
    assert found[1].error == "stage2: out of memory; lower stage2.batch_size"
    assert "died" in str(found[2].error)
    shown = capsys.readouterr().out
    for number in (2, 3):  # its node may have gone, so it is tried once more, and that is said
        assert f"the driver of trial {number} died; it goes on in a new one later" in shown
    kept = search.folder / "failures"
    assert [path.name for path in sorted(kept.iterdir())] == ["trial-001.txt", "trial-002.txt"]
    assert "in trial" in (kept / "trial-001.txt").read_text(), "where it was raised"
    assert "trial 1 failed: stage2: out of memory" in shown
    assert "6 of 6 trials done, 2 failed, best score 0.450" in shown
    notes = [json.loads(path.read_text()) for path in made_up.glob("*/note.json")]
    assert all(re.fullmatch(r"\w[\w.-]{0,63}", note["name"], re.ASCII) for note in notes)
    (first,) = (note["name"] for note in notes if note["number"] == 0)
    assert first.startswith("000-dropout_0.1-")
    beside = [sum(a["start"] <= b["start"] < a["end"] for a in notes) for b in notes]
    assert max(beside) <= search.pipeline.layout.concurrent_trials
    assert make_search(tmp_path / "store", first_guesses=guesses, cost=True).run(6) == found
    assert [record.curve[-1]["device_seconds"] for record in found if record.curve] == [6.0] * 4
    called = {actor.repr_name for actor in ray.util.state.list_actors(limit=1000, detail=True)}
    assert {note["name"] for note in notes} <= called, "the dashboard shows which trial is which"


@pytest.mark.ray
def test_every_trial_fails(ray_cluster: str, made_up: Path, tmp_path: Path) -> None:
    search = make_search(tmp_path / "store")
    for _ in range(3):
        search.journal.end_unfinished(search.journal.begin()[0], error="no luck")
    for _ in range(2):
        with pytest.raises(TrainingError, match="every trial failed: no luck"):
            search.run(3)
    assert len(search.run(4)) == 4, "more trials may help"


# What needs no Ray.


@pytest.mark.parametrize(
    ("validations", "rungs"),
    [(2, [1]), (3, [1, 2]), (4, [1, 2]), (10, [1, 2, 4, 8]), (20, [3, 6, 12]), (1, [])],
)
def test_no_trial_is_stopped_at_its_last_report(
    validations: int, rungs: list[int], tmp_path: Path
) -> None:
    """Each trial is worse than those before it; the last one goes on from its last report."""
    epochs = replace_in(BASE, {"recommender.max_epochs": float(validations)})
    pipeline = Pipeline(epochs, tmp_path, watched="recommender")
    scheduler = make_search(tmp_path, pipeline=pipeline)._scheduler()

    def stops(number: int, *places: int) -> list[int]:
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        entries = ({"validations": float(place), METRIC: -float(number)} for place in places)
        decisions = [scheduler.on_trial_result(None, trial, entry) for entry in entries]
        return [place for place, word in zip(places, decisions, strict=True) if word == "STOP"]

    every = range(1, validations + 1)
    assert [stops(number, *every) for number in range(3)] == [[], rungs, rungs]
    assert stops(3, validations) == []


@pytest.mark.parametrize(("samples", "last"), [(8, 1), (24, 3), (800, 5)])
def test_a_stage_shorter_than_its_validations_has_as_many_as_steps(
    samples: int, last: int, tmp_path: Path
) -> None:
    stage = {"stage2.samples": samples, "stage2.batch_size": 8, "stage2.validations": 5}
    search = make_search(tmp_path, pipeline=Pipeline(replace_in(BASE, stage), tmp_path))
    assert search._scheduler()._max_t == last


def test_trials_of_an_earlier_driver_count_in_the_rungs(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    for score in (0.2, 0.4, 0.6):
        number, _ = search.journal.begin()
        search.journal.report(number, {"validations": 1.0, METRIC: score})
        search.journal.end_unfinished(number)
    scheduler = make_search(tmp_path)._scheduler()
    for score, decision in ((0.3, "STOP"), (0.5, "CONTINUE")):
        trial = SimpleNamespace(trial_id=str(score))
        scheduler.on_trial_add(None, trial)
        entry = {"validations": 1.0, METRIC: score}
        assert scheduler.on_trial_result(None, trial, entry) == decision


def test_a_search_goes_on_with_the_code_and_the_wording_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        _ = make_search(tmp_path).journal
    for place, name, value in ((VERSIONS, "recommender", 0), (TEXTS, "words", {})):
        with monkeypatch.context() as patch:
            patch.setitem(place, name, value)
            with pytest.raises(ConfigError, match="the study made-up is another; rename this one"):
                _ = make_search(tmp_path).journal


def test_one_search_at_a_time(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    with (
        search.pipeline.store.lock("search-made-up", wait=False),
        pytest.raises(ConfigError, match="runs search-made-up already"),
    ):
        make_search(tmp_path)


def test_ray_is_told_nothing_of_the_storage(tmp_path: Path) -> None:
    """It writes its searcher and callbacks into files."""
    from ray import cloudpickle

    url = f"sqlite:///{tmp_path}/secret.db"
    search = make_search(tmp_path, optuna_storage=url)
    for part in (module._Suggestions(search.journal), module._Notes(search, 2)):
        assert b"secret" not in cloudpickle.dumps(part)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"projector.depth": 2, "stage2.loss.alpha": 0.123456}, "007-depth_2-alpha_0.123-"),
        ({"backbone.source": "Qwen/Qwen2.5-0.5B"}, "007-source_Qwen.Qwen2.5-0.5B-"),
        ({"backbone.source": "../../\u00e9 x"}, "007-source_......x-"),
        ({f"recommender.width{i}": 1e-9 for i in range(20)}, "007-width0_1e-09-width1_1e-09-"),
    ],
)
def test_names_are_short_and_safe(overrides: dict[str, Any], name: str) -> None:
    trial = SimpleNamespace(config={"number": 7, "overrides": overrides})
    found = _trial_name("a search", trial)
    assert found.startswith(name)
    assert found != _trial_name("another", trial)
    assert re.fullmatch(r"\w[\w.-]{0,63}", found, re.ASCII)


def test_a_curve_keeps_all_that_a_stage_reports_and_nothing_of_tunes() -> None:
    ours = {
        "MRR": 0.5,
        "HR@1": 0.3,
        "loss/ranking": 1.0,
        "contrast/user_cosine": 0.4,
        "health/slot_scale": 2.0,
        "prompts/cut_titles": 3.0,
        "samples": 8.0,
        "seconds": 2.0,
        "device_seconds": 6.0,
        "validations": 1.0,
        METRIC: 0.5,
    }
    report = {**ours, "trial_id": "x", "training_iteration": 1, "pid": 7, "time_total_s": 2.0}
    assert _entry(report) == ours


def test_a_search_under_a_cost_is_reported_with_its_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = SimpleNamespace(facts={"counts": {"users": 12}})
    monkeypatch.setattr(Pipeline, "prepare", lambda self: tmp_path)
    monkeypatch.setattr(module.PreparedData, "open", lambda folder: data)
    monkeypatch.setattr(module, "held_out", lambda *given: [range(12)])
    curves = [
        {METRIC: score, "MRR": score, "device_seconds": cost, "seconds": cost, "samples": 8.0}
        for score, cost in ((0.4, 4.0), (0.3, 9.0))
    ]
    found = [
        TrialRecord(number=number, state="finished", overrides={"a.b": number}, curve=[entry])
        for number, entry in enumerate(curves)
    ]
    search = make_search(tmp_path, cost=True)
    folder = publish(search.pipeline, search.name, found, cost=True, title="T", question="Q?")
    results = json.loads((folder / "results.json").read_text())
    assert results["search"]["best"] == 0
    assert results["data"] == {"source": "synthetic", "users": 12}
    shown = capsys.readouterr().out.split("Pareto front")[1]
    assert [line.split() for line in shown.splitlines()[3:4]] == [["0", "0.4", "4", "0"]]
    assert "<dt>Backbone</dt>" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["tune_loss_weights", "tune_projector", "tune_recommender"])
def test_spaces_of_the_experiments(
    name: str, tmp_path: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(jobs.ROOT / "experiments")
    experiment = __import__(name)
    own = {"data.source": "synthetic", "backbone.source": str(tiny_llm), "backbone.layers": 0}
    watched = "recommender" if name == "tune_recommender" else "stage2"
    for budget in experiment.BUDGETS.values():
        base = replace_in(experiment.BASE, {**budget.overrides, **own})
        pipeline = Pipeline(base, tmp_path, watched=watched)  # type: ignore[arg-type]
        check_space(pipeline, experiment.space, experiment.FIRST_GUESSES)


def test_space_of_backbones(
    tmp_path: Path, tiny_llm: Path, random_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(jobs.ROOT / "experiments")
    experiment = __import__("tune_backbone")
    backbones = [str(tiny_llm), str(shutil.copytree(random_llm, tmp_path / "other"))]
    settings = tmp_path / "other" / "tokenizer_config.json"
    settings.write_text('{"add_prefix_space": false}')  # where there is one model, this one differs
    base = replace_in(experiment.BASE, {"data.source": "synthetic"})
    pipeline = Pipeline(base, tmp_path / "store")
    asked = (pipeline, experiment.space_over(backbones, "synthetic"), [])
    both = sorted(map(fingerprint, backbones))
    assert check_space(*asked) == both
    settings.write_text("{}")
    assert check_space(*asked) != both


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "ray::f()\n  File x\nrsllm.errors.ConfigError: stage2: out of memory",
            "stage2: out of memory",
        ),
        ("ray::f()\n  File x\nValueError", "ValueError"),
        ("The actor died.\n\tclass_name: F\nIts node is gone.", "The actor died."),
    ],
)
def test_why_a_trial_failed(tmp_path: Path, text: str, reason: str) -> None:
    search = make_search(tmp_path)
    number, _ = search.journal.begin()
    file = tmp_path / "error.txt"
    file.write_text(f"Failure # 1 (occurred at noon)\n{text}\n")
    trial = SimpleNamespace(config={"number": number}, error_file=str(file))
    notes = module._Notes(search, 1)
    notes.on_trial_error(trial=trial)
    if not text.startswith("ray::"):  # its driver died, and may do so once
        assert search.journal.begin()[0] == number
        notes.on_trial_error(trial=trial)
    assert (search.folder / "failures" / "trial-000.txt").read_text() == file.read_text()
    assert [(r.state, r.error) for r in search.journal.records()] == [("failed", reason)]


def test_where_a_search_runs_does_not_name_it(tmp_path: Path) -> None:
    """It may be continued with other workers, as out of memory is told to."""

    def named(**settings: Any) -> str:
        base = replace_in(Experiment(), settings)
        return Study(title="t", question="?", base=base, twins=lambda best: {}).name

    assert named() == named(**{"compute.workers": 2, "compute.zero_stage": 3})
    assert named() != named(**{"stage2.seed": 1})


def test_a_comment_in_its_space_makes_no_new_search() -> None:
    def plain() -> Space:
        def space(trial: optuna.Trial) -> dict[str, Any]:
            return {"recommender.dropout": trial.suggest_float("dropout", 0.0, 0.9)}

        return space

    def commented() -> Space:
        def space(trial: optuna.Trial) -> dict[str, Any]:
            # wide
            return {
                "recommender.dropout": trial.suggest_float("dropout", 0.0, 0.9),
            }

        return space

    def wider() -> Space:
        def space(trial: optuna.Trial) -> dict[str, Any]:
            return {"recommender.dropout": trial.suggest_float("dropout", 0.0, 0.95)}

        return space

    names = [
        Study(title="t", question="?", base=BASE, space=space(), twins=lambda best: {}).name
        for space in (plain, commented, wider)
    ]
    assert names[0] == names[1] != names[2]
