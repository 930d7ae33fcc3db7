"""Every ZeRO stage on one and two workers is plain AdamW on the whole batch.

A group that rests at a step is one without gradients there.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model.small_models import (
    ITEM_WIDTH,
    TITLES,
    make_batch,
    make_encoder,
    make_rows,
    save_model,
    stir,
    vocabulary_size,
)
from torch import Tensor
from world import run_in_world

from rsllm.config import BackboneConfig, LossConfig, Offload, ProjectorConfig
from rsllm.errors import TrainingError
from rsllm.model.backbone import load_backbone, load_tokenizer, tunable
from rsllm.model.hybrid import HybridLM, ItemSlots
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Batch, answer_tokens
from rsllm.train.engine import Engine, Optimization, ParameterGroup, warmup_then_cosine

FULL = LossConfig(alpha=0.3, beta=0.2, gamma=0.5, alignment=0.1, temperature=0.2)
PLAIN = LossConfig(alpha=0.0, beta=0.0, gamma=0.5)
STEPS, BATCH = 4, 8
ROWS = make_rows(STEPS * BATCH, num_candidates=3, seed=1)
SCHEDULE = warmup_then_cosine(STEPS, warmup=1)
CLIP = 0.5
STAGES = (0, 1, 2, 3)
WIDTH, HIDDEN = 320, 512
"""Wide enough for ZeRO 3 to shard embedding table and projector: it keeps what is below 1e5."""

Run = tuple[list[float], dict[str, Tensor]]


@pytest.fixture(scope="module")
def wide_llm(random_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size(random_llm),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.03,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("wide_llm")
    return save_model(LlamaForCausalLM, config, random_llm, folder)


def make_objective(folder: Path, loss: LossConfig, *, recompute: bool = False) -> LanguageObjective:
    torch.manual_seed(2)
    llm = load_backbone(folder, torch.float32)
    table_VD = llm.get_input_embeddings().weight
    items_IE = torch.randn(len(TITLES), ITEM_WIDTH)
    slots = ItemSlots(items_IE, table_VD, ProjectorConfig(hidden=HIDDEN))
    adapted = tunable(llm, BackboneConfig(lora_rank=4, gradient_checkpointing=recompute))
    for module in (slots, adapted):
        stir(module, 0.02)
    return LanguageObjective(HybridLM(adapted, slots), loss)


def parameter_groups(objective: LanguageObjective) -> list[ParameterGroup]:
    adapter = [p for p in objective.model.llm.parameters() if p.requires_grad]
    assert objective.model.slots is not None
    slots = list(objective.model.slots.parameters())
    rests = {0, 2}.__contains__  # its first step is not the first, and a half has one each
    return [ParameterGroup(adapter, 1e-3, 0.01), ParameterGroup(slots, 5e-4, rests=rests)]


def micro_batches(folder: Path, step: int, accumulation: int) -> list[Batch]:
    """This worker's part of the rows of a step."""
    encoder = make_encoder(load_tokenizer(folder), "unified")
    rows = ROWS[step * BATCH : (step + 1) * BATCH]
    parts = dist.get_world_size() * accumulation
    tokens = answer_tokens([row.target for row in rows], encoder) / parts
    own = rows[dist.get_rank() :: dist.get_world_size()]
    return [
        make_batch(encoder, own[i::accumulation], tokens_per_batch=tokens)
        for i in range(accumulation)
    ]


def make_engine(
    folder: Path,
    stage: int,
    loss: LossConfig,
    accumulation: int = 1,
    *,
    cached: bool = False,
    recompute: bool = False,
    offload: Offload = "none",
) -> Engine:
    objective = make_objective(folder, loss, recompute=recompute)
    optimization = Optimization(
        groups=parameter_groups(objective),
        schedule=SCHEDULE,
        micro_batch=BATCH // (dist.get_world_size() * accumulation),
        accumulation=accumulation,
        max_gradient_norm=CLIP,
        look_ahead=objective.look_ahead if cached else list,
    )
    return Engine(objective, optimization, zero_stage=stage, bf16=False, offload=offload)


