"""Where a gain comes from and what quality costs: the two scripts, and one at tiny scale."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from made_up import arguments_for, cell, estimate
from safetensors.torch import load_file

from rsllm.config import Experiment, LossConfig
from rsllm.config.plain import from_dict, to_dict
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.groups import BY_COUNT
from rsllm.evaluate.rank import candidate_sets, score_candidates
from rsllm.model import tuned
from rsllm.model.objective import LanguageObjective
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.report.figures import of_grid, write_figure
from rsllm.store.artifacts import Store, manifest
from rsllm.study import paper
from rsllm.study.grid import Grid, datasets, run, show, tables_on_file
from rsllm.study.results import slug

WHOLE, TITLES, HISTORY = "RSLLM", "RSLLM, shuffled titles", "RSLLM, shuffled history"
SLOTS = "slot rule"


def functions(name: str) -> dict[str, Any]:
    return runpy.run_path(str(jobs.ROOT / "experiments" / f"{name}.py"))


def script(name: str) -> Grid:
    found: Grid = functions(name)["GRID"]
    return found


@pytest.mark.parametrize("name", ["explain_gain", "measure_efficiency"])
def test_claims_and_curves_are_of_entries(name: str) -> None:
    grid = script(name)
    assert len(set(grid.names)) == len(grid.names)
    assert {name for c in grid.claims for name in (c.first, c.second)} <= set(grid.names)
    drawn = {name for lines in grid.curves.values() for names in lines.values() for name in names}
    assert drawn == (set(grid.names) if name == "measure_efficiency" else set())


@pytest.mark.parametrize("budget", paper.BUDGETS)
def test_what_is_spoilt_is_not_trained_again(budget: str, tmp_path: Path) -> None:
    grid = script("explain_gain")
    arguments = arguments_for(grid, tmp_path, budget=paper.BUDGETS[budget], data=["movielens-100k"])
    (dataset,) = datasets(grid, arguments)
    whole = dataset.entries[WHOLE][1]
    same = {name for name, (_, experiment) in dataset.entries.items() if experiment == whole}
    assert {name for name in dataset.entries if name.startswith("RSLLM")} <= same
    assert len({dataset.key(name) for name in dataset.entries}) == len(dataset.entries)


@pytest.mark.parametrize("budget", ["quick", "hour", "full"])
def test_points_differ_in_what_they_cost_alone(budget: str, tmp_path: Path) -> None:
    grid = script("measure_efficiency")
    arguments = arguments_for(grid, tmp_path, budget=paper.BUDGETS[budget], data=["movielens-100k"])
    (dataset,) = datasets(grid, arguments)
    for names in grid.curves["samples"].values():
        each = [to_dict(dataset.entries[name][1]) for name in names]
        tuned = dataset.entries[names[0]][0].kind == "tuned"
        path = ("stage2", "samples") if tuned else ("recommender", "max_epochs")
        spent = [experiment[path[0]].pop(path[1]) for experiment in each]
        assert spent == sorted(set(spent))
        assert all(experiment == each[0] for experiment in each)
    for _, experiment in dataset.entries.values():
        assert experiment.stage2.samples % experiment.stage2.batch_size == 0
        before = experiment.stage2.prompts == "choice" and dataset.experiment.stage1.samples
        assert experiment.stage1.samples == before


def test_a_figure_of_curves(tmp_path: Path) -> None:
    """Every known point stands where its cost and its HR@1 are."""
    grid = script("measure_efficiency")
    arguments = arguments_for(grid, tmp_path, budget=paper.BUDGETS["hour"], data=["movielens-100k"])
    (dataset,) = datasets(grid, arguments)
    for place, name in enumerate(grid.names[:-1], start=1):
        costs = {"samples": 10.0 * place, "seconds": 2.0 * place, "trainable": place}
        one = cell(name, dataset.key(name), 0.02 * place, **costs)
        dataset.cells.write(dataset.name, dataset.key(name), slug(name), one)
    show(tmp_path, grid, arguments, {})
    figure = (tmp_path / "figure.svg").read_text()
    assert (tmp_path / "page.html").read_text().count("<svg") == 1
    for said in (
        "training samples",
        "training, seconds",
        "training tokens",
        "trained numbers",
        "RSLLM (Caser)",
        "text only",
    ):
        assert f"<!-- {said} -->" in figure
    points = curves(tables_on_file(grid, arguments), tmp_path, grid)
    text = {name: place for place, name in enumerate(grid.names, start=1)}
    names = [f"text only{suffix}" for suffix in (", 1/8", ", 1/4", ", 1/2", "")]
    expected = [(10.0 * text[name], pytest.approx(0.02 * text[name])) for name in names]
    assert points["samples", "text only"] == expected
    assert len(points["trainable", "RSLLM (SASRec), by LoRA rank"]) == 2, "one is not on file"


def curves(
    parts: Any, folder: Path, grid: Grid
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The points that matplotlib was given, by axis and label."""
    from matplotlib.axes import Axes

    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    plain = Axes.errorbar

    def noted(self: Axes, x: Any, y: Any, *more: Any, **style: Any) -> Any:
        column = list(grid.curves)[self.get_subplotspec().colspan.start]
        found[column, style["label"]] = list(zip(x, y, strict=True))
        return plain(self, x, y, *more, **style)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "errorbar", noted)
        write_figure(folder, of_grid(parts, grid.curves))
    return found


