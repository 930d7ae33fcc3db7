"""Stage 0: its negatives, its rows, its steps on one and two workers, and what it leaves behind."""

# Axes: B rows, N negatives, I items of the catalogue, E recommender width, D title width.
from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import TITLES, WINDOW
from small_tasks import SMALL, recommender_task
from torch import Tensor
from torch.nn import functional as F
from world import run_in_world

from rsllm import recommenders
from rsllm.config import RecommenderConfig
from rsllm.config.plain import replace_in
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.evaluate.metrics import expected_metrics
from rsllm.recommenders import SEEN, Recommender
from rsllm.recommenders.embeddings import ItemEmbeddings
from rsllm.store.artifacts import read_json
from rsllm.train.checkpoints import Checkpoints
from rsllm.train.engine import Engine
from rsllm.train.loop import train
from rsllm.train.recommender import Negatives, RecommenderBatch, RecommenderTask
from rsllm.train.watch import Watch

STEPS = 3
LOSSES = ("softmax", "sampled-softmax", "bce")
COUNTS_I = np.array([0, 3, 9, 0, 27, 1, 5])
Run = tuple[list[float], dict[str, Tensor]]


def negatives(loss: str, num_negatives: int = 20, seed: int = 0) -> Negatives:
    settings = {"loss": loss, "num_negatives": num_negatives, "seed": seed}
    return Negatives(replace_in(RecommenderConfig(), settings), COUNTS_I)


def assert_frequencies(drawn: np.ndarray, share_I: np.ndarray) -> None:
    """Every item within 4.5 standard errors of its share."""
    found_I = np.bincount(drawn.ravel(), minlength=len(share_I)) / drawn.size
    error_I = (share_I * (1 - share_I) / drawn.size) ** 0.5
    assert (np.abs(found_I - share_I) <= 4.5 * error_I).all()


def test_binary_negatives_are_all_but_the_target_evenly() -> None:
    for target in range(len(COUNTS_I)):
        drawn_BN, expected_BN = negatives("bce").draw(0, np.full(500, target))
        assert drawn_BN.shape == expected_BN.shape == (500, 20)
        share_I = np.full(len(COUNTS_I), 1 / 6)
        share_I[target] = 0.0
        assert_frequencies(drawn_BN, share_I)


