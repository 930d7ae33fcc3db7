"""Slots start at the scale of the text, and the MLP at nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsllm.config import ProjectorConfig
from rsllm.model.backbone import load_backbone
from rsllm.model.hybrid import ItemSlots
from rsllm.model.projector import Projector, embedding_scale


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_output_starts_at_the_scale_of_the_embeddings(tiny_llm: Path, depth: int) -> None:
    torch.manual_seed(0)
    table_VD = load_backbone(tiny_llm, torch.float32).get_input_embeddings().weight
    slots = ItemSlots(torch.randn(4000, 64), table_VD, ProjectorConfig(depth=depth, hidden=32))
    out_ID = slots.projector(slots.items_IE)
    assert out_ID.std().item() == pytest.approx(table_VD.std().item(), rel=0.1)
    assert slots.marker_D.std().item() == pytest.approx(float(table_VD.std()), rel=0.3)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_mlp_starts_at_zero_and_learns(depth: int) -> None:
    torch.manual_seed(0)
    projector = Projector(8, 16, ProjectorConfig(depth=depth, hidden=32), scale=0.5)
    items_IE = torch.randn(10, 8)
    linear_ID = items_IE @ projector.linear.weight.T
    assert torch.equal(projector(items_IE), projector.linear(items_IE))
    torch.testing.assert_close(projector(items_IE), linear_ID)
    hidden = [x for x in projector.mlp or () if isinstance(x, torch.nn.Linear)]
    assert [layer.out_features for layer in hidden] == ([32] * depth + [16] if depth else [])
    if hidden:
        loss = projector(items_IE).square().sum()
        (gradient,) = torch.autograd.grad(loss, [hidden[-1].weight])
        assert gradient.abs().max() > 0


def test_embedding_scale_is_the_float64_deviation() -> None:
    table_VD = 0.136 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    expected = float(table_VD.double().std())
    assert embedding_scale(table_VD) == pytest.approx(expected, rel=1e-6)
    assert embedding_scale(table_VD.bfloat16()) == pytest.approx(expected, rel=1e-2)
