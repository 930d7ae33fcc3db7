"""What each kind of artifact holds, number by number: a change must be meant, and raise a version.

Keys of artifacts carry the version of the code that makes them. A file here is of one version and
stays as it is: after a change that is meant, raise it in `rsllm/store/versions.py`, and
`RSLLM_GOLDEN=write python -m pytest tests/train/test_golden.py` writes the next one's file in place
of it; say why in the commit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_data import TITLES
from small_tasks import language_task, recommender_task

from rsllm.config import Experiment, PromptConfig
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.run import Method, _language_scores
from rsllm.model.title_vectors import title_vectors
from rsllm.store.versions import VERSIONS
from rsllm.train.engine import Engine

GOLDEN = Path(__file__).with_name("golden")
STEPS = 20
TOLERANCE = 1e-5
"""Relative; far above what other orders of summation change, far below what a bug does."""


def losses(task: Any) -> list[dict[str, float]]:
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    torch.manual_seed(0)
    return [engine.step(task.batches(step), step) for step in range(STEPS)]


def stage(number: int) -> Callable[[PreparedData, Path], list[dict[str, float]]]:
    name = f"stage{number}"
    return lambda data, llm: losses(language_task(data, llm, name=name, samples=4 * STEPS))


def recommender(data: PreparedData, _: Path) -> list[dict[str, float]]:
    return losses(recommender_task(data, max_epochs=STEPS))


def titles(_: PreparedData, llm: Path) -> list[dict[str, float]]:
    """Two numbers of each title's vector."""
    vectors_ID = title_vectors(llm, TITLES, PromptConfig(), threads=0)
    return [{"first": float(v[0]), "length": float(v.norm())} for v in vectors_ID]


def evaluation(data: PreparedData, llm: Path) -> list[dict[str, float]]:
    """An untuned model's scores of the candidates of each test row."""
    experiment = replace_in(Experiment(), {"evaluation.generation_rows": -1})
    method = Method(name="m", scorer="likelihood", experiment=experiment)
    layout: Any = SimpleNamespace(precision="fp32", use_gpu=False)
    scores, _ = _language_scores(method, data, [data.rows("test")], str(llm), layout)
    return [dict(zip("abcdefgh", map(float, row), strict=False)) for row in scores["scores"][0]]


NUMBERS = {
    "recommender": recommender,
    "stage-1": stage(1),
    "stage-2": stage(2),
    "titles": titles,
    "evaluation": evaluation,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_those_on_file(
    kind: str, data: PreparedData, random_llm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = NUMBERS[kind](data, random_llm)
    file = GOLDEN / f"{kind}-version-{VERSIONS[kind]}.json"
    if os.environ.get("RSLLM_GOLDEN") == "write" and not file.exists():
        for before in GOLDEN.glob(f"{kind}-version-*.json"):
            with capsys.disabled():
                for step, (old, new) in enumerate(
                    zip(json.loads(before.read_text()), found, strict=False)
                ):
                    print(kind, step, {name: new[name] - old.get(name, 0.0) for name in new})
            before.unlink()
        file.write_text(json.dumps(found, indent=1) + "\n")
    for step, (entry, expected) in enumerate(zip(found, json.loads(file.read_text()), strict=True)):
        assert entry == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), f"{kind} {step}"


@pytest.mark.parametrize("kind", ["recommender", "stage-2"])
def test_it_learns(kind: str) -> None:
    numbers = json.loads((GOLDEN / f"{kind}-version-{VERSIONS[kind]}.json").read_text())
    name = "loss" if kind == "recommender" else "loss/next_item"
    first, last = (sum(entry[name] for entry in part) for part in (numbers[:5], numbers[-5:]))
    assert last < first
