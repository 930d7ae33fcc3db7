"""What is added in one place appears everywhere: a metric, and a scorer of the catalogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import small_data
from test_report import estimate, study

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.errors import EvaluationError
from rsllm.evaluate.metrics import METRICS, Metric, expected_metrics, rank_metrics
from rsllm.evaluate.run import Method
from rsllm.evaluate.scorers import CATALOGUE_SCORERS, CatalogueScorer, catalogue_scorer
from rsllm.recommenders.rules import RULES
from rsllm.report.page import terminal_tables, write_report
from rsllm.study.claims import Claim, compare, compare_cells
from rsllm.study.journal import TrialRecord
from rsllm.study.progress import table, trial_rows
from rsllm.study.results import Entry
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
    assert "0.123" in terminal_tables(results)
    write_report(tmp_path, results)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert NEW in text
        assert "0.123" in text
        assert "0.321" in text


def test_a_scorer_is_made_and_decides_a_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def last_items_first(method: Method, data: Any) -> Any:
        return lambda rows: np.tile(np.arange(len(data.titles), dtype=float), (len(rows), 1))

    known = CatalogueScorer(last_items_first, "recommender", ("data", "recommender", "evaluation"))
    monkeypatch.setitem(CATALOGUE_SCORERS, "last items", known)
    monkeypatch.setitem(RULES, "last items, a rule", lambda data: last_items_first(method, data))
    data = small_data(tmp_path / "small")
    for name, seeded in (("last items", True), ("last items, a rule", False)):
        method = Method(name="x", scorer=name, experiment=Experiment())
        assert not method.is_language_model
        scores_RI = catalogue_scorer(name).make(method, data)(data.rows("test"))
        assert scores_RI.shape == (len(data.rows("test")), len(data.titles))
        entry = Entry(name="x", kind=name)
        wider = replace_in(Experiment(), {"recommender.width": 32})
        assert entry.trained_by == ("recommender" if seeded else "")
        assert (entry.key(Experiment(), [0]) != entry.key(Experiment(), [1])) == seeded
        assert (entry.key(Experiment(), [0]) != entry.key(wider, [0])) == seeded
    with pytest.raises(EvaluationError, match="no scorer is called 'first items'"):
        catalogue_scorer("first items").make(replace(method, scorer="first items"), data)
