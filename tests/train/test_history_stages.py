"""Stages on history prompts: which windows, equal weights under any ZeRO, and that they learn."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.small_models import stir
from safetensors.torch import load_file
from small_data import LENGTH, TITLES, small_data
from small_tasks import (
    SMALL,
    history_task,
    keys_task,
    language_task,
    made_up_items,
    made_up_titles,
)
from torch import Tensor
from world import run_in_world

from rsllm.compute.layout import Resources, lay_out
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import (
    EXPECTED,
    named,
    rank_catalogue,
    score_candidates,
    score_catalogue,
    target_places,
)
from rsllm.model import tuned
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import PADDING
from rsllm.prompts.histories import HistoryBatch
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import Store
from rsllm.train.assignment import Assignment
from rsllm.train.engine import Engine
from rsllm.train.health import SLOT_SCALE, SLOT_SPREAD
from rsllm.train.stages import LanguageTask
from rsllm.train.worker import build_task

STEPS = 3
STAGES = (0, 1, 2, 3)
WIDE = 320
"""Of titles, so that ZeRO 3 shards keys and maps: it keeps what is below 1e5."""


def windows(batch: HistoryBatch) -> list[tuple[int, ...]]:
    """The items of each, the last of them asked for only."""
    asked, found = batch.asked, []
    for past, following in zip(asked.past_BM.tolist(), asked.next_BM.tolist(), strict=True):
        size = sum(item != PADDING for item in past)
        assert past[1:size] == following[: size - 1]
        found.append((*past[:size], following[size - 1]))
    return found


def make_engine(task: LanguageTask, zero_stage: int = 0) -> Engine:
    return Engine(task.objective, task.optimization, zero_stage=zero_stage, bf16=False)


def stirred(data: PreparedData, backbone: Path, **overrides: Any) -> LanguageTask:
    """Without dropout and away from where Adam divides nothing by nothing."""
    settings = {"lora_dropout": 0.0, "title_width": WIDE, "samples": 4 * STEPS, **overrides}
    task = history_task(data, backbone, **settings)
    torch.manual_seed(0)
    stir(task.objective, 0.02)
    return task


def what_a_worker_does(data: Path, backbone: Path, accumulation: int) -> dict[str, Any]:
    prepared = PreparedData.open(data)
    task = stirred(prepared, backbone, accumulation=accumulation)
    found: dict[str, Any] = {
        "windows": [[windows(batch) for batch in task.batches(s)] for s in range(STEPS)],
        "validation": task.validate(task.objective),
        "keys": windows_of_keys(prepared),
        "weights": [],
    }
    for zero_stage in STAGES:
        task = stirred(prepared, backbone, accumulation=accumulation)
        engine = make_engine(task, zero_stage)
        for step in range(STEPS):
            engine.step(task.batches(step), step)
        found["weights"].append(engine.trainable())
        found[f"validation {zero_stage}"] = task.validate(engine.objective)
    return found


def windows_of_keys(data: PreparedData) -> list[list[int]]:
    return [own.past_BM.tolist() for own in keys_task(data).batches(1)]


@pytest.fixture(scope="module")
def alone(data: PreparedData, random_llm: Path) -> dict[str, Any]:
    return what_a_worker_does(data.path, random_llm, 1)


@pytest.fixture(scope="module")
def together(data: PreparedData, random_llm: Path) -> list[dict[str, Any]]:
    """Two workers with two micro-batches of one window each."""
    return run_in_world(what_a_worker_does, 2, data.path, random_llm, 2)


@pytest.fixture(scope="module")
def plain(data: PreparedData, random_llm: Path) -> dict[str, Tensor]:
    """The weights after plain AdamW on the whole batches."""
    task = stirred(data, random_llm)
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "weight_decay": g.weight_decay} for g in task.optimization.groups]
    )
    start = {n: p.detach().clone() for n, p in task.objective.named_parameters()}
    task.objective.train()
    for step in range(STEPS):
        for live, group in zip(optimizer.param_groups, task.optimization.groups, strict=True):
            live["lr"] = group.learning_rate * task.optimization.schedule(step)
        (batch,) = task.batches(step)
        loss, _ = task.objective(batch)
        optimizer.zero_grad()
        loss.backward()
        clip = task.optimization.max_gradient_norm
        torch.nn.utils.clip_grad_norm_(task.objective.parameters(), clip)
        optimizer.step()
    trained = {n: p.detach() for n, p in task.objective.named_parameters() if p.requires_grad}
    for name, tensor in trained.items():
        assert (tensor - start[name]).abs().max() > 1e-4, f"{name} stands still"
    return trained


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_on_one_and_two_workers_is_plain_adamw(
    alone: dict[str, Any], together: list[dict[str, Any]], plain: dict[str, Tensor], stage: int
) -> None:
    for run in (alone, *together):
        found = run["weights"][stage]
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(
                found[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_validates_alike(
    alone: dict[str, Any], together: list[dict[str, Any]], stage: int
) -> None:
    """An odd number of rows, also on two workers."""
    expected = alone["validation 0"]
    assert 0.2 <= expected["MRR"] <= 1
    for run in (alone, *together):
        assert run[f"validation {stage}"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_workers_share_what_one_would_do(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for step in range(STEPS):
        ((*whole,),) = alone["windows"][step]
        shares = [batch for worker in together for batch in worker["windows"][step]]
        assert [len(share) for share in shares] == [1, 1, 1, 1]
        assert Counter(own for share in shares for own in share) == Counter(whole)
    both = [past for worker in together for (batch,) in [worker["keys"]] for past in batch]
    (whole_batch,) = alone["keys"]
    assert Counter(trimmed(both)) == Counter(trimmed(whole_batch))


def trimmed(pasts: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple(item for item in past if item != PADDING) for past in pasts]


def test_an_epoch_asks_for_every_item_once(data: PreparedData, random_llm: Path) -> None:
    """Ten users of seven items, in two windows of at most four questions each."""
    task = history_task(data, random_llm, samples=20, batch_size=4)
    assert len(task.batches.sets[0]) == 20
    found = [own for s in range(5) for batch in task.batches(s) for own in windows(batch)]
    pairs = Counter(pair for own in found for pair in pairwise(own))
    assert pairs == Counter(pair for own in users(data) for pair in pairwise(own))
    assert max(map(len, found)) == 5


def users(data: PreparedData) -> list[list[int]]:
    """What each watched, by their numbers."""
    rows, found = data.rows("train"), dict[int, list[int]]()
    for row in np.argsort(rows.position_R, kind="stable").tolist():
        own = found.setdefault(int(rows.user_R[row]), rows.histories(row).tolist()[:1])
        own.append(int(rows.target_R[row]))
    assert {len(own) for own in found.values()} == {LENGTH}
    return [found[user] for user in sorted(found)]


def test_windows_read_the_table_that_has_not_seen_their_user(
    data: PreparedData, random_llm: Path
) -> None:
    task = history_task(data, random_llm, folds=2, batch_size=20, samples=20)
    (batch,) = task.batches(0)
    lone = 0
    for own, table, items in zip(windows(batch), batch.asked.table_B, batch.item_BT, strict=True):
        folds = {
            user % 2
            for user, whole in enumerate(users(data))
            if any(tuple(whole[at : at + len(own)]) == own for at in range(LENGTH))
        }
        assert int(table) - 1 in folds
        assert set((items[items >= 0] // len(TITLES)).tolist()) == {int(table)}
        lone += len(folds) == 1
    assert lone > 10, "few windows are those of several users"
    assert len(task.model.hybrid.catalogue.keys.base_XK) == 3 * len(TITLES)  # type: ignore[union-attr]


STILL = {
    "alpha": ("answer_map",),
    "beta": ("state_map", "state_gain"),
    "alpha and beta": ("answer_map", "state_map", "state_gain", "keys"),
}


@pytest.mark.parametrize("off", STILL)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_no_loss_reaches_stands_still_and_is_exported(
    data: PreparedData, random_llm: Path, off: str, zero_stage: int, tmp_path: Path
) -> None:
    """Also under weight decay; and the artifact is read again, keys and all."""
    losses = {f"loss.{name}": 0.0 for name in off.split(" and ")}
    task = stirred(data, random_llm, weight_decay=0.1, **losses)
    before = {n: p.detach().clone() for n, p in task.objective.named_parameters()}
    engine = make_engine(task, zero_stage)
    for step in range(2):
        engine.step(task.batches(step), step)
    after = engine.trainable()
    head = {name for name in after if name.startswith("model.catalogue.")}
    still = {n for n in head if n.split(".")[2] in STILL[off]}
    assert {n for n in after if torch.equal(after[n], before[n])} == still
    assert len(head) == 7

    task.export(after, tmp_path)
    again = stirred(data, random_llm, seed=1)
    tuned.load(again.model, tmp_path)
    for name, tensor in again.objective.named_parameters():
        if name in after:
            assert torch.equal(tensor.detach(), after[name]), name


def test_alpha_and_beta_may_take_all_weight(data: PreparedData, random_llm: Path) -> None:
    task = history_task(data, random_llm, **{"loss.alpha": 0.7, "loss.beta": 0.3})
    engine = make_engine(task)
    parts = engine.step(task.batches(0), 0)
    assert "loss/next_item" not in parts
    expected = 0.7 * parts["loss/target_contrast"] + 0.3 * parts["loss/user_contrast"]
    assert parts["loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_is_the_exact_expectation_of_what_ranks(
    data: PreparedData, random_llm: Path
) -> None:
    task = stirred(data, random_llm)
    objective: Any = task.objective
    found = task.validate(objective)

    def score(rows: Any) -> np.ndarray:
        return score_catalogue(objective, rows, task.model.encoder, batch_size=2)

    expected = named(rank_catalogue(score, [task.validation], data), EXPECTED)
    for name, values in expected.items():
        assert found[name] == pytest.approx(float(values.mean()), abs=1e-6), name
    assert found["targets/all/MRR_low"] < found["MRR"] < found["targets/all/MRR_high"]


def test_without_beta_titles_are_ranked_and_validated_by_their_likelihood(
    data: PreparedData, random_llm: Path
) -> None:
    """Nothing trains the user's vector then."""
    task = stirred(data, random_llm, **{"loss.beta": 0.0})
    assert task.stage.ranks_by == "likelihood"
    rows = task.validation
    ranker = LanguageObjective(task.model.hybrid, task.stage.loss)
    scores_RC = score_candidates(ranker, rows, task.model.encoder, data, "likelihood", batch_size=8)
    expected = rank_metrics(target_ranks(scores_RC, target_places(rows)))
    found = task.validate(task.objective)
    for name, values in expected.items():
        assert found[name] == pytest.approx(float(values.mean()), abs=1e-6), name