def test_sampled_negatives_follow_the_training_counts() -> None:
    target_B = np.arange(2000) % len(COUNTS_I)
    drawn_BN, expected_BN = negatives("sampled-softmax").draw(0, target_B)
    total = sum(count + 1 for count in COUNTS_I.tolist())
    share_I = np.array([(count + 1) / total for count in COUNTS_I.tolist()])
    assert_frequencies(drawn_BN, share_I)
    for drawn, expected, target in zip(drawn_BN, expected_BN, target_B, strict=True):
        times = [np.inf if item == target else 20 * share_I[item] for item in drawn]
        np.testing.assert_allclose(expected, times, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_negatives_are_a_pure_function_of_seed_and_step(loss: str) -> None:
    target_B = np.arange(30) % len(COUNTS_I)
    drawn, again = (negatives(loss).draw(4, target_B) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    later, other = negatives(loss).draw(5, target_B), negatives(loss, seed=1).draw(4, target_B)
    if loss == "softmax":
        assert drawn[0].shape == drawn[1].shape == (30, 0)
    else:
        assert not np.array_equal(drawn[0], later[0])
        assert not np.array_equal(drawn[0], other[0])


def small_task(data: PreparedData, loss: str) -> RecommenderTask:
    """Gated units have no parameter without a gradient, as attention's key biases are."""
    settings = {"loss": loss, "num_negatives": 5, "dropout": 0.0, "model": "gru4rec"}
    return recommender_task(data, **settings, weight_decay=0.1, learning_rate=0.01)


def train_all(data: Path) -> list[Run]:
    """Under each loss, what a worker reports of its first steps, and the weights after them."""
    runs = []
    for loss in LOSSES:
        task = small_task(PreparedData.open(data), loss)
        engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
        losses = [engine.step(task.batches(step), step)["loss"] for step in range(STEPS)]
        runs.append((losses, engine.trainable()))
    return runs


def plain_loss(model: Recommender, batch: RecommenderBatch, loss: str) -> Tensor:
    """Row by row, negative by negative."""
    scores_BI = model(batch.history_BH, batch.length_B) @ model.items.weight.T
    terms = []
    for row, target in enumerate(batch.target_B.tolist()):
        score_I, own = scores_BI[row], scores_BI[row, target]
        others = list(zip(batch.negative_BN[row].tolist(), batch.expected_BN[row], strict=True))
        if loss == "softmax":
            terms.append(score_I.exp().sum().log() - own)
        elif loss == "bce":
            terms += [-F.logsigmoid(own) - F.logsigmoid(-score_I[item]) for item, _ in others]
        else:
            total = own.exp() + sum(score_I[item].exp() / times for item, times in others)
            terms.append(total.log() - own)
    return torch.stack(terms).mean()


def train_plainly(data: PreparedData, loss: str) -> Run:
    task = small_task(data, loss)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        (batch,) = task.batches(step)
        value = plain_loss(task.model, batch, loss)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, {name: p.detach() for name, p in task.objective.named_parameters()}


@pytest.fixture(scope="module")
def alone(data: PreparedData) -> list[Run]:
    return train_all(data.path)


@pytest.fixture(scope="module")
def together(data: PreparedData) -> list[list[Run]]:
    return run_in_world(train_all, 2, data.path)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_and_two_workers_equal_plain_adamw(
    data: PreparedData, alone: list[Run], together: list[list[Run]], loss: str
) -> None:
    losses, weights = train_plainly(data, loss)
    start = dict(small_task(data, loss).objective.named_parameters())
    for run in [alone, *together]:
        found_losses, found = run[LOSSES.index(loss)]
        assert found_losses == pytest.approx(losses, abs=1e-6)
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)
            assert (tensor - start[name]).abs().max() > 1e-3, name


def identities(batches: list[RecommenderBatch]) -> list[tuple[int, ...]]:
    """History and target of each row; no two training rows share both."""
    return [
        (*history, target)
        for batch in batches
        for history, target in zip(batch.history_BH.tolist(), batch.target_B.tolist(), strict=True)
    ]


@pytest.mark.parametrize("batch_size", [20, 7, 99])
def test_an_epoch_visits_rows_once(data: PreparedData, batch_size: int) -> None:
    task, rows = recommender_task(data, batch_size=batch_size), data.rows("train")
    there = {(*h, t) for h, t in zip(rows.history_RH.tolist(), rows.target_R, strict=True)}
    epochs = []
    for epoch in range(2):
        steps = range(epoch * task.steps_per_epoch, (epoch + 1) * task.steps_per_epoch)
        epochs.append([row for step in steps for row in identities(task.batches(step))])
        assert len(epochs[epoch]) == len(rows) // min(batch_size, 60) * min(batch_size, 60)
        assert max(Counter(epochs[epoch]).values()) == 1
        assert set(epochs[epoch]) <= there
    assert epochs[0] != epochs[1]


def test_a_fold_sees_no_row_of_its_users(data: PreparedData) -> None:
    experiment = replace_in(SMALL, {"recommender.folds": 3, "recommender.batch_size": 1})
    whole = data.rows("train")
    for fold in range(3):
        task = RecommenderTask(experiment, data, fold=fold)
        others = whole.take(np.array([user % 3 != fold for user in whole.user_R.tolist()]))
        seen = [row for step in range(len(task.rows)) for row in identities(task.batches(step))]
        columns = zip(others.history_RH.tolist(), others.target_R, strict=True)
        assert Counter(seen) == Counter((*history, target) for history, target in columns)
        assert task.validation.target_R.tolist() == data.rows("validation").target_R.tolist()
        rows = list(zip(others.user_R, others.history_RH, others.target_R, strict=True))
        users_I = [{u for u, h, t in rows if item in (*h, t)} for item in range(len(TITLES))]
        assert task.counts_I.tolist() == [len(users) for users in users_I]


def test_shuffled_histories_are_shuffled_everywhere(data: PreparedData) -> None:
    task, again, other = (recommender_task(data, shuffle_history=True, seed=s) for s in (4, 4, 5))
    for split, name in (("train", "rows"), ("validation", "validation")):
        plain: Any = data.rows(split)
        found, same, different = (getattr(t, name).history_RH for t in (task, again, other))
        assert np.array_equal(found, same)
        assert not np.array_equal(found, different)
        assert not np.array_equal(found, plain.history_RH)
        assert np.array_equal(np.sort(found, axis=1), np.sort(plain.history_RH, axis=1))
    seen = {tuple(h) for h in task.batches(0)[0].history_BH.tolist()}
    assert seen <= {tuple(h) for h in task.rows.history_RH.tolist()}


def naive_metrics(model: Recommender, rows: Rows, data: PreparedData) -> dict[str, float]:
    """Means of exact expectations, from scores of one row at a time."""
    keys, better, pools = data.catalogue.title_keys_I.tolist(), [], []
    for row, target in enumerate(rows.target_R.tolist()):
        history = rows.histories(row).tolist()
        state_1E = model(torch.tensor([history]), torch.tensor([len(history)]))
        scores = (state_1E @ model.item_table.T)[0].tolist()
        seen = {keys[item] for item in [*history, target]}
        pool = [i for i, key in enumerate(keys) if key not in seen and keys.index(key) == i]
        better.append(sum(scores[item] >= scores[target] for item in pool))
        pools.append(len(pool))
    found = expected_metrics(better, pools, data.config["num_candidates"] - 1)
    return {name: float(values.mean()) for name, values in found.items()}


@pytest.mark.parametrize("kind", ["ids", "titles"])
def test_what_is_exported_scores_like_what_was_trained(
    data: PreparedData, kind: str, tmp_path: Path
) -> None:
    """Items 5 and 9 pass for ones that never trained: the frozen table leaves them out."""
    counts_I = data.catalogue.counts_I.copy()
    counts_I[[5, 9]] = 0
    data = replace(data, catalogue=replace(data.catalogue, counts_I=counts_I))
    titles_ID = torch.randn(len(TITLES), 6) if kind == "titles" else None
    experiment = replace_in(SMALL, {"recommender.learning_rate": 0.02})
    task = RecommenderTask(experiment, data, titles_ID)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    for step in range(STEPS):
        engine.step(task.batches(step), step)
    task.export(engine.trainable(), tmp_path)

    trained: Any = engine.objective.eval()
    loaded = recommenders.load(tmp_path, experiment.recommender, len(TITLES), WINDOW)
    history_BH, length_B = (
        torch.from_numpy(a).long() for a in (task.rows.history_RH, task.rows.length_R)
    )
    scores = [m.scores(m(history_BH, length_B)).detach() for m in (trained.model, loaded)]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-6, rtol=0)
    assert read_json(tmp_path / SEEN) == pytest.approx(naive_metrics(loaded, task.rows, data))
    expected_IE = loaded.item_table.detach().clone()
    expected_IE[[*np.flatnonzero(counts_I == 0)]] = 0.0
    assert torch.equal(ItemEmbeddings.load(tmp_path).table_IE, expected_IE)
    assert expected_IE[4].any()


def test_early_stopping_exports_the_best_validation(data: PreparedData, tmp_path: Path) -> None:
    """Shuffled films teach nothing, so that validation soon stops improving."""
    task = recommender_task(data, max_epochs=40, patience=1, learning_rate=0.05)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    state = train(task, engine, Checkpoints(tmp_path / "checkpoints"), Watch(1e9), print, print)
    task.export(engine.trainable(), tmp_path)
    scores = [entry["MRR"] for entry in state.curve]
    assert state.step == state.best_step + task.steps_per_epoch < task.steps
    assert state.best_score == max(scores) > scores[-1] + 1e-4
    assert state.curve[-1]["score"] == state.best_score
    loaded = recommenders.load(tmp_path, task.config, len(TITLES), WINDOW)
    found = naive_metrics(loaded, data.rows("validation"), data)
    assert found["MRR"] == pytest.approx(state.best_score, abs=1e-6)
