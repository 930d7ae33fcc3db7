"""Two workers with four rows each are one worker with eight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_models import make_batch, make_encoder, make_rows, make_trainable
from torch import Tensor
from world import run_in_world

from rsllm.config import LossConfig
from rsllm.model.backbone import load_tokenizer
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import answer_tokens

LOSS = LossConfig(alpha=0.3, beta=0.3, gamma=0.5, temperature=0.2, symmetric=True, alignment=0.4)
CONTRASTS = ("target_contrast", "user_contrast", "alignment_contrast")
ROWS = make_rows(8, seed=1)


def loss_and_gradient(folder: Path, accumulation: int = 1) -> tuple[dict[str, float], Tensor]:
    """This worker's mean parts and flat gradient, over its share of ROWS; cached if accumulated."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    size = len(ROWS) // (world * accumulation)
    encoder = make_encoder(load_tokenizer(folder), "unified")
    tokens = answer_tokens([row.target for row in ROWS], encoder) / (world * accumulation)
    objective = LanguageObjective(make_trainable(folder).train(), LOSS)
    starts = [(rank * accumulation + number) * size for number in range(accumulation)]
    batches = [
        make_batch(encoder, ROWS[start : start + size], tokens_per_batch=tokens) for start in starts
    ]
    reports = []
    torch.manual_seed(0)
    for batch in objective.look_ahead(batches) if accumulation > 1 else batches:
        loss, parts = objective(batch)
        (loss / accumulation).backward()
        reports.append(parts)
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return {name: mean(reports, name) for name in reports[0]}, torch.cat(gradients)


def mean(reports: Sequence[Mapping[str, Tensor | float]], name: str) -> float:
    return sum(float(report[name]) for report in reports) / len(reports)


def assert_same(
    found: list[tuple[dict[str, float], Tensor]], whole: tuple[dict[str, float], Tensor]
) -> None:
    """The mean over workers is what one worker has on the whole batch."""
    reports, gradients = zip(*found, strict=True)
    assert set(reports[0]) == set(whole[0])
    for name, value in whole[0].items():
        assert mean(reports, name) == pytest.approx(value, abs=2e-6, rel=1e-5), name
    gradient = torch.stack(gradients).mean(0)
    torch.testing.assert_close(gradient, whole[1], atol=2e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(random_llm: Path) -> tuple[dict[str, float], Tensor]:
    parts, gradient = loss_and_gradient(random_llm)
    assert all(parts[f"loss/{name}"] > 0.1 for name in CONTRASTS)
    assert float(gradient.abs().max()) > 1e-2
    return parts, gradient


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_workers_equal_one(
    random_llm: Path, whole: tuple[dict[str, float], Tensor], accumulation: int
) -> None:
    """With cached gradients also where each has two micro-batches."""
    widths = [max(len(row.history) for row in half) for half in (ROWS[:4], ROWS[4:])]
    assert widths[0] != widths[1], "workers with histories of different widths"
    found = run_in_world(loss_and_gradient, 2, random_llm, accumulation)
    assert found[0][0]["contrast/user_negatives"] > 3, "negatives of the other worker"
    assert_same(found, whole)


def test_cached_micro_batches_equal_one_batch(
    random_llm: Path, whole: tuple[dict[str, float], Tensor]
) -> None:
    assert_same([loss_and_gradient(random_llm, accumulation=4)], whole)


def fail_on_last_rank() -> None:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError(f"the ranks add up to {total:.0f}")
    dist.barrier()


def test_a_failing_worker_fails_the_world() -> None:
    with pytest.raises(ExceptionGroup, match="3 of 3 ranks failed") as caught:
        run_in_world(fail_on_last_rank, 3)
    assert caught.group_contains(ValueError, match="the ranks add up to 6")
