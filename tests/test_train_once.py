"""The pipeline once, with language-model baselines, at tiny scale: every configuration is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import pytest

pytestmark = pytest.mark.ray
MAIN, VARIANTS = "RSLLM + pointer", ("without slots", "LLaRA-like", "LlamaRec-like")


@pytest.fixture(scope="module")
def store(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory, trained_here: None) -> Path:
    store = tmp_path_factory.mktemp("train") / "store"
    words = [*jobs.SMALL, "--backbone", str(tiny_llm), "--storage", str(store)]
    words += [word for name in VARIANTS for word in ("--only", name)]
    said = jobs.run_here("experiments/train_rsllm.py", *words)
    assert "Variants, ranked by validation MRR" in said
    return store


@pytest.fixture(scope="module")
def results(store: Path) -> dict[str, Any]:
    (path,) = (store / "studies").glob("train-rsllm-*/results.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_variant_is_judged_on_the_same_rows(results: dict[str, Any]) -> None:
    names = [method["name"] for method in results["methods"]]
    assert names == [
        "recommender",
        "zero-shot",
        "text only",
        MAIN,
        MAIN + ", shuffled slots",
        *VARIANTS,
        MAIN + " + recommender",
    ]
    assert {method["n"] for method in results["methods"]} == {8}
    pairs = {(pair["first"], pair["second"]) for pair in results["pairs"]}
    assert {(MAIN, name) for name in VARIANTS} <= pairs
    assert (MAIN + " + recommender", "recommender") in pairs


def test_constrained_answers_are_always_valid(results: dict[str, Any]) -> None:
    answered = {m["name"]: m["generation"] for m in results["methods"] if m["generation"]}
    assert {MAIN, *VARIANTS, "zero-shot", "text only"} <= set(answered)
    for name, decodings in answered.items():
        assert set(decodings) == {"free", "constrained"}, name
        assert decodings["constrained"]["strict"]["ValidRatio"]["value"] == 1.0, name


def test_curves_hold_both_stages_and_the_health_of_slots(results: dict[str, Any]) -> None:
    curves = {trial["name"]: trial["curve"] for trial in results["trials"]}
    assert [entry["samples"] for entry in curves[MAIN]] == [8.0, 16.0, 24.0]
    assert [entry["samples"] for entry in curves["LLaRA-like"]] == [8.0, 16.0]
    assert "health/slot_attention" in curves[MAIN][-1]
    assert "health/slot_attention" not in curves["without slots"][-1]


def test_tensorboard_finds_the_curves(store: Path) -> None:
    assert len(list((store / "tensorboard").glob("stage-2-*/events.out.tfevents.*"))) == 4


def test_the_report_shows_variants(store: Path) -> None:
    (page,) = (store / "studies").glob("train-rsllm-*/report.html")
    text = page.read_text()
    for shown in (*VARIANTS, "Health at the last validation", "Order of the candidates"):
        assert shown in text
