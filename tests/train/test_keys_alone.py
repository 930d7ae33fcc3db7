"""The catalogue scorer's keys by themselves: what they learn, and what is refused on disk."""

from __future__ import annotations

import os
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_data import TITLES, small_data
from small_tasks import (
    SMALL,
    history_task,
    keys_task,
    made_up_items,
    made_up_titles,
)

from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.errors import CheckpointError
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import EXPECTED, candidate_scores, named, rank_catalogue, score_keys
from rsllm.model import tuned
from rsllm.model.catalogue import ItemKeys
from rsllm.prompts.collate import PADDING
from rsllm.train.engine import Engine
from rsllm.train.keys import KeysTask


def make_engine(task: KeysTask) -> Engine:
    return Engine(task.objective, task.optimization, zero_stage=0, bf16=False)


def trained(task: KeysTask, steps: int, folder: Path) -> Path:
    """The artifact after so many steps."""
    folder.mkdir()
    engine = make_engine(task)
    for step in range(steps):
        engine.step(task.batches(step), step)
    task.export(engine.trainable(), folder)
    return folder


@pytest.fixture(scope="module")
def artifact(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(keys_task(data), 4, tmp_path_factory.mktemp("keys") / "artifact")


@pytest.mark.parametrize("items", [True, False])
def test_they_learn_what_is_near_in_an_order(tmp_path: Path, items: bool) -> None:
    """Not what is ahead: of two keys neither comes first. That is left to a language model."""
    data = small_data(tmp_path / "ordered", num_train=40, ordered=True)
    task = keys_task(data, items=items, max_epochs=20.0, batch_size=16, learning_rate=1e-2)
    before, engine = task.validate(task.objective), make_engine(task)
    parts = [engine.step(task.batches(step), step) for step in range(task.steps)]
    after = task.validate(engine.objective)
    assert after["MRR"] > before["MRR"] + 0.05
    first, last = (np.mean([p["loss"] for p in part]) for part in (parts[:5], parts[-5:]))
    assert last < 0.85 * first


def test_a_step_is_a_batch_of_windows_and_an_epoch_has_each_once(data: PreparedData) -> None:
    task = keys_task(data)
    assert (len(task.histories), task.steps_per_epoch, task.steps) == (20, 5, 15)
    asked: Counter[tuple[int, int]] = Counter()
    for (own,) in map(task.batches, range(5)):
        assert own.table_B.tolist() == [0] * 4
        past_BM, next_BM = own.past_BM.tolist(), own.next_BM.tolist()
        for past, following in zip(past_BM, next_BM, strict=True):
            pairs = zip(past, following, strict=True)
            asked.update(pair for pair in pairs if pair[0] != PADDING)
    rows = data.rows("train")
    last_R = rows.history_RH[np.arange(len(rows)), rows.length_R - 1]
    assert asked == Counter(zip(last_R.tolist(), rows.target_R.tolist(), strict=True))
    assert [step for step in range(1, 11) if task.due(step)] == [2, 4, 6, 8, 10]
    crossed = keys_task(data, folds=2)
    assert {int(n) for (own,) in map(crossed.batches, range(5)) for n in own.table_B} == {1, 2}


def test_validation_is_the_exact_expectation(data: PreparedData) -> None:
    task = keys_task(data)

    def score(rows: Any) -> np.ndarray:
        return score_keys(task.keys, rows)

    expected = named(rank_catalogue(score, [task.validation], data), EXPECTED)
    found = task.validate(task.objective)
    assert found == pytest.approx({n: float(values.mean()) for n, values in expected.items()})
    task.data = replace(data, facts=deepcopy(data.facts))
    task.data.facts["inputs"]["config"]["candidates"] = "popularity"
    drawn = task.validate(task.objective)
    scores_RC = candidate_scores(score(task.validation), task.validation)
    candidates_RC = task.validation.candidates_RC
    assert candidates_RC is not None
    places_R = (candidates_RC == task.validation.target_R[:, None]).argmax(1)
    metrics = rank_metrics(target_ranks(scores_RC, places_R))
    assert drawn == pytest.approx({name: values.mean() for name, values in metrics.items()})


def fresh_keys(data: PreparedData) -> ItemKeys:
    items_XE = made_up_items().standardised()
    return ItemKeys(items_XE, made_up_titles(6), data.catalogue, SMALL.catalogue)


def test_round_trip(data: PreparedData, artifact: Path) -> None:
    task = keys_task(data)
    engine = make_engine(task)
    for step in range(4):
        engine.step(task.batches(step), step)
    keys = fresh_keys(data)
    assert not torch.allclose(keys(), task.keys(), atol=1e-3), "they have learned"
    tuned.load_keys(keys, artifact)
    assert torch.equal(keys(), task.keys())
    rows = data.rows("test")
    np.testing.assert_array_equal(score_keys(keys, rows), score_keys(task.keys, rows))
    assert torch.equal(tuned.title_vectors(artifact), made_up_titles(6))
    stored = load_file(artifact / tuned.CATALOGUE)
    torch.testing.assert_close(stored[tuned.KEYS], keys().detach(), atol=1e-6, rtol=0)


def test_a_history_stage_starts_from_them(
    data: PreparedData, random_llm: Path, artifact: Path
) -> None:
    task = history_task(data, random_llm)
    head = task.model.hybrid.catalogue
    assert head is not None
    expected = fresh_keys(data)
    tuned.load_keys(expected, artifact)
    tuned.load_keys(head.keys, artifact)
    assert torch.equal(head.keys(), expected())


def test_shuffled_slots_leave_keys_of_the_items_themselves(
    data: PreparedData, random_llm: Path, tmp_path: Path
) -> None:
    """What is spoilt is what the language model reads, not what it is compared with."""
    shuffled = {"projector.shuffle_items": True}
    task = KeysTask(replace_in(SMALL, shuffled), data, made_up_items(), made_up_titles(6))
    folder = trained(task, 2, tmp_path / "keys")
    head = history_task(data, random_llm, whole=shuffled).model.hybrid.catalogue
    plain = history_task(data, random_llm).model.hybrid.catalogue
    assert head is not None
    assert plain is not None
    for keys in (head.keys, plain.keys):
        tuned.load_keys(keys, folder)
        assert torch.equal(keys(), task.keys())


def copied(artifact: Path, folder: Path, **changes: Any) -> Path:
    """With some tensors in place of its own, or without them where they are None."""
    folder.mkdir()
    tensors = load_file(artifact / tuned.CATALOGUE) | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / tuned.CATALOGUE)
    return folder


