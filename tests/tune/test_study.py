"""What a study says of made-up evaluations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_data import NUM_CANDIDATES, small_data

from rsllm.config import Experiment
from rsllm.evaluate.compare import per_user
from rsllm.evaluate.fuse import fused
from rsllm.evaluate.launch import Method, Outcome
from rsllm.evaluate.rank import held_out
from rsllm.settings import replace_in
from rsllm.tune import study
from rsllm.tune.search import TrialRecord
from rsllm.tune.study import Claim, Study

NUM_ROWS = 30
BASE = replace_in(Experiment(), {"data.num_candidates": NUM_CANDIDATES})


def made_up(seen: list[tuple[list[str], str]]) -> Any:
    """An `evaluate` that draws scores, and keeps what it was asked."""

    def evaluate(methods: Sequence[Method], split: str, **where: Any) -> list[Outcome]:
        seen.append(([method.name for method in methods], split))
        return [
            Outcome(
                method=method,
                scores_DRC=np.random.default_rng([len(method.name), split == "test"]).normal(
                    size=(1, NUM_ROWS, NUM_CANDIDATES)
                ),
                seconds=1.0,
            )
            for method in methods
        ]

    return evaluate


@pytest.mark.parametrize("title", ["../../x", "/etc/x", "a\\b", "..", "x" * 300, "Wh\u00e4t?"])
def test_a_title_is_no_path(title: str) -> None:
    named = Study(title=title, question="?", base=BASE, twins=lambda best: {}).name
    assert re.fullmatch(r"[a-z0-9-]{17,64}", named)


def test_the_winner_stands_beside_its_fusion_with_the_recommender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(tmp_path / "small", num_held_out=NUM_ROWS)
    seen: list[tuple[list[str], str]] = []
    monkeypatch.setattr(study, "evaluate", made_up(seen))
    names = ["recommender", "zero-shot", "best", "second best"]
    methods = [
        Method(
            name=name,
            scorer="recommender" if name == "recommender" else "likelihood",
            experiment=BASE,
        )
        for name in names
    ]
    asked = Study(
        title="made up",
        question="?",
        base=BASE,
        twins=lambda best: {},
        claims=[Claim("best", "zero-shot")],
    )
    pipeline: Any = SimpleNamespace(
        backbone="", fingerprint="", layout=None, store=SimpleNamespace()
    )
    best = TrialRecord(number=0, state="finished", overrides={}, curve=[{"score": 0.5}])
    found = study._judged(asked, pipeline, data, methods, "best", best)
    assert seen == [(["recommender", "best"], "validation"), (names, "test")]

    joined = "best + recommender"
    assert [entry["name"] for entry in found["methods"]] == [*names, joined]
    assert {(pair["first"], pair["second"]) for pair in found["pairs"]} == {
        ("best", "zero-shot"),
        (joined, "recommender"),
        (joined, "best"),
    }
    weight = found["fusion"]["weight"]
    assert dict(found["fusion"]["curve"])[weight] == max(mrr for _, mrr in found["fusion"]["curve"])
    assert any(
        "joined with the recommender" in note and f"{weight:.3g}" in note for note in found["notes"]
    )
    outcomes = dict(zip(names, made_up([])(methods, "test"), strict=True))
    scores_DRC = fused(outcomes["best"].scores_DRC, outcomes["recommender"].scores_DRC, weight)
    expected = per_user(scores_DRC, held_out(data, "test"))["MRR"].mean()
    assert found["methods"][-1]["metrics"]["MRR"]["value"] == pytest.approx(expected)
