"""What verbs say with --json: what they say without, for programs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsllm.assets.catalogue import ASSETS
from rsllm.cli import main
from rsllm.data.audit import audit
from rsllm.doctor import report
from rsllm.errors import RsllmError
from rsllm.recommend.ranker import Ranker
from rsllm.store.artifacts import Store
from rsllm.terminal import as_json

Made = tuple[Store, dict[str, str]]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a verb printed; nothing but JSON may stand there."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_assets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RSLLM_CACHE", str(tmp_path))
    found = {asset["name"]: asset for asset in said(capsys, "fetch")}
    assert found.keys() == ASSETS.keys()
    movies = found["movielens-100k"]
    assert (movies["MB"], movies["here"], movies["kind"]) == (2, False, "data set")
    assert movies["from"].startswith("https://files.grouplens.org/")


def test_audit(capsys: pytest.CaptureFixture[str], made: Made) -> None:
    store, names = made
    folder = store.root / names["recommender"]
    found = said(capsys, "audit", str(folder))
    expected = [(finding.check, finding.verdict) for finding in audit(folder)]
    assert [(each["check"], each["verdict"]) for each in found] == expected


def test_runs(capsys: pytest.CaptureFixture[str], made: Made) -> None:
    store, names = made
    storage = ("--storage", store.location)
    listed = said(capsys, "runs", "ls", *storage)["artifacts"]
    assert {*names.values()} <= {each["name"] for each in listed}
    shown = said(capsys, "runs", "show", names["history"], *storage)
    (line,) = (each for each in listed if each["name"] == names["history"])
    assert shown | {"days": line["days"]} == line  # it has aged
    assert shown["settings"]["stage.prompts"] == "history"


def test_runs_that_have_not_ended_and_studies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for folder in ("running/stage-2-0123/step-3", "studies/asked", "studies/begun"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "studies/asked/results.json").write_text("{}")
    assert said(capsys, "runs", "ls", "--storage", str(tmp_path)) == {
        "artifacts": [],
        "unfinished": {"stage-2-0123": {"checkpoint": "step-3", "holder": None}},
        "studies": {"asked": {"ended": True}, "begun": {"ended": False}},
    }


def test_lists(capsys: pytest.CaptureFixture[str], made: Made, history_model: Ranker) -> None:
    store, names = made
    titles = history_model.data.titles[:2]
    asked = [word for title in titles for word in ("--history", title)]
    words = ("recommend", names["history"], "--storage", store.location, "--ranker", "catalogue")
    found = said(capsys, *words, "--precision", "fp32", "--k", "3", *asked)
    assert (found["model"], found["ranks by"]) == (names["history"], "catalogue")
    expected = replace(history_model, by="catalogue").recommend(titles, k=3)
    assert [each["title"] for each in found["lists"]] == expected["title"].tolist()


def test_lists_in_a_file(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    store, names = made
    path = tmp_path / "histories.csv"
    path.write_text("user_id,item_id\nu,i1\nu,i2\nv,i3\n")
    words = ["recommend", names["recommender"], "--storage", store.location]
    found = said(capsys, *words, "--histories", str(path), "--out", str(tmp_path / "lists.csv"))
    assert (found["users"], found["file"]) == (2, str(tmp_path / "lists.csv"))
    assert (tmp_path / "lists.csv").exists()


def test_checks(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are there, also where one fails."""
    checks = [("cache", "full", "fail", "make room"), ("token", "asked for", "ok", "")]
    with pytest.raises(RsllmError, match="1 of 2 checks failed: cache"):
        report(checks, for_programs=True)
    first, second = json.loads(capsys.readouterr().out)
    assert (first["remedy"], second["verdict"]) == ("make room", "ok")


def test_what_is_no_number_is_null() -> None:
    value = {"a": [math.nan, np.float32(0.5), np.int64(2)], "b": {"y", "x"}, "c": -math.inf}
    assert json.loads(as_json(value)) == {"a": [None, 0.5, 2], "b": ["x", "y"], "c": None}


def test_plans(
    capsys: pytest.CaptureFixture[str], made: Made, history_model: Ranker, random_llm: Path
) -> None:
    found = said(capsys, "plan", "--backbone", str(random_llm))
    assert found["parameters"] > found["trained"] > 0
    assert {way["fits"] for way in found["GiB per worker"]} <= {True, False}
    store, names = made
    lists = said(capsys, "plan", "--recommend", names["history"], "--storage", store.location)
    assert {row["ranker"] for row in lists["rankers"]} == {*history_model.rankers}