def test_slots_are_watched(data: PreparedData, random_llm: Path) -> None:
    task = stirred(data, random_llm)
    found = task.validate(task.objective)
    slots, rows = task.model.hybrid.slots, task.validation.take(slice(4))
    assert slots is not None
    table_VD = task.model.hybrid.backbone.get_input_embeddings().weight.detach()
    lengths, tokens, items = [], [], []
    for row in range(len(rows)):
        prompt = task.model.encoder.history(rows.histories(row).tolist(), 0).tokens
        for token, item in zip(prompt.ids, prompt.items, strict=True):
            if item >= 0:
                items.append(item)
                lengths.append(slots.projected(torch.tensor(item)).norm().item())
            elif item == -1:
                tokens.append(float(table_VD[token].norm()))
    scale = np.mean(lengths) / np.mean(tokens)
    assert found[SLOT_SCALE] == pytest.approx(scale, rel=1e-4)

    def directions(rows_ND: Tensor) -> float:
        shares = np.linalg.eigvalsh(np.cov(rows_ND.detach().double().numpy().T))
        return float(shares.sum() ** 2 / (shares**2).sum())

    chosen = torch.tensor(items)
    spread = directions(slots.projected(chosen)) / directions(slots.items_IE[chosen])
    assert found[SLOT_SPREAD] == pytest.approx(spread, rel=1e-4)
    text = history_task(data, random_llm, representation="text")
    assert {SLOT_SCALE, SLOT_SPREAD}.isdisjoint(text.validate(text.objective))


