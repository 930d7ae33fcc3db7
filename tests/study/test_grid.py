"""What a grid asks for, and which settings decide a cell."""

from __future__ import annotations

import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up import arguments_for, small_grid

from rsllm.config import Experiment
from rsllm.config.models import recommender_titles
from rsllm.config.plain import replace_in, to_dict
from rsllm.errors import ConfigError
from rsllm.study import paper
from rsllm.study.grid import Grid, GridArguments, datasets, parse, tables_on_file
from rsllm.study.results import Cells, Entry

ROOT = Path(__file__).parents[2]
SCRIPTS = ("ablate", "compare_item_representations", "reproduce_main_table")
CHANGES = {
    "compute.threads": 1,
    "compute.precision": "fp32",
    "data.seed": 1,
    "evaluation.test_rows": 5,
    "recommender.width": 32,
    "backbone.lora_rank": 4,
    "prompt.candidate_slots": False,
    "stage2.loss.gamma": 1.0,
}
DECIDE: dict[Any, set[str]] = {
    "tuned": set(CHANGES) - {"compute.threads"},
    "zero-shot": {
        "compute.precision",
        "data.seed",
        "evaluation.test_rows",
        "backbone.lora_rank",
        "prompt.candidate_slots",
    },
    "recommender": {"data.seed", "evaluation.test_rows", "recommender.width"},
    "popularity": {"data.seed", "evaluation.test_rows"},
}


def script(name: str) -> Grid:
    found: Grid = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["GRID"]
    return found


@pytest.mark.parametrize("kind", DECIDE)
def test_what_decides_a_cell(kind: Any) -> None:
    entry = Entry(name="x", kind=kind)
    key = entry.key(Experiment(), [0])
    changed = {path: replace_in(Experiment(), {path: value}) for path, value in CHANGES.items()}
    assert {path for path, other in changed.items() if entry.key(other, [0]) != key} == DECIDE[kind]
    assert (entry.key(Experiment(), [0, 1]) != key) == (kind in ("tuned", "recommender"))
    other = {"judged": {"projector.shuffle_items": True}}, {"fused": True}
    assert all(Entry(name="x", kind=kind, **more).key(Experiment(), [0]) != key for more in other)
    titles = replace_in(Experiment(), {"recommender.items": "title"})
    prompts = replace_in(titles, {"prompt.candidate_slots": False})
    if kind == "recommender":
        assert entry.key(titles, [0]) != entry.key(prompts, [0]), "of the titles' vectors"


def test_settings_and_their_order(tmp_path: Path) -> None:
    """The budget's, the data's, the user's, the entry's; a preset of the data before the user's."""
    settings = {"recommender.model": "caser", "stage2.samples": 64}
    grid = small_grid(
        "a", "b", data=paper.DATA, entries=lambda base: [Entry(name="a", settings=settings)]
    )
    user = {"recommender.dropout": 0.5, "stage2.samples": 32, "stage1.samples": 8}
    arguments = arguments_for(grid, tmp_path, data=["llara-steam-sample"], settings=user)
    (dataset,) = datasets(grid, arguments)
    _, experiment = dataset.entries["a"]
    found = to_dict(experiment)
    assert (found["data"]["source"], found["data"]["split"]) == ("llara-steam-sample", "given")
    assert found["recommender"]["model"] == "caser"
    assert found["recommender"]["weight_decay"] == 0.01, "as tuned for Steam"
    assert found["recommender"]["dropout"] == 0.5
    assert (found["stage1"]["samples"], found["stage2"]["samples"]) == (8, 64)