def test_keys_of_other_items_are_refused(
    data: PreparedData, artifact: Path, tmp_path: Path
) -> None:
    keys = fresh_keys(data)
    stored = load_file(artifact / tuned.CATALOGUE)
    swapped_IK = stored[tuned.KEYS].roll(1, 0)
    fewer_IK = stored[tuned.KEYS][1:].contiguous()
    for number, other in enumerate((swapped_IK, fewer_IK, swapped_IK * float("nan"))):
        folder = copied(artifact, tmp_path / f"{number}", keys=other)
        with pytest.raises(CheckpointError, match=r"keys of other items than these; prepare"):
            tuned.load_keys(keys, folder)


def test_keys_of_another_width_are_refused(data: PreparedData, artifact: Path) -> None:
    """They are those of one stage, so nothing else may take their place in silence."""
    titles_only = ItemKeys(None, made_up_titles(6), data.catalogue, SMALL.catalogue)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit these keys: .*train it again"):
        tuned.load_keys(titles_only, artifact)


def test_a_damaged_or_missing_file_is_refused(
    data: PreparedData, artifact: Path, tmp_path: Path
) -> None:
    keys = fresh_keys(data)
    with pytest.raises(CheckpointError, match=r"catalogue\.safetensors is missing or damaged"):
        tuned.load_keys(keys, tmp_path)
    with pytest.raises(CheckpointError, match=r"is missing or damaged: .*; train it again"):
        tuned.title_vectors(tmp_path)
    for name in (tuned.KEYS, tuned.TITLES):
        lost = copied(artifact, tmp_path / f"without {name}", **{name: None})
        with pytest.raises(CheckpointError, match=f"has no {name}; train it again"):
            tuned.load_keys(keys, lost)
    extra = copied(artifact, tmp_path / "extra", other=torch.zeros(2))
    with pytest.raises(CheckpointError, match="does not fit these keys"):
        tuned.load_keys(keys, extra)
    damaged = copied(artifact, tmp_path / "damaged")
    os.truncate(damaged / tuned.CATALOGUE, 200)
    for use in (lambda: tuned.load_keys(keys, damaged), lambda: tuned.title_vectors(damaged)):
        with pytest.raises(CheckpointError, match="is missing or damaged"):
            use()


def test_a_tuned_model_keeps_its_scorer_and_refuses_another(
    data: PreparedData, random_llm: Path, tmp_path: Path
) -> None:
    task = history_task(data, random_llm)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    engine.step(task.batches(0), 0)
    task.export(engine.trainable(), tmp_path)
    other = history_task(data, random_llm, seed=1)
    tuned.load(other.model, tmp_path)
    head, own = other.model.hybrid.catalogue, task.model.hybrid.catalogue
    assert head is not None
    assert own is not None
    assert torch.equal(head.keys(), own.keys())
    assert torch.equal(head.state_map.weight, own.state_map.weight)
    assert len(TITLES) == len(load_file(tmp_path / tuned.CATALOGUE)[tuned.KEYS])

    tensors = load_file(tmp_path / tuned.CATALOGUE)
    broken: list[tuple[dict[str, Any], str]] = [
        ({tuned.KEYS: tensors[tuned.KEYS].roll(1, 0)}, "keys of other items"),
        ({tuned.TITLES: None}, "has no titles"),
        ({"state_map.weight": None}, "does not fit these keys"),
    ]
    for changes, message in broken:
        kept = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(kept, tmp_path / tuned.CATALOGUE)
        with pytest.raises(CheckpointError, match=message):
            tuned.load(other.model, tmp_path)
    os.truncate(tmp_path / tuned.CATALOGUE, 100)
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        tuned.load(other.model, tmp_path)