def train_engine(engine: Engine, folder: Path, accumulation: int = 1, start: int = 0) -> Run:
    losses = [
        engine.step(micro_batches(folder, step, accumulation), step)["loss"]
        for step in range(start, STEPS)
    ]
    return losses, engine.trainable()


def train_plainly(folder: Path, loss: LossConfig) -> Run:
    objective = make_objective(folder, loss)
    groups = parameter_groups(objective)
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups]
    )
    encoder = make_encoder(load_tokenizer(folder), "unified")
    losses = []
    for step in range(STEPS):
        for live, group in zip(optimizer.param_groups, groups, strict=True):
            live["lr"] = group.learning_rate * SCHEDULE(step)
        value, _ = objective(make_batch(encoder, ROWS[step * BATCH : (step + 1) * BATCH]))
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        assert norm > CLIP, "every step is clipped"
        for parameter in (p for g in groups if g.rests(step) for p in g.parameters):
            parameter.grad = None
        optimizer.step()
        losses.append(value.item())
    named = objective.named_parameters()
    return losses, {name: p.detach() for name, p in named if p.requires_grad}


def assert_equal_runs(run: Run, expected: Run) -> None:
    # AdamW divides nearly vanishing gradients by themselves, and so their rounding too.
    assert run[0] == pytest.approx(expected[0], rel=1e-6)
    assert run[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(
            run[1][name], tensor, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def plain(wide_llm: Path) -> Run:
    return train_plainly(wide_llm, FULL)


def test_training_moves_everything(wide_llm: Path, plain: Run) -> None:
    """Else equality after training would say little."""
    start = dict(make_objective(wide_llm, FULL).named_parameters())
    for name, tensor in plain[1].items():
        assert (tensor - start[name]).abs().max() > 5e-4, name


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_equals_plain_adamw(wide_llm: Path, plain: Run, stage: int) -> None:
    assert_equal_runs(train_engine(make_engine(wide_llm, stage, FULL), wide_llm), plain)


@pytest.mark.parametrize("stage", STAGES)
def test_cached_micro_batches_equal_plain_adamw(wide_llm: Path, plain: Run, stage: int) -> None:
    engine = make_engine(wide_llm, stage, FULL, accumulation=4, cached=True)
    assert_equal_runs(train_engine(engine, wide_llm, accumulation=4), plain)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_change_nothing(wide_llm: Path, plain: Run, stage: int) -> None:
    engine = make_engine(wide_llm, stage, FULL, recompute=True)
    assert_equal_runs(train_engine(engine, wide_llm), plain)


OFFLOADS: list[tuple[int, Offload]] = [(stage, "optimizer") for stage in (1, 2, 3)]
OFFLOADS += [(3, "parameters")]


def train_offloaded(folder: Path) -> list[Run]:
    return [
        train_engine(make_engine(folder, stage, FULL, offload=offload), folder)
        for stage, offload in OFFLOADS
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_offload_changes_nothing(wide_llm: Path, plain: Run, workers: int) -> None:
    ranks = run_in_world(train_offloaded, workers, wide_llm)
    for run in (run for rank in ranks for run in rank):
        assert_equal_runs(run, plain)


HALF = STEPS // 2


def first_half(folder: Path) -> list[dict[str, Tensor]]:
    """The states of all stages after half the steps."""
    states = []
    for stage in STAGES:
        engine = make_engine(folder, stage, FULL)
        for step in range(HALF):
            engine.step(micro_batches(folder, step, accumulation=1), step)
        states.append({name: tensor.clone() for name, tensor in engine.state()})
    return states


def second_halves(folder: Path, states: list[dict[str, Tensor]]) -> list[Run]:
    """Every stage goes on from every state."""
    runs = []
    for state in states:
        for stage in STAGES:
            engine = make_engine(folder, stage, FULL)
            engine.load_state(state.__getitem__, HALF)
            runs.append(train_engine(engine, folder, start=HALF))
    return runs


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_any_world_and_stage_goes_on_from_any(
    wide_llm: Path, plain: Run, before: int, after: int
) -> None:
    states = run_in_world(first_half, before, wide_llm)[0]
    assert {name for state in states for name in state} == set(states[0])
    expected = plain[0][HALF:], plain[1]
    for run in (
        run for rank in run_in_world(second_halves, after, wide_llm, states) for run in rank
    ):
        assert_equal_runs(run, expected)


def train_cached(folder: Path) -> list[Run]:
    return [
        train_engine(make_engine(folder, stage, FULL, 2, cached=True), folder, accumulation=2)
        for stage in STAGES
    ]


def test_cached_micro_batches_of_two_workers_equal_plain_adamw(wide_llm: Path, plain: Run) -> None:
    for rank in run_in_world(train_cached, 2, wide_llm):
        for run in rank:
            assert_equal_runs(run, plain)


def train_then_poison(folder: Path) -> list[tuple[Run, int, str, bool]]:
    """For every stage: the run, its size, and what a loss of NaN on the last rank does then."""
    results = []
    for stage in STAGES:
        engine = make_engine(folder, stage, FULL)
        run = train_engine(engine, folder)
        size = sum(parameter.numel() for parameter in engine.objective.parameters())
        (batch,) = micro_batches(folder, 0, accumulation=1)
        if dist.get_rank() == dist.get_world_size() - 1:
            batch = replace(batch, tokens_per_batch=float("nan"))
        with pytest.raises(TrainingError) as caught:
            engine.step([batch], STEPS)
        after = engine.trainable()
        unchanged = all(torch.equal(after[name], tensor) for name, tensor in run[1].items())
        results.append((run, size, str(caught.value), unchanged))
    return results


@pytest.fixture(scope="module")
def two_workers(wide_llm: Path) -> list[Any]:
    """What `train_then_poison` returns on either rank."""
    return run_in_world(train_then_poison, 2, wide_llm)


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_equal_plain_adamw(two_workers: list[Any], plain: Run, stage: int) -> None:
    for rank in two_workers:
        assert_equal_runs(rank[stage][0], plain)


def test_stage_3_shards_the_weights(two_workers: list[Any]) -> None:
    """Between steps a worker holds the small ones only."""
    for rank in two_workers:
        sizes = [size for _, size, _, _ in rank]
        assert sizes[0] == sizes[1] == sizes[2]
        assert sizes[3] < sizes[0] / 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_both_workers(two_workers: list[Any], stage: int) -> None:
    for rank in two_workers:
        _, _, message, unchanged = rank[stage]
        assert "the loss of step 4 is not finite on worker 1;" in message
        assert "lower the learning rates" in message
        assert unchanged


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_without_contrasts_changes_nothing(wide_llm: Path, stage: int) -> None:
    engine = make_engine(wide_llm, stage, PLAIN, accumulation=2)
    run = train_engine(engine, wide_llm, accumulation=2)
    assert_equal_runs(run, train_plainly(wide_llm, PLAIN))


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_sees_the_schedule(stage: int) -> None:
    """AdamW moves a weight under a constant gradient by the learning rate, step for step."""
    factors = [0.5, 0.0, 1.0]
    weight = Scalar()
    optimization = Optimization(
        groups=[ParameterGroup([weight.value], 1e-2)],
        schedule=lambda step: factors[step],
        micro_batch=1,
    )
    engine = Engine(weight, optimization, zero_stage=stage, bf16=False)
    places = [0.0]
    for step in range(len(factors)):
        engine.step([torch.tensor(1.0)], step)
        places.append(float(engine.trainable()["value"]))
    moves = [before - after for before, after in pairwise(places)]
    assert moves == pytest.approx([0.5e-2, 0.0, 1e-2], abs=1e-7)


class Scalar(torch.nn.Module):
    """One weight whose gradient is what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (batch * self.value).sum()
        return loss, {"loss": loss.detach()}


def test_warmup_then_cosine() -> None:
    factor = warmup_then_cosine(steps=13, warmup=3, floor=0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(8) == pytest.approx(0.55), "half-way down"
    assert factor(13) == factor(99) == pytest.approx(0.1)
