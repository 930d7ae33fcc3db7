"""What is added in one place appears everywhere: a metric, and a scorer of the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import estimate, study

from rsllm.evaluate.metrics import METRICS, Metric, expected_metrics, rank_metrics
from rsllm.report.page import tables, write_report
from rsllm.study.claims import Claim, compare, compare_cells
from rsllm.study.journal import TrialRecord
from rsllm.study.progress import table, trial_rows
from rsllm.study.search import _entry

NEW = "MAP@3"


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Average precision within the first three."""

    def of_ranks(ranks_R: Any) -> Any:
        return np.where(ranks_R <= 3, 1.0 / ranks_R, 0.0)

    monkeypatch.setitem(METRICS, NEW, Metric(of_ranks, brief=True, compared=True))


def test_a_metric_is_measured_searched_compared_and_shown(metric: None, tmp_path: Path) -> None:
    found = rank_metrics(np.array([1, 2, 4]))
    assert found[NEW].tolist() == [1, 0.5, 0]
    assert expected_metrics([0], [9], 5)[NEW] == [1.0]
    curve = [_entry({NEW: 0.25, "score": 0.5, "samples": 8, "time_total_s": 1})]
    assert curve == [{NEW: 0.25, "score": 0.5, "samples": 8.0}]
    record = TrialRecord(number=0, state="finished", overrides={}, curve=curve)
    assert trial_rows([record])[0][NEW] == 0.25
    assert NEW in table([record], 1)

    pairs = compare({"a": found, "b": rank_metrics(np.array([2, 2, 2]))}, [Claim("a", "b")], [NEW])
    assert pairs[0]["difference"]["value"] == 0
    tests = {"tests": {NEW: pairs[0], "HR@1": pairs[0]}}
    cells = {name: {"seeds": [0]} for name in "ab"}
    rows = compare_cells([Claim("a", "b")], cells, {("a", "b"): tests}, "here")
    assert [row["metric"] for row in rows] == ["HR@1", NEW]

    results = study()
    results["methods"][0]["metrics"][NEW] = estimate(0.123)
    results["trials"][0][NEW] = 0.321
    assert "0.123" in tables(results)
    write_report(tmp_path, results)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert NEW in text
        assert "0.123" in text
        assert "0.321" in text
