"""The main job end to end at tiny scale: interrupted, killed, finished, and given once more."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch

pytestmark = pytest.mark.timeout(1200)
TUNED = ("alpha", "beta")
TABLES = ("Trials, ranked by validation MRR", "Methods on the test users", "Paired comparisons")


@dataclass(frozen=True)
class Finished:
    """A study that was interrupted by Ctrl-C and SIGKILL on its way."""

    command: list[str]
    store: Path
    interrupt_code: int
    interrupt_log: str
    before: dict[Path, int]
    """Manifests that stood when it was killed, with their times of change."""
    done: subprocess.CompletedProcess[str]

    @property
    def folder(self) -> Path:
        (folder,) = (self.store / "studies").iterdir()
        return folder

    @property
    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return results


def artifacts(store: Path, kind: str = "*") -> dict[Path, int]:
    """Manifests of finished artifacts and when they last changed."""
    found = store.glob(f"{kind}/[0-9a-f]*/manifest.json")
    return {path: path.stat().st_mtime_ns for path in found}


def started_trials(store: Path) -> list[Path]:
    return list(store.glob("running/stage-2-*"))


@pytest.fixture(scope="module")
def study(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("job")
    store, log = folder / "store", folder / "log"
    command = [*jobs.SCRIPT, *jobs.TINY, "--backbone", str(tiny_llm), "--storage", str(store)]

    def run_until(reached: Callable[[], object], stop: Callable[[Any], object]) -> int | None:
        with jobs.started(command, log) as job:
            jobs.wait_until(reached, job, log)
            stop(job)
            return job.poll()

    def interrupt(job: subprocess.Popen[bytes]) -> None:
        job.send_signal(signal.SIGINT)
        job.wait(timeout=60)

    code = run_until(lambda: started_trials(store), interrupt)
    interrupt_log = log.read_text()
    run_until(lambda: artifacts(store, "stage-2"), jobs.kill)
    before = artifacts(store)
    done = jobs.run(command, seconds=600)
    return Finished(command, store, code or 0, interrupt_log, before, done)


def test_ctrl_c_in_the_search_ends_with_a_hint(study: Finished) -> None:
    assert study.interrupt_code == 130, study.interrupt_log
    assert "rsllm: interrupted; the same command continues" in study.interrupt_log
    assert "Traceback" not in study.interrupt_log


def test_killed_search_continues_without_loss_or_repetition(study: Finished) -> None:
    assert study.done.returncode == 0, study.done.stderr
    assert "continuing the search" in study.done.stdout
    after = artifacts(study.store)
    assert study.before.items() <= after.items()
    trials = study.results["trials"]
    assert [trial["number"] for trial in trials] == [0, 1]
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    for trial in trials:
        samples = [entry["samples"] for entry in trial["curve"]]
        assert samples == [8.0, 16.0][: len(samples)]
    kinds = {kind: len(artifacts(study.store, kind)) for kind in ("recommender", "stage-1", "data")}
    assert kinds == {"recommender": 1, "stage-1": 1, "data": 1}
    finished = sum(trial["state"] == "finished" for trial in trials)
    own = len(artifacts(study.store, "stage-2")) - len(twins(study.results))
    assert finished <= own <= len(trials), "one that was to be stopped may have been done already"


def twins(results: dict[str, Any]) -> list[str]:
    untuned = ("recommender", "zero-shot", "keys alone", "text only")
    names = [method["name"] for method in results["methods"] if method["name"] not in untuned]
    return [name for name in names if not name.endswith((" + recommender", ", shuffled slots"))]


def test_tables_and_files_tell_the_outcome(study: Finished) -> None:
    for table in TABLES:
        assert table in study.done.stdout
    results = study.results
    for trial in results["trials"]:
        assert set(trial["parameters"]) == set(TUNED)
        assert 0 < trial["MRR"] <= 1
    for method in results["methods"]:
        assert method["n"] == 8
        for estimate in method["metrics"].values():
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert results["pairs"]
    for pair in results["pairs"]:
        assert 0 <= pair["p"] <= pair["p_holm"] <= 1
        compared = {pair[side].removesuffix(", by likelihood") for side in ("first", "second")}
        assert compared <= {method["name"] for method in results["methods"]}
    assert {"rsllm", "packages", "python", "time"} <= set(results["provenance"])
    with (study.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1"]
    for row, trial in zip(rows, results["trials"], strict=True):
        assert [float(row[name]) for name in TUNED] == [trial["parameters"][n] for n in TUNED]


def test_report_is_self_contained(study: Finished) -> None:
    page = (study.folder / "report.html").read_text()
    assert "<svg" in page
    assert re.findall(r"<(?:script|link|iframe)\b|(?:src|href)=\"(?!#|data:)", page) == []


def test_terminal_shows_progress_and_no_noise(study: Finished) -> None:
    noise = (
        "Requesting resources",
        "Reporting training result",
        "PreemptionWatcher",
        "Setting accelerator",
        "Loading weights",
        "FutureWarning",
        "Setting up process group",
        "Traceback",
    )
    shown = (study.done.stdout + study.done.stderr).splitlines()
    assert [line for line in shown if any(part in line for part in noise)] == []
    assert "2 of 2 trials done" in study.done.stdout


def test_adapters_load_with_plain_peft(study: Finished, tiny_llm: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for manifest in artifacts(study.store, "stage-2"):
        (config,) = manifest.parent.rglob("adapter_config.json")
        backbone = AutoModelForCausalLM.from_pretrained(tiny_llm)
        ids = torch.tensor([[1, 5, 9, 3]])
        plain = backbone(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(backbone, config.parent)(input_ids=ids).logits
        assert not torch.allclose(plain, tuned)


def test_same_command_again_trains_nothing(study: Finished) -> None:
    results, before = study.results, artifacts(study.store)
    again = jobs.run(study.command, seconds=240)
    assert again.returncode == 0, again.stderr
    assert artifacts(study.store) == before
    repeated = study.results
    for document in (results, repeated):
        del document["provenance"], document["budget"]["minutes"]
    assert repeated == results