@pytest.fixture(scope="module")
def folder(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory, trained_here: None) -> Path:
    """Store, cells and page of RSLLM, of two spoilt ones and of a rule, at tiny scale."""
    folder = tmp_path_factory.mktemp("gain")
    words = ["--budget", "tiny", "--data", "synthetic", "--backbone", str(tiny_llm)]
    words += ["--storage", str(folder / "store"), "--cells", str(folder / "cells")]
    words += ["--set", "compute.threads=1"]
    words += [word for name in (WHOLE, TITLES, HISTORY, SLOTS) for word in ("--only", name)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["explain_gain.py", *words])
        run(script("explain_gain"), "", str(folder / "explain_gain.py"))
    return folder


def on_file(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"cells/*/{slug(name)}-[0-9a-f]*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.ray
def test_one_training_is_judged_again(folder: Path) -> None:
    assert len(list(folder.glob("store/stage-2/[0-9a-f]*/manifest.json"))) == 1
    cells = {name: on_file(folder, name) for name in (WHOLE, TITLES, HISTORY)}
    scores = {name: one["predictions"]["scores"][0] for name, one in cells.items()}
    assert len(set(scores.values())) == 3
    inputs = {
        name: manifest(folder / "store" / "evaluation" / one)["inputs"]
        for name, one in scores.items()
    }
    changed = {
        name: {key for key in facts if facts[key] != inputs[WHOLE].get(key)}
        for name, facts in inputs.items()
    }
    assert changed == {WHOLE: set(), TITLES: {"shuffle_titles"}, HISTORY: {"evaluation"}}
    assert "shuffle_titles" not in inputs[WHOLE], "so that older keys stay"
    assert (cells[WHOLE]["generation"] is None, cells[TITLES]["generation"]) == (False, None)
    assert len(list(folder.glob(f"cells/*/rsllm--{slug(TITLES)}-*.json"))) == 1
    groups = cells[WHOLE]["by_target"]
    assert sum(groups[name]["n"] for name in BY_COUNT) == cells[WHOLE]["n"] == 12
    (page,) = folder.glob("store/studies/*/page.html")
    text = page.read_text()
    for said in ("shuffled titles cost quality", "By target"):
        assert said in text


@pytest.mark.ray
def test_adapters_come_with_a_card(folder: Path) -> None:
    for stage, start in (("stage-1", "from the backbone"), ("stage-2", "from artifact ")):
        (path,) = folder.glob(f"store/{stage}/[0-9a-f]*/README.md")
        assert "README.md" in manifest(path.parent, verify=True)["files"]
        text = path.read_text()
        assert text.startswith("---\nlibrary_name: peft\n")
        assert start in text


def test_groups_stand_in_their_order(tmp_path: Path) -> None:
    """Files sort their keys; groups of nobody are left out, those of few show how many."""
    estimates = {"HR@1": estimate(0.4), "MRR": estimate(0.5)}
    first, second, third, last = BY_COUNT
    found = {first: {"n": 9} | estimates, second: {"n": 0}, third: {"n": 5} | estimates}
    grid = script("explain_gain")
    arguments = arguments_for(grid, tmp_path, budget=paper.BUDGETS["hour"], data=["movielens-100k"])
    (dataset,) = datasets(grid, arguments)
    one = cell(WHOLE, dataset.key(WHOLE), by_target={last: {"n": 2}} | found)
    dataset.cells.write(dataset.name, dataset.key(WHOLE), slug(WHOLE), one)
    (part,) = tables_on_file(grid, arguments)
    (table,) = (table for table in part.tables if table.title.startswith("By target"))
    assert table.title.endswith("movielens-100k")
    assert table.rows == [
        {"method": WHOLE, "targets": first, "n": 9} | estimates,
        {"method": WHOLE, "targets": third, "n": 5} | estimates,
        {"method": WHOLE, "targets": last, "n": 2},
    ]


@pytest.mark.ray
def test_the_slot_rule_has_the_vectors_of_the_slots(folder: Path) -> None:
    (scores,) = on_file(folder, SLOTS)["predictions"]["scores"]
    judged = manifest(folder / "store" / "evaluation" / scores)["inputs"]
    (tuned,) = folder.glob("store/stage-2/[0-9a-f]*")
    assert judged["scorer"] == "slot-rule"
    assert judged["artifact"] == manifest(tuned)["inputs"]["recommender"]
    assert len(list(folder.glob("cells/*/rsllm--slot-rule-*.json"))) == 1


@pytest.mark.ray
def test_slots_are_probed_before_and_after_the_projector(folder: Path) -> None:
    (tuned,) = folder.glob("store/stage-2/[0-9a-f]*")
    probing = functions("probe_slots")
    found = probing["probe"](tuned)
    inputs = manifest(tuned)["inputs"]
    data = PreparedData.open(folder / "store" / "data" / inputs["data"])
    vectors = ItemEmbeddings.load(tuned).standardised()
    slots = probing["projected"](tuned, vectors, inputs["projector"])
    own = {name: t.double() for name, t in load_file(tuned / "projector.safetensors").items()}

    def layer(name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows @ own[f"projector.{name}.weight"].T + own[f"projector.{name}.bias"]

    wide = vectors.double()
    inner = layer("mlp.0", wide)
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2  # GELU
    expected = layer("linear", wide) + layer("mlp.2", inner)
    torch.testing.assert_close(slots.double(), expected, rtol=1e-4, atol=1e-5)
    rows = data.rows("validation")
    ranks = []
    for row in range(len(rows)):
        last = vectors[rows.histories(row)[-1]]
        candidates = [int(item) for item in candidate_sets(rows)[row]]
        scores = {
            item: float(torch.cosine_similarity(last, vectors[item], 0)) for item in candidates
        }
        target = scores[int(rows.target_R[row])]
        ranks.append(sum(score >= target for score in scores.values()))
    mrr = sum(1 / rank for rank in ranks) / len(ranks)
    assert found["vectors"]["n"] == len(rows)
    assert found["vectors"]["by_recency"]["0"]["MRR"] == pytest.approx(mrr, abs=1e-3)
    assert 1 <= found["slots"]["directions"] <= vectors.shape[1]


@pytest.mark.ray
def test_cells_are_compared_on_the_users_left(folder: Path) -> None:
    """Against loops over the stored scores."""
    compare = functions("compare_cells")["compare"]
    paths = [next(folder.glob(f"cells/*/{slug(n)}-[0-9a-f]*.json")) for n in (WHOLE, HISTORY)]
    found = compare(paths, Store.at(folder / "store"), outside=5)
    rows = PreparedData.open(next(folder.glob("store/data/[0-9a-f]*"))).rows("test")
    last = len(rows) - 1
    known = {int(rows.user_R[round(place * last / 4)]) for place in range(5)}
    asked_for = [round(place * last / 11) for place in range(12)]
    means = []
    for path, compared in zip(paths, found["cells"], strict=True):
        (scored,) = json.loads(path.read_text())["predictions"]["scores"]
        file = folder / "store" / "evaluation" / scored / "scores.safetensors"
        hits: dict[int, list[bool]] = {0: [], 1: [], 2: []}
        for row, scores in zip(asked_for, load_file(file)["scores"][0].tolist(), strict=True):
            if int(rows.user_R[row]) not in known:
                place = candidate_sets(rows)[row].tolist().index(rows.target_R[row])
                beaten = [score < scores[place] for score in scores]
                hits[place * 3 // len(scores)].append(sum(beaten) == len(scores) - 1)
        every = [hit for third in hits.values() for hit in third]
        means.append(sum(every) / len(every))
        assert (compared["HR@1"]["n"], compared["HR@1"]["value"]) == (len(every), means[-1])
        for third, name in enumerate(("first third", "second third", "last third")):
            assert (name in compared) == bool(hits[third])
            if hits[third]:
                assert compared[name]["value"] == pytest.approx(sum(hits[third]) / len(hits[third]))
    assert 0 < len(every) < len(asked_for)
    assert found["pairs"][0]["difference"]["value"] == pytest.approx(means[0] - means[1])
    assert found["cells"][1]["differs"] == {"judged.evaluation.shuffle_history": True}


def test_a_linear_map_finds_what_is_in_states_and_nothing_else() -> None:
    explained, draw = functions("probe_layers")["explained"], torch.Generator().manual_seed(0)
    states = torch.randn(600, 12, generator=draw)
    vectors, half = states @ torch.randn(12, 6, generator=draw), torch.arange(600) < 300
    assert explained(states, vectors, half) == pytest.approx(1, abs=1e-3)
    assert explained(torch.randn(600, 12, generator=draw), vectors, half) < 0.1


@pytest.mark.ray
def test_layers_end_where_the_pointer_begins(folder: Path) -> None:
    """The last one is the model's own pointer; before the first one the rule is on slots."""
    (path,) = folder.glob("cells/*/rsllm-[0-9a-f]*.json")
    found = functions("probe_layers")["probe"](path, Store.at(folder / "store"))
    experiment = from_dict(Experiment, json.loads(path.read_text())["experiment"])
    (artifact,) = folder.glob("store/stage-2/[0-9a-f]*")
    data = PreparedData.open(next(folder.glob("store/data/[0-9a-f]*")))
    items, backbone = ItemEmbeddings.load(artifact), experiment.backbone.source
    how = {"items": items, "dtype": torch.float32}
    model = tuned.build(experiment, experiment.stage2.representation, backbone, data, **how)
    tuned.load(model, artifact)
    objective, rows = LanguageObjective(model.hybrid, LossConfig()), data.rows("validation")
    scores = score_candidates(objective, rows, model.encoder, data, "pointer", batch_size=4)
    places = (candidate_sets(rows) == rows.target_R[:, None]).argmax(1)
    ranks = [(own >= own[place]).sum() for own, place in zip(scores, places, strict=True)]
    first, *_, last = found["layers"]
    assert last["pointer"]["MRR"] == pytest.approx(sum(1 / r for r in ranks) / len(ranks), abs=0.02)
    assert first["R2"] > last["R2"]
    slots = model.hybrid.slots.projected(torch.arange(len(data.titles))).detach().double()
    slots -= slots[torch.from_numpy(candidate_sets(rows)).flatten().long()].mean(0)
    ranks = []
    for row, place in enumerate(places.tolist()):
        history = rows.histories(row)[::-1]
        scores = [
            sum(
                0.5**age * float(torch.cosine_similarity(slots[item], slots[candidate], 0))
                for age, item in enumerate(history.tolist())
            )
            for candidate in candidate_sets(rows)[row].tolist()
        ]
        ranks.append(sum(score >= scores[place] for score in scores))
    assert first["rule"]["MRR"] == pytest.approx(sum(1 / r for r in ranks) / len(ranks), abs=0.02)
