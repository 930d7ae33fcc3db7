"""A grid from nothing to its page at tiny scale: killed, finished, given again, moved elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import log_softmax
from scipy.stats import binomtest

from rsllm.data.prepared import PreparedData
from rsllm.errors import ConfigError
from rsllm.evaluate.rank import held_out
from rsllm.evaluate.run import read_scores
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.paper import BASE, RANKED
from rsllm.study.results import Entry, slug
from rsllm.train.health import warnings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
SCRIPT = "experiments/reproduce_main_table.py"
RULE, TUNED, JOINED = "popularity", "RSLLM (SASRec) + ranking", "joined"
MAIN: Grid = runpy.run_path(str(jobs.ROOT / SCRIPT))["GRID"]
FULL = {**RANKED, "recommender.model": "sasrec"}
SMALL = Grid(
    title="Small",
    question="Does it add up?",
    base=BASE,
    entries=lambda base: [
        Entry(name=RULE, kind="popularity"),
        Entry(name=TUNED, settings=FULL),
        Entry(name=JOINED, settings=FULL, fused=True),
    ],
    data={"gone": {"data.source": "no-such-folder"}, "synthetic": {"data.source": "synthetic"}},
    claims=[Claim(text="?", first=first, second=RULE) for first in (TUNED, JOINED)],
)
"""What the main table trains, joined with its recommender, and a data set that is not there."""


@dataclass(frozen=True)
class Place:
    """A folder in which the command is given."""

    folder: Path
    backbone: Path

    def words(self, store: str) -> list[str]:
        words = ["--budget", "tiny", "--backbone", str(self.backbone), "--set", "compute.threads=1"]
        words += ["--storage", str(self.folder / store), "--cells", str(self.cells)]
        return words

    @property
    def cells(self) -> Path:
        return self.folder / "cells"

    def give(self, grid: Grid, *more: str, store: str = "store") -> Path:
        """Run the command in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [SCRIPT, *self.words(store), *more])
            return run(grid, "", str(self.folder / SCRIPT))

    def files(self, pattern: str) -> dict[Path, int]:
        """When each last changed."""
        return {path: path.stat().st_mtime_ns for path in self.folder.glob(pattern)}

    def made(self, store: str = "store") -> dict[Path, int]:
        """What was trained and evaluated."""
        kinds = ("recommender", "stage-1", "stage-2", "evaluation")
        found = [self.files(f"{store}/{kind}/[0-9a-f]*/manifest.json") for kind in kinds]
        return {path: time for each in found for path, time in each.items()}

    def cell(self, name: str) -> dict[str, Any]:
        (path,) = self.cells.glob(f"synthetic/{slug(name)}-[0-9a-f]*.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


ONLY = ["--data", "synthetic", "--only", RULE, "--only", TUNED]


@pytest.fixture(scope="module")
def place(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Place:
    return Place(tmp_path_factory.mktemp("grid"), tiny_llm)


@pytest.fixture(scope="module")
def killed(place: Place) -> dict[Path, int]:
    """The cells that stood when the command was killed on its way."""
    command, log = [sys.executable, SCRIPT, *place.words("store"), *ONLY], place.folder / "log"
    with jobs.started(command, log) as job:
        jobs.wait_until(lambda: place.files("cells/*/*.json"), job, log)
        jobs.kill(job)
    return place.files("cells/*/*.json")


@pytest.fixture(scope="module")
def page(place: Place, killed: dict[Path, int]) -> Path:
    """The page's folder, once the same command ran to its end."""
    return place.give(MAIN, *ONLY)


@pytest.fixture(scope="module")
def small(place: Place, page: Path) -> tuple[Path, str]:
    """Another script on the same cells; what it says."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        folder = place.give(SMALL)
    return folder, output.getvalue()


def test_a_killed_run_goes_on_without_loss(
    place: Place, killed: dict[Path, int], page: Path
) -> None:
    assert killed
    after = place.files("cells/*/*.json")
    assert killed.items() <= after.items()
    assert len(after) == 2
    assert {"page.html", "page.md", "tables.tex", "figure.svg"} <= {p.name for p in page.iterdir()}


def test_a_cell_tells_all_but_users(place: Place, page: Path) -> None:
    cell = place.cell(TUNED)
    assert (cell["seeds"], cell["gamma"], cell["samples"], cell["n"]) == ([0], 3.0, 24.0, 12)
    for metric in ("HR@1", "HR@5", "NDCG@10", "MRR"):
        estimate = cell["metrics"][metric]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    for rule in ("LLaRA", "strict"):
        judged = cell["generation"]["free"][rule]
        assert {"ValidRatio", "hits_of_all", "hits_of_valid"} <= set(judged)
    assert min(cell["seconds"], cell["tokens"]) > 0
    assert cell["data"]["raw"]
    assert len(json.dumps(cell)) < 20_000
    assert place.cell(RULE).keys().isdisjoint({"seconds", "samples", "trainable"})


def test_trained_numbers_are_those_of_the_files(place: Place, page: Path) -> None:
    (folder,) = (path.parent for path in place.files("store/stage-2/[0-9a-f]*/manifest.json"))
    files = [folder / "adapter_model.safetensors", folder / "projector.safetensors"]
    numbers = sum(tensor.size for path in files for tensor in load_file(path).values())
    assert place.cell(TUNED)["trainable"] == numbers
    end = json.loads((folder / "training.json").read_text())["curve"][-1]
    assert place.cell(TUNED)["doubts"] == [warnings(end)]


def test_the_same_command_again_computes_nothing(place: Place, small: tuple[Path, str]) -> None:
    before = place.made() | place.files("cells/*/*.json")
    place.give(MAIN, *ONLY)
    place.give(SMALL)
    assert place.made() | place.files("cells/*/*.json") == before


def test_cells_on_file_are_not_trained_again_in_an_empty_store(
    place: Place, small: tuple[Path, str]
) -> None:
    before = place.files("cells/*/*.json")
    folder = place.give(SMALL, store="empty")
    assert place.made("empty") == {}
    assert place.files("cells/*/*.json") == before
    assert (folder / "page.md").read_text().count("not computed") == 0
    (comparison,) = place.cells.glob(f"*/{JOINED}--{RULE}-*.json")
    comparison.unlink()
    place.give(SMALL, store="empty")
    assert not comparison.exists(), "predictions are at hand in the first store alone"
    assert "joined against popularity: no such comparison" in (folder / "page.md").read_text()
    place.give(SMALL)
    assert comparison.exists()


def test_a_cell_of_other_data_is_measured_anew(place: Place, small: tuple[Path, str]) -> None:
    (path,) = place.cells.glob(f"synthetic/{RULE}-[0-9a-f]*.json")
    cell = place.cell(RULE)
    path.write_text(json.dumps({**cell, "data": {**cell["data"], "key": "another"}}))
    place.give(SMALL)
    assert place.cell(RULE)["data"]["key"] == cell["data"]["key"]


def test_what_is_not_there_is_left_out(place: Place, small: tuple[Path, str]) -> None:
    folder, said = small
    assert "gone is left out: " in said
    page = (folder / "page.md").read_text()
    assert re.search(r"\| gone +\| no asset is called 'no-such-folder'", page)
    with pytest.raises(ConfigError, match="no asset is called 'mistyped'"):
        place.give(SMALL, "--data", "mistyped")


def hits(place: Place, name: str) -> np.ndarray:
    """HR@1 of every test user, out of the scores in the store."""
    cell = place.cell(name)
    store = place.folder / "store"
    predictions = cell["predictions"]
    scores_RC = read_scores(store / "evaluation" / predictions["scores"][0])["scores"][0]
    if "weight" in predictions:
        alone = read_scores(store / "evaluation" / predictions["recommender"])["scores"][0]
        scores_RC = log_softmax(scores_RC, 1) + predictions["weight"] * log_softmax(alone, 1)
    data = PreparedData.open(store / "data" / cell["data"]["key"])
    (rows,) = held_out(data, "test", len(scores_RC))
    return np.array(
        [
            sum(score >= scores[list(candidates).index(target)] for score in scores) == 1
            for scores, candidates, target in zip(
                scores_RC, rows.candidates_RC, rows.target_R, strict=True
            )
        ]
    )


@pytest.mark.parametrize("first", [TUNED, JOINED])
def test_a_comparison_is_that_of_the_stored_scores(
    place: Place, small: tuple[Path, str], first: str
) -> None:
    ours, rule = hits(place, first), hits(place, RULE)
    assert place.cell(first)["metrics"]["HR@1"]["value"] == pytest.approx(ours.mean())
    (path,) = place.cells.glob(f"*/{slug(first)}--{RULE}-*.json")
    found = json.loads(path.read_text())["tests"]["HR@1"]
    assert found["difference"]["value"] == pytest.approx(ours.mean() - rule.mean())
    wins, losses = int((ours & ~rule).sum()), int((rule & ~ours).sum())
    assert found["test"] == "exact McNemar"
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found["p"] == pytest.approx(expected)