def finished(task: LanguageTask, folder: Path) -> dict[str, Tensor]:
    """The weights at the end of a stage that was trained and exported."""
    folder.mkdir()
    engine = make_engine(task)
    for step in range(2):
        engine.step(task.batches(step), step)
    task.export(engine.trainable(), folder)
    return engine.trainable()


def test_a_stage_of_slots_goes_on_from_one_of_titles(
    data: PreparedData, random_llm: Path, tmp_path: Path
) -> None:
    """Its adapter is taken over; keys of titles alone are not those of items with slots."""
    text = history_task(data, random_llm, name="stage1")
    first = finished(text, tmp_path / "stage1")
    unified = history_task(data, random_llm, seed=1)
    fresh = {n: p.detach().clone() for n, p in unified.objective.named_parameters()}
    tuned.load(unified.model, tmp_path / "stage1")
    moved = 0
    for name, tensor in unified.objective.named_parameters():
        own = first[name] if "lora_" in name else fresh[name]
        assert torch.equal(tensor.detach(), own), name
        moved += not torch.equal(tensor.detach(), fresh[name])
    assert moved
    finished(unified, tmp_path / "stage2")


def test_a_stage_of_slots_goes_on_from_another_with_all_it_learned(
    data: PreparedData, random_llm: Path, tmp_path: Path
) -> None:
    first = finished(history_task(data, random_llm, title_width=WIDE), tmp_path / "stage1")
    second = history_task(data, random_llm, title_width=WIDE, seed=1)
    tuned.load(second.model, tmp_path / "stage1")
    for name, tensor in second.objective.named_parameters():
        if name in first:
            assert torch.equal(tensor.detach(), first[name]), name
    choice = language_task(data, random_llm)
    tuned.load(choice.model, tmp_path / "stage1")
    adapter = dict(choice.objective.named_parameters())
    lora = [name for name in first if "lora_" in name]
    assert lora
    assert all(torch.equal(adapter[name].detach(), first[name]) for name in lora)


