"""Which rows, candidates and tokens a step trains on, for any number of workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranked_data import ranked_data
from scipy import stats
from small_data import NUM_CANDIDATES, TITLES, small_data
from small_tasks import language_task, recommender_task
from world import run_in_world

from rsllm.data.hashing import stream_seed
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM
from rsllm.evaluate.groups import BY_COUNT
from rsllm.evaluate.rank import decision
from rsllm.model import tuned
from rsllm.prompts.collate import PADDING, Batch, collate
from rsllm.train import stages
from rsllm.train.batches import by_length, sample_order, step_rows, text_only
from rsllm.train.engine import Engine

STEPS = 3


@pytest.mark.parametrize(("batch_size", "num_rows"), [(4, 12), (5, 12), (30, 12), (1, 1)])
def test_each_epoch_visits_every_row_once(batch_size: int, num_rows: int) -> None:
    steps = -(-3 * num_rows // batch_size)
    visits = [visit for s in range(steps) for visit in step_rows(7, s, batch_size, num_rows)]
    assert len(visits) == steps * batch_size
    assert [epoch for epoch, _ in visits] == [i // num_rows for i in range(len(visits))]
    for epoch in range(3):
        assert sorted(row for e, row in visits if e == epoch) == list(range(num_rows))


def test_rows_are_a_pure_function_of_seed_and_step() -> None:
    later, earlier = step_rows(0, 5, 8, 100), step_rows(0, 4, 8, 100)
    assert step_rows(0, 5, 8, 100) == later
    assert later != earlier
    assert step_rows(1, 5, 8, 100) != later


def visited(batch: Batch) -> list[tuple[int, int, tuple[int, ...]]]:
    """(user, title of the target, candidates in their order) of each row of a unified batch."""
    items_BK = batch.item_BT.flatten()[batch.choice_BK]
    columns = (batch.user_B.tolist(), batch.title_B.tolist(), items_BK.tolist())
    return [(user, title, tuple(items)) for user, title, items in zip(*columns, strict=True)]


def pasts(batch: Batch) -> list[tuple[int, ...]]:
    """Titles of each row's history."""
    return [tuple(h for h in past if h != PADDING) for past in batch.past_BH.tolist()]


def own_tokens(batch: Batch) -> int:
    """Answer tokens of the rows' own branches."""
    row_N = batch.label_branch_N // batch.num_branches
    own = batch.label_branch_N % batch.num_branches == batch.target_B[row_N]
    return int(own.sum())


def what_a_worker_does(data: Path, backbone: Path, accumulation: int) -> dict[str, Any]:
    task = language_task(PreparedData.open(data), backbone, accumulation=accumulation)
    steps = [task.batches(step) for step in range(STEPS)]
    return {
        "rows": [[visited(batch) for batch in batches] for batches in steps],
        "tokens": [sum(map(own_tokens, batches)) for batches in steps],
        "tokens_per_batch": [[batch.tokens_per_batch for batch in b] for b in steps],
        "validation": task.validate(task.objective),
        "recommender": recommender_task(task.data).batches(1)[0].target_B.tolist(),
        "world": dist.get_world_size(),
    }


@pytest.fixture(scope="module")
def alone(data: PreparedData, random_llm: Path) -> dict[str, Any]:
    return what_a_worker_does(data.path, random_llm, 1)


@pytest.fixture(scope="module")
def together(data: PreparedData, random_llm: Path) -> list[dict[str, Any]]:
    """Two workers with two micro-batches of one row each."""
    return run_in_world(what_a_worker_does, 2, data.path, random_llm, 2)


