"""Slots start at the scale of the text, and the MLP at nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import stir

from rsllm.config import ProjectorConfig
from rsllm.model.backbone import load_backbone
from rsllm.model.hybrid import ItemSlots
from rsllm.model.projector import RIDGE, Projector, embedding_scale, mean_embeddings


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_output_starts_at_the_scale_of_the_embeddings(
    tiny_llm: Path, depth: int, scale: float
) -> None:
    torch.manual_seed(0)
    table_VD = load_backbone(tiny_llm, torch.float32).get_input_embeddings().weight
    config = ProjectorConfig(depth=depth, hidden=32, scale=scale)
    slots = ItemSlots(torch.randn(4000, 64), table_VD, config)
    out_ID = slots.projector(slots.items_IE)
    assert out_ID.std().item() == pytest.approx(scale * table_VD.std().item(), rel=0.1)
    assert slots.marker_D.std().item() == pytest.approx(float(table_VD.std()), rel=0.3)


def test_bounded_slots_keep_their_length_whatever_the_weights_grow_to() -> None:
    torch.manual_seed(0)
    config = ProjectorConfig(depth=1, hidden=8, bounded=True)
    projector, items_IE = Projector(6, 64, config, scale=0.5), torch.randn(9, 6)
    assert float(projector.linear.weight.std()) == pytest.approx(6**-0.5, rel=0.1)
    for growth in (1.0, 30.0):
        with torch.no_grad():
            projector.linear.weight.mul_(growth)
        length_I = projector(items_IE).double().square().mean(1).sqrt()
        torch.testing.assert_close(length_I, torch.full((9,), 0.5).double(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        projector.gain.fill_(3.0)
    assert float(projector(items_IE)[0].square().mean().sqrt()) == pytest.approx(1.5, rel=1e-5)
    assert not projector(torch.zeros(1, 6)).any(), "an item without a vector says nothing"


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


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_hidden_layers_equal_the_naive_formula(norm: Any, activation: Any) -> None:
    torch.manual_seed(0)
    config = ProjectorConfig(depth=2, hidden=6, norm=norm, activation=activation)
    projector, items_IE = Projector(4, 5, config, scale=0.5), torch.randn(7, 4)
    stir(projector, 0.5)
    weights = dict(projector.named_parameters())
    hidden = items_IE
    step = 2 if norm == "none" else 3
    for layer in (0, step):
        hidden = hidden @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
        if norm == "layer":
            hidden = hidden - hidden.mean(1, keepdim=True)
        if norm != "none":
            hidden = hidden / (hidden.square().mean(1, keepdim=True) + 1e-6).sqrt()
            hidden = hidden * weights[f"mlp.{layer + 1}.weight"]
        if norm == "layer":
            hidden = hidden + weights[f"mlp.{layer + 1}.bias"]
        hidden = getattr(torch.nn.functional, activation)(hidden)
    mlp = hidden @ weights[f"mlp.{2 * step}.weight"].T + weights[f"mlp.{2 * step}.bias"]
    expected = projector.linear(items_IE) + mlp
    torch.testing.assert_close(projector(items_IE), expected, atol=1e-4, rtol=1e-4)


def test_it_starts_at_the_ridge_regression_of_titles() -> None:
    """Which minimises the penalised squares over the items that have a vector."""
    torch.manual_seed(0)
    items_IE, titles_ID = torch.randn(40, 6), 3 + torch.randn(40, 9)
    items_IE[5] = 0
    projector = Projector(6, 9, ProjectorConfig(depth=1, hidden=4), scale=0.5)
    before = projector(items_IE[items_IE.any(1)]).std(0, correction=0).square().mean().sqrt()
    projector.start_at_titles(items_IE, titles_ID)
    known = [i for i in range(40) if i != 5]
    items, titles = items_IE[known].double(), titles_ID[known].double()
    items, titles = items - items.mean(0), titles - titles.mean(0)
    weight_ED = torch.zeros(6, 9, dtype=torch.float64, requires_grad=True)
    misfit = (items @ weight_ED - titles).square().sum()
    (misfit + RIDGE * len(known) * weight_ED.square().sum()).backward()
    assert weight_ED.grad is not None
    curvature = 2 * (items.T @ items + RIDGE * len(known) * torch.eye(6))
    optimum_DE = -torch.linalg.inv(curvature).matmul(weight_ED.grad).T
    found_DE = projector.linear.weight.double()
    factor = (found_DE * optimum_DE).sum() / optimum_DE.square().sum()
    torch.testing.assert_close(found_DE, factor * optimum_DE, atol=1e-5, rtol=1e-5)
    assert factor > 0
    after = projector(items_IE[known]).std(0, correction=0).square().mean().sqrt()
    assert float(after) == pytest.approx(float(before), rel=1e-5)
    assert not projector.linear.bias.any()
    projector.start_at_titles(items_IE, titles_ID.index_fill(0, torch.tensor([5]), 99.0))
    torch.testing.assert_close(projector.linear.weight.double(), found_DE, atol=1e-6, rtol=1e-5)


def test_mean_embeddings_equal_the_naive_loop() -> None:
    table_VD = torch.randn(6, 3)
    expected_ID = torch.stack([(table_VD[1] + table_VD[4] + table_VD[4]) / 3, table_VD[5]])
    torch.testing.assert_close(mean_embeddings(table_VD, [[1, 4, 4], [5]]), expected_ID)


def test_embedding_scale_is_the_float64_deviation() -> None:
    table_VD = 0.136 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    expected = float(table_VD.double().std())
    assert embedding_scale(table_VD) == pytest.approx(expected, rel=1e-6)
    assert embedding_scale(table_VD.bfloat16()) == pytest.approx(expected, rel=1e-2)