def test_a_worker_goes_on_from_its_start_and_not_from_the_keys(
    data: PreparedData, random_llm: Path, tmp_path: Path
) -> None:
    """An earlier stage's scorer had those keys itself, and has learned since."""
    store = Store.open(tmp_path / "store")

    def stored(kind: str, make: Callable[[Path], Any]) -> str:
        return str(store.get(kind, {"test": kind}, make))

    titles = ItemEmbeddings(made_up_titles(6), source="made up")
    whole = {"stage2.prompts": "history", "stage2.loss.gamma": 0.0}
    settings: dict[str, Any] = {
        "stage": "stage2",
        "experiment": replace_in(SMALL, whole),
        "layout": lay_out(SMALL.compute, Resources(cpus=2, gpus=0)),
        "store": store,
        "inputs": {"test": "stage-2"},
        "backbone": str(random_llm),
        "data": str(shutil.copytree(data.path, tmp_path / "store" / "data" / "small")),
        "titles": stored("titles", titles.save),
        "recommender": stored("recommender", made_up_items().save),
    }

    def make_keys(folder: Path) -> None:
        task = build_task(Assignment(**{**settings, "stage": "keys"}))
        stir(task.objective, 0.05)
        weights = {name: p.detach() for name, p in task.objective.named_parameters()}
        task.export(weights, folder)

    def make_start(folder: Path) -> None:
        task = stirred(data, random_llm, title_width=6)
        weights = {n: p.detach() for n, p in task.objective.named_parameters() if p.requires_grad}
        task.export(weights, folder)

    def keys_of(**folders: str) -> Tensor:
        task = build_task(Assignment(**settings, **folders))
        assert task.batches.sets[0].histories.longest == 4
        return task.model.hybrid.catalogue.keys().detach()

    keys, start = stored("keys", make_keys), stored("stage-1", make_start)
    for folders, source in (({"keys": keys}, keys), ({"keys": keys, "start": start}, start)):
        expected = load_file(Path(source) / tuned.CATALOGUE)[tuned.KEYS]
        torch.testing.assert_close(keys_of(**folders), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(keys_of(), keys_of(keys=keys), atol=1e-2)


def test_it_learns_an_order(random_llm: Path, tmp_path: Path) -> None:
    """Everybody watches in one order: what comes next is soon among the first of 24."""
    data = small_data(tmp_path / "ordered", num_train=40, ordered=True)
    settings = {"samples": 320, "batch_size": 8, "lora_dropout": 0.0, "loss.beta": 0.6}
    rates = {"lora_learning_rate": 1e-2, "catalogue_learning_rate": 5e-3}
    task = history_task(data, random_llm, **settings, **rates)
    before, engine = task.validate(task.objective), make_engine(task)
    parts = [engine.step(task.batches(step), step) for step in range(task.steps)]
    after = task.validate(engine.objective)
    # Names are read without their slots, so telling which item they are of takes longer to learn.
    for name, most in {"loss/user_contrast": 0.75, "loss/target_contrast": 0.85}.items():
        first, last = (np.mean([p[name] for p in part]) for part in (parts[:5], parts[-5:]))
        assert last < most * first, name
    assert after["MRR"] > before["MRR"] + 0.1


def test_it_learns_to_write_titles(random_llm: Path, tmp_path: Path) -> None:
    data = small_data(tmp_path / "ordered", num_train=40, ordered=True)
    weights = {"loss.alpha": 0.0, "loss.beta": 0.0, "lora_learning_rate": 1e-2}
    settings = {"samples": 320, "batch_size": 8, "lora_dropout": 0.0}
    task = history_task(data, random_llm, **settings, **weights)
    engine = make_engine(task)
    losses = [engine.step(task.batches(step), step)["loss"] for step in range(task.steps)]
    assert np.mean(losses[-5:]) < 0.97 * losses[0]
