"""A recommender of somebody else's package: one small file, which flags and artifacts then know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_data import TITLES, WINDOW
from small_tasks import recommender_task

from rsllm import recommenders
from rsllm.cli import build_parser
from rsllm.config import Experiment
from rsllm.config.models import RECOMMENDERS, recommender_titles
from rsllm.config.plain import replace_in
from rsllm.config.presets import preset
from rsllm.data.prepared import PreparedData
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.train.engine import Engine

MODULE = '''
from rsllm.recommenders.base import Recommender


class LastItem(Recommender):
    """What comes next is like what came last."""

    def forward(self, history_BH, length_B):
        return self.items.weight[history_BH.gather(1, length_B[:, None] - 1)[:, 0]]
'''
PATH = "their_recommender:LastItem"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package, as `pip install` leaves it."""
    (tmp_path / "their_recommender.py").write_text(MODULE)
    facts = tmp_path / "their_recommender-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-recommender\nVersion: 1.0\n"
    )
    (facts / "entry_points.txt").write_text(f"[rsllm.recommenders]\nlast-item = {PATH}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_every_process_finds_an_installed_one(package: Path) -> None:
    code = "from rsllm.config.models import RECOMMENDERS; print(RECOMMENDERS['last-item'])"
    path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == PATH


def test_flags_presets_tables_and_artifacts_know_it(
    package: Path,
    data: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(RECOMMENDERS, "last-item", PATH)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["fit", "--help"])
    assert "last-item" in "".join(capsys.readouterr().out.split()), "however lines are broken"
    chosen = replace_in(Experiment(), preset("last-item", "movielens-100k")).recommender
    assert chosen.model == recommender_titles()["LastItem"] == "last-item"

    task = recommender_task(data, model="last-item")
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    losses = [engine.step(task.batches(0), step)["loss"] for step in range(20)]
    assert losses[-1] < losses[0]
    (tmp_path / "artifact").mkdir()
    task.export(engine.trainable(), tmp_path / "artifact")
    fitted = recommenders.load(tmp_path / "artifact", task.config, len(TITLES), WINDOW)
    history_BH = torch.tensor([[3, 5, -1, -1]])
    table_IE = load_file(tmp_path / "artifact" / recommenders.FILE)["items.weight"]
    torch.testing.assert_close(fitted(history_BH, torch.tensor([2])), table_IE[[5]])
    assert ItemEmbeddings.load(tmp_path / "artifact").table_IE.shape == table_IE.shape
