"""Twenty steps of stage 2, step by step: a change of numbers must be meant.

A change that is meant: `RSLLM_GOLDEN=write python -m pytest tests/train/test_golden.py` writes the
file anew and shows by how much it moved; say why in the commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from small_tasks import language_task

from rsllm.data.prepared import PreparedData
from rsllm.train.engine import Engine

GOLDEN = Path(__file__).with_name("golden") / "tiny_stage2_cpu.json"
STEPS = 20
TOLERANCE = 1e-5
"""Relative; far above what other orders of summation change, far below what a bug does."""


def losses(data: PreparedData, backbone: Path) -> list[dict[str, float]]:
    task = language_task(data, backbone, samples=4 * STEPS)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    torch.manual_seed(0)
    return [engine.step(task.batches(step), step) for step in range(STEPS)]


def test_losses_are_those_on_file(
    data: PreparedData, random_llm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = losses(data, random_llm)
    if os.environ.get("RSLLM_GOLDEN") == "write":
        before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else found
        with capsys.disabled():
            for step, (old, new) in enumerate(zip(before, found, strict=True)):
                print(step, {name: new[name] - old.get(name, 0.0) for name in new})
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    for step, (entry, expected) in enumerate(
        zip(found, json.loads(GOLDEN.read_text()), strict=True)
    ):
        assert entry == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), f"step {step}"
    first, last = (
        sum(entry["loss/next_item"] for entry in part) for part in (found[:5], found[-5:])
    )
    assert last < first, "it learns"