def test_workers_share_what_one_would_do(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    assert [worker["world"] for worker in together] == [2, 2]
    for step in range(STEPS):
        ((*whole,),) = alone["rows"][step]
        shares = [batch for worker in together for batch in worker["rows"][step]]
        assert [len(share) for share in shares] == [1, 1, 1, 1]
        assert Counter(row for share in shares for row in share) == Counter(whole)
    shares = [worker["recommender"] for worker in together]
    assert Counter(shares[0] + shares[1]) == Counter(alone["recommender"])


def test_tokens_are_counted_over_the_global_batch(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for step in range(STEPS):
        total = alone["tokens"][step]
        assert sum(worker["tokens"][step] for worker in together) == total
        assert alone["tokens_per_batch"][step] == [total]
        for worker in together:
            assert worker["tokens_per_batch"][step] == [total / 4, total / 4]


def test_two_workers_validate_an_odd_number_of_rows(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    first, second = (worker["validation"] for worker in together)
    assert first == pytest.approx(second)
    metrics = {name: value for name, value in first.items() if not name.startswith("health/")}
    assert metrics == {name: alone["validation"][name] for name in metrics}
    assert len(metrics) < len(first) == len(alone["validation"])
    assert 0.2 <= first["MRR"] <= 1, "at least 1 / NUM_CANDIDATES"


def test_training_candidates_follow_the_rule_and_change_with_the_epoch(
    data: PreparedData, random_llm: Path
) -> None:
    rows, keys = data.rows("train"), data.catalogue.title_keys_I
    task = language_task(data, random_llm, batch_size=len(rows), samples=2 * len(rows))
    drawn: dict[tuple[int, int, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for step in range(2):
        (batch,) = task.batches(step)
        for (user, title, candidates), past in zip(visited(batch), pasts(batch), strict=True):
            drawn.setdefault((user, title, past), []).append(candidates)
    assert len(drawn) == len(rows)
    for row in range(len(rows)):
        target, past = rows.target_R[row], keys[rows.histories(row)].tolist()
        both_epochs = drawn[int(rows.user_R[row]), int(keys[target]), tuple(past)]
        assert len(both_epochs) == 2
        for candidates in both_epochs:
            titles = keys[list(candidates)].tolist()
            assert len(set(titles)) == NUM_CANDIDATES
            assert target in candidates
            assert not (set(titles) - {keys[target]}) & set(past)
    changed = [set(first) != set(second) for first, second in drawn.values()]
    assert np.mean(changed) > 0.9
    first_draws = [
        (title, keys[list(first)].tolist()) for (_, title, _), (first, _) in drawn.items()
    ]
    places = [titles.index(title) for title, titles in first_draws]
    assert set(places) == set(range(NUM_CANDIDATES)), "the target stands anywhere"


def test_training_candidates_are_what_a_recommender_ranks_highest(
    random_llm: Path, tmp_path: Path
) -> None:
    """Drawn anew each epoch, evenly from the row's pool; and a step trains on them."""
    data = ranked_data(small_data(tmp_path / "store" / "data" / "small"), folds=2)
    rows, epochs = data.rows("train"), 600
    assert rows.pool_RP is not None
    task = language_task(data, random_llm, name="stage1", samples=8)
    own, seen = task.batches.sets[0], Counter[int]()
    for row in range(0, len(rows), 11):
        drawn = own.decisions([(0, row), (1, row)], task.seed)
        assert drawn == own.decisions([(0, row), (1, row)], task.seed)
        assert drawn[0].candidates != drawn[1].candidates
        for found in drawn:
            negatives = {*found.candidates} - {found.target}
            assert len(negatives) == NUM_CANDIDATES - 1
            assert negatives <= {*rows.pool_RP[row].tolist()} - {NO_ITEM}
            assert found.target == rows.target_R[row]
    drawn = own.decisions([(epoch, 0) for epoch in range(epochs)], task.seed)
    places = Counter(list(found.candidates).index(found.target) for found in drawn)
    for found in drawn:
        seen.update({*found.candidates} - {found.target})
    assert len(seen) == (rows.pool_RP[0] != NO_ITEM).sum()
    for counts in (seen, places):
        assert stats.chisquare([*counts.values()]).pvalue > 1e-3
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    before = engine.trainable()
    for step in range(task.steps):
        engine.step(task.batches(step), step)
    assert any(not torch.equal(before[name], after) for name, after in engine.trainable().items())
    assert 1 / NUM_CANDIDATES <= task.validate(task.objective)["MRR"] <= 1


def test_batches_hold_rows_of_similar_length_and_each_row_once(
    data: PreparedData, random_llm: Path
) -> None:
    size, keys = 4, data.catalogue.title_keys_I
    steps = len(data.rows("train")) // size
    task = language_task(data, random_llm, batch_size=size, samples=steps * size)
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    padding, tokens = 0, []
    for step in range(steps):
        (batch,) = task.batches(step)
        tokens.append(batch.num_tokens)
        seen += [(u, t, p) for (u, t, _), p in zip(visited(batch), pasts(batch), strict=True)]
        padding += int((batch.branch_BT == PADDING).sum())
    assert len(set(seen)) == len(seen) == steps * size
    assert tokens[0] == max(tokens), "too little memory shows at once"
    rows = [row for step in range(steps) for row in step_rows(task.seed, step, size, steps * size)]
    own = task.batches.sets[0]
    by_chance = own.decisions(rows, task.seed)
    in_turn = [
        collate(by_chance[i : i + size], own.encoder, keys, all_branches=task.batches.all_branches)
        for i in range(0, len(by_chance), size)
    ]
    assert padding < 0.3 * sum(int((batch.branch_BT == PADDING).sum()) for batch in in_turn)


def test_a_curriculum_moves_from_text_to_slots(data: PreparedData, random_llm: Path) -> None:
    task = language_task(data, random_llm, curriculum=True, samples=400)
    slotted = []
    for step in range(100):
        (batch,) = task.batches(step)
        slotted.append(bool((batch.item_BT >= 0).any()))
    assert slotted == [not text_only(task.seed, step, 100) for step in range(100)]
    quarters = np.array(slotted).reshape(4, 25).mean(1)
    assert quarters[0] < 0.4
    assert quarters[3] > 0.6
    always = [text_only(seed, 0, 10) for seed in range(50)]
    never = [text_only(seed, 10, 10) for seed in range(50)]
    assert (set(always), set(never)) == ({True}, {False})


@pytest.mark.parametrize(("alignment", "rests"), [(0.0, True), (0.5, False)])
def test_a_text_only_step_leaves_the_projector_alone(
    data: PreparedData, random_llm: Path, alignment: float, rests: bool
) -> None:
    """Unless slots are aligned with titles, which text prompts do too."""
    loss = {"loss.alignment": alignment}
    task = language_task(data, random_llm, curriculum=True, samples=40, max_gradient_norm=9, **loss)
    engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
    moved: dict[str, list[bool]] = {"slots": [], "lora_B": []}
    before = engine.trainable()
    for step in range(task.steps):
        engine.step(task.batches(step), step)
        after = engine.trainable()
        for part, moves in moved.items():
            names = [name for name in after if part in name]
            moves.append(any(not torch.equal(after[name], before[name]) for name in names))
        before = after
    text = [text_only(task.seed, step, task.steps) for step in range(task.steps)]
    assert True in text[text.index(False) :], "a text-only step follows one with slots"
    assert moved["lora_B"] == [True] * task.steps
    assert moved["slots"] == [not (rests and alone) for alone in text]


def test_stages_and_streams_share_no_randomness(data: PreparedData, random_llm: Path) -> None:
    """Under one seed: rows, candidates and templates of the stages, orders of epochs and pools."""
    first, second = (
        language_task(data, random_llm, name=name, batch_size=4, samples=64)
        for name in ("stage1", "stage2")
    )
    rows = [
        task.batches.sets[0].decisions([(0, row) for row in range(40)], task.seed)
        for task in (first, second)
    ]
    for name in ("candidates", "template"):
        same = [getattr(a, name) == getattr(b, name) for a, b in zip(*rows, strict=True)]
        assert np.mean(same) < 0.6
    assert step_rows(first.seed, 0, 30, 40) != step_rows(second.seed, 0, 30, 40)
    for seed in (0, 1):
        streams = [
            sample_order(seed, 0, 16).tolist(),
            by_length(range(16), 1, [stream_seed(seed, "pool"), 0]).ravel().tolist(),
            sample_order(stream_seed(seed, "stage1"), 0, 16).tolist(),
            sample_order(stream_seed(seed, "stage2"), 0, 16).tolist(),
        ]
        assert len(set(map(tuple, streams))) == len(streams)


def test_training_rows_read_the_table_that_has_not_seen_their_user(
    data: PreparedData, random_llm: Path
) -> None:
    size = len(data.rows("train"))
    task = language_task(data, random_llm, folds=2, batch_size=size, samples=size)
    (batch,) = task.batches(0)
    assert set(batch.user_B.tolist()) == set(range(10))
    for user, items in zip(batch.user_B.tolist(), batch.item_BT, strict=True):
        tables = items[items >= 0] // len(TITLES)
        assert set(tables.tolist()) == {1 + user % 2}
    slots = task.model.hybrid.slots
    assert slots is not None
    assert len(slots.items_IE) == 3 * len(TITLES)
    held_out = [decision(task.validation, row).table for row in range(len(task.validation))]
    assert held_out == [0] * 5


def test_without_folds_every_row_reads_the_one_table(data: PreparedData, random_llm: Path) -> None:
    (batch,) = language_task(data, random_llm).batches(0)
    assert 0 <= batch.item_BT[batch.item_BT >= 0].max() < len(TITLES)


@pytest.mark.parametrize(("trains", "frozen"), [("backbone", "slots"), ("projector", "llm")])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_what_does_not_train_stands_still_and_is_exported(
    data: PreparedData, random_llm: Path, trains: str, frozen: str, zero_stage: int, tmp_path: Path
) -> None:
    task = language_task(data, random_llm, trains=trains)
    names = {n for n, p in task.objective.named_parameters() if "lora_" in n or "slots" in n}
    before = {n: p.detach().clone() for n, p in task.objective.named_parameters() if n in names}
    engine = Engine(task.objective, task.optimization, zero_stage=zero_stage, bf16=False)
    for step in range(2):
        engine.step(task.batches(step), step)
    after = engine.trainable()
    assert after.keys() == names
    moved = {name for name in names if not torch.equal(after[name], before[name])}
    assert moved
    assert not any(name.startswith(f"model.{frozen}.") for name in moved)
    task.export(after, tmp_path)
    tuned.load(language_task(data, random_llm, seed=1).model, tmp_path)


def test_cached_gradients_contrast_the_whole_step(data: PreparedData, random_llm: Path) -> None:
    settings = {"accumulation": 2, "batch_size": 4, "gradient_caching": True}
    negatives = []
    for cached in (False, True):
        task = language_task(
            data, random_llm, lora_dropout=0.0, **{**settings, "gradient_caching": cached}
        )
        engine = Engine(task.objective, task.optimization, zero_stage=0, bf16=False)
        parts = engine.step(task.batches(0), 0)
        negatives.append(parts["contrast/target_negatives"])
    assert negatives[0] <= 1 < negatives[1] <= 3


def test_validation_by_groups_of_targets(
    data: PreparedData, random_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "FEWEST_USERS", 1)
    task = language_task(data, random_llm)
    found = task.validate(task.objective)
    counts = data.catalogue.counts_I[task.validation.target_R].tolist()
    limits = {"1 to 4 interactions": range(1, 5), "5 to 19 interactions": range(5, 20)}
    limits |= {"never trained on": range(1), "20 interactions or more": range(20, max(counts) + 1)}
    expected = {name: sum(count in limits[name] for count in counts) for name in BY_COUNT}
    assert {name: found[f"targets/{name}/n"] for name in BY_COUNT} == expected
    for metric in ("HR@1", "MRR"):
        parts = [n * found[f"targets/{name}/{metric}"] for name, n in expected.items() if n]
        assert sum(parts) / len(task.validation) == pytest.approx(found[metric])
    assert found["targets/all/MRR_low"] < found["MRR"] < found["targets/all/MRR_high"]


def test_dropout_is_the_same_under_any_zero_stage(data: PreparedData, random_llm: Path) -> None:
    """ZeRO 3 hands every layer a view of its own, and so must not draw further masks."""
    found = {}
    for share, zero_stage in ((0.0, 0), (0.2, 0), (0.2, 2), (0.2, 3)):
        task = language_task(data, random_llm, lora_dropout=share)
        engine = Engine(task.objective, task.optimization, zero_stage=zero_stage, bf16=False)
        torch.manual_seed(5)
        steps = [engine.step(task.batches(step), step)["loss"] for step in range(4)]
        found[share, zero_stage] = (steps, torch.get_rng_state())
    steps, state = found[0.2, 0]
    assert abs(steps[-1] - found[0.0, 0][0][-1]) > 1e-4
    for zero_stage in (2, 3):
        assert found[0.2, zero_stage][0] == pytest.approx(steps, rel=1e-5)
        assert torch.equal(found[0.2, zero_stage][1], state)