def test_a_cell_is_found_under_another_name(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.write("synthetic", "aa11", "recommender", {"MRR": 0.3})
    assert cells.read("synthetic", "aa11") == {"MRR": 0.3}
    cells.write("synthetic", "aa11", "sasrec", {"MRR": 0.4})
    assert cells.read("synthetic", "aa11") == {"MRR": 0.4}
    assert [path.name for path in tmp_path.rglob("*.json")] == ["recommender-aa11.json"]
    assert cells.read("synthetic", "bb22") is None


def test_equal_data_sets_are_one(tmp_path: Path) -> None:
    data = {"one": {"data.window": 5}, "other": {"data.window": 6}, "one again": {"data.window": 5}}
    grid = small_grid("a", "b", data=data)
    assert [dataset.name for dataset in datasets(grid, arguments_for(grid, tmp_path))] == [
        "one",
        "other",
    ]
    user = arguments_for(grid, tmp_path, settings={"data.window": 4})
    assert [dataset.name for dataset in datasets(grid, user)] == ["one"]


def chosen(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> GridArguments:
    monkeypatch.setattr(sys, "argv", ["x.py", "--storage", str(folder / "store"), *flags])
    for name in ("RSLLM_BUDGET", "RSLLM_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    grid = small_grid("a", "b", budgets=paper.BUDGETS, data=paper.DATA)
    return parse(grid, "", folder / "x.py")


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--budget", "hour", "--data", "llara-lastfm", "--data", "mine", "--only", "b"]
    flags += ["--seeds", "3", "--recommender", "caser", "--set", "stage2.curriculum=true"]
    found = chosen(monkeypatch, tmp_path, *flags)
    assert (found.data, found.only, found.num_seeds) == (["llara-lastfm", "mine"], ["b"], 3)
    assert found.settings == {"recommender.model": "caser", "stage2.curriculum": True}
    again = shlex.split(found.command)
    assert again[:2] == ["python", "experiments/x.py"]
    assert str(tmp_path) not in found.command
    assert chosen(monkeypatch, tmp_path, *again[2:]) == found
    usual = chosen(monkeypatch, tmp_path, "--render")
    assert (usual.budget_name, usual.data) == ("quick", ["movielens-100k"])
    assert chosen(monkeypatch, tmp_path, "--budget", "full").data == list(paper.DATA)
    with pytest.raises(ConfigError, match="budget 'none' is unknown"):
        chosen(monkeypatch, tmp_path, "--budget", "none")
    with pytest.raises(ConfigError, match="--seeds is 0"):
        chosen(monkeypatch, tmp_path, "--budget", "full", "--seeds", "0")


def test_the_data_of_a_file_of_settings_are_the_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('data.source = "mine"\n[stage2]\ncurriculum = true\n')
    flags = ["--budget", "full", "--config", str(file)]
    found = chosen(monkeypatch, tmp_path, *flags)
    assert (found.data, found.settings) == (["mine"], {"stage2.curriculum": True})
    assert chosen(monkeypatch, tmp_path, *flags, "--data", "toys").data == ["toys"]
    assert chosen(monkeypatch, tmp_path, *shlex.split(found.command)[2:]) == found


def test_cells_lie_beside_the_script_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(monkeypatch, tmp_path, "--render")
    assert found.cells.root == tmp_path / "store" / "cells"
    (tmp_path / "results" / "cells").mkdir(parents=True)
    assert chosen(monkeypatch, tmp_path, "--render").cells.root == tmp_path / "results" / "cells"
    found = chosen(monkeypatch, tmp_path, "--render", "--cells", "elsewhere")
    assert found.cells.root == Path("elsewhere")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("budget", ["quick", "full"])
def test_an_experiment_compares_at_equal_samples(name: str, budget: str, tmp_path: Path) -> None:
    grid = script(name)
    assert {each for c in grid.claims for each in (c.first, c.second) if each} <= set(grid.names)
    arguments = arguments_for(grid, tmp_path, budget=paper.BUDGETS[budget], data=list(paper.DATA))
    for dataset in datasets(grid, arguments):
        tuned = [
            experiment for entry, experiment in dataset.entries.values() if entry.kind == "tuned"
        ]
        samples = {experiment.stage1.samples + experiment.stage2.samples for experiment in tuned}
        assert len(samples) == 1
        keys = [dataset.key(entry) for entry in dataset.entries]
        assert len(set(keys)) == len(keys)


def test_the_main_table_has_both_losses_and_published_gains() -> None:
    grid = script("reproduce_main_table")
    entries = {entry.name: entry for entry in grid.entries(grid.base)}
    models = len(recommender_titles())
    assert len(grid.names) == 4 + models + 2 * (2 + 2 * models)
    for name, entry in entries.items():
        if entry.kind == "tuned":
            gamma = entry.settings["stage2.loss.gamma"]
            assert gamma == (3.0 if name.endswith(" + ranking") else 0.0)
    gains = {(c.first, c.second): c.gains for c in grid.claims}
    found = gains["RSLLM (Caser)", "Caser"]
    assert found == {
        "movielens-100k": 0.0876,
        "llara-steam-sample": 0.0506,
        "llara-lastfm": 0.2111,
    }
    assert gains["RSLLM (SASRec)", "LLaRA-like (SASRec)"] == {}
    rsllm = grid.published["RSLLM"]["movielens-100k"]
    assert not [v for row in rsllm.values() for v in row.values() if isinstance(v, float)]


def test_what_an_entry_sets_is_told_from_what_all_have(tmp_path: Path) -> None:
    grid = script("reproduce_main_table")
    (part,) = tables_on_file(
        grid, arguments_for(grid, tmp_path, data=["movielens-100k, all users"])
    )
    common, own = part.common, part.settings["LLaRA-like (SASRec) + ranking"]
    assert common["data"]["split"] == "leave-one-out"
    assert (common["stage2"]["loss"]["gamma"], own["stage2.loss.gamma"]) == (0.0, 3.0)
    assert (own["stage2.representation"], own["stage2.curriculum"]) == ("llara", True)
    assert not [path for path in own if path.startswith("data.")]


def test_rendering_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['ablate.py', '--render', '--storage', {str(tmp_path)!r}, '--cells', 'none']\n"
        "try: runpy.run_path('experiments/ablate.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, {'torch', 'ray'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stdout + done.stderr
    assert "movielens-100k  not run yet  RSLLM; no stage 1 (direct hybrid);" in done.stdout
