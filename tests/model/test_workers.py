"""Two workers with four rows each are one worker with eight."""

from __future__ import annotations

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

LOSS = LossConfig(alpha=0.3, beta=0.3, gamma=0.5, temperature=0.2)
ROWS = make_rows(8, seed=1)


def loss_and_gradient(folder: Path) -> tuple[dict[str, float], Tensor]:
    """This worker's parts and flat gradient, over its share of ROWS."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    share = len(ROWS) // world
    encoder = make_encoder(load_tokenizer(folder), "unified")
    tokens = answer_tokens([row.target for row in ROWS], encoder) / world
    model = make_trainable(folder)
    rows = ROWS[rank * share : (rank + 1) * share]
    loss, parts = LanguageObjective(model, LOSS)(make_batch(encoder, rows, tokens_per_batch=tokens))
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {name: float(value) for name, value in parts.items()}, torch.cat(gradients)


def test_two_workers_equal_one(random_llm: Path) -> None:
    widths = [max(len(row.history) for row in half) for half in (ROWS[:4], ROWS[4:])]
    assert widths[0] != widths[1], "workers with histories of different widths"
    whole, whole_gradient = loss_and_gradient(random_llm)
    (first, first_gradient), (second, second_gradient) = run_in_world(
        loss_and_gradient, 2, random_llm
    )
    assert first["contrast/user_negatives"] > 3, "negatives of the other worker"
    assert whole["loss/user_contrast"] > 0.1
    for name in ("loss", "loss/next_item", "loss/ranking"):
        mean = (first[name] + second[name]) / 2
        assert mean == pytest.approx(whole[name], abs=1e-6, rel=1e-6), name
    for name in ("target_contrast", "user_contrast"):
        mean = (first[f"loss/{name}"] + second[f"loss/{name}"]) / 2
        assert mean == pytest.approx(whole[f"loss/{name}"], abs=1e-6)
    assert float(whole_gradient.abs().max()) > 1e-2
    torch.testing.assert_close(
        (first_gradient + second_gradient) / 2, whole_gradient, atol=1e-6, rtol=1e-5
    )


def fail_on_last_rank() -> None:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError(f"the ranks add up to {total:.0f}")
    dist.barrier()


def test_a_failing_worker_fails_the_world() -> None:
    with pytest.raises(ExceptionGroup, match="2 of 2 ranks failed") as caught:
        run_in_world(fail_on_last_rank, 2)
    assert caught.group_contains(ValueError, match="the ranks add up to 3")
