"""The main job end to end at tiny scale: interrupted, killed, finished, and given once more."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from jobs import Finished, artifacts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
TUNED = ("alpha", "beta")
TABLES = ("Trials, ranked by validation MRR", "Methods on the test users", "Paired comparisons")


def test_ctrl_c_in_the_search_ends_with_a_hint(main_job: Finished) -> None:
    assert main_job.interrupt_code == 130, main_job.interrupt_log
    assert "rsllm: interrupted; the same command continues" in main_job.interrupt_log
    assert "Traceback" not in main_job.interrupt_log


def test_killed_search_continues_without_loss_or_repetition(main_job: Finished) -> None:
    assert main_job.done.returncode == 0, main_job.done.stderr
    assert "continuing the search" in main_job.done.stdout
    after = artifacts(main_job.store)
    assert main_job.before.items() <= after.items()
    trials = main_job.results["trials"]
    assert [trial["number"] for trial in trials] == [0, 1]
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    for trial in trials:
        samples = [entry["samples"] for entry in trial["curve"]]
        assert samples == [8.0, 16.0][: len(samples)]
    for kind in ("recommender", "stage-1", "data"):
        assert len(artifacts(main_job.store, kind)) == 1
    finished = sum(trial["state"] == "finished" for trial in trials)
    own = len(artifacts(main_job.store, "stage-2")) - len(twins(main_job.results))
    assert finished <= own <= len(trials), "one that was to be stopped may have been done already"


def twins(results: dict[str, Any]) -> list[str]:
    untuned = ("recommender", "zero-shot", "keys alone", "text only")
    names = [method["name"] for method in results["methods"] if method["name"] not in untuned]
    return [name for name in names if not name.endswith((" + recommender", ", shuffled slots"))]


def test_tables_and_files_tell_the_outcome(main_job: Finished) -> None:
    for table in TABLES:
        assert table in main_job.done.stdout
    results = main_job.results
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
    with (main_job.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1"]
    for row, trial in zip(rows, results["trials"], strict=True):
        assert [float(row[name]) for name in TUNED] == [trial["parameters"][n] for n in TUNED]


def test_report_is_self_contained(main_job: Finished) -> None:
    page = (main_job.folder / "report.html").read_text()
    assert "<svg" in page
    assert re.findall(r"<(?:script|link|iframe)\b|(?:src|href)=\"(?!#|data:)", page) == []


def test_terminal_shows_progress_and_no_noise(main_job: Finished) -> None:
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
    shown = (main_job.done.stdout + main_job.done.stderr).splitlines()
    assert [line for line in shown if any(part in line for part in noise)] == []
    assert "2 of 2 trials done" in main_job.done.stdout


def test_adapters_load_with_plain_peft(main_job: Finished, tiny_llm: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for manifest in artifacts(main_job.store, "stage-2"):
        (config,) = manifest.parent.rglob("adapter_config.json")
        backbone = AutoModelForCausalLM.from_pretrained(tiny_llm)
        ids = torch.tensor([[1, 5, 9, 3]])
        plain = backbone(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(backbone, config.parent)(input_ids=ids).logits
        assert not torch.allclose(plain, tuned)


def test_same_command_again_trains_nothing(main_job: Finished, ray_cluster: str) -> None:
    results, before = main_job.results, artifacts(main_job.store)
    jobs.run_here(*main_job.command[1:])
    assert artifacts(main_job.store) == before
    repeated = main_job.results
    for document in (results, repeated):
        del document["provenance"], document["budget"]["minutes"]
    assert repeated == results
