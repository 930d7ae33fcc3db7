"""LoRA's dropout against peft's layer under the same mask, and against what Bernoulli says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsllm.config import BackboneConfig
from rsllm.model.backbone import load_backbone, tunable
from rsllm.model.dropout import CHANCES, LoraDropout


def layer(share: float) -> LoraDropout:
    return LoraDropout(share, [])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.003])
def test_the_share_and_the_mean_are_those_asked_for(share: float) -> None:
    torch.manual_seed(0)
    out = layer(share)(torch.ones(1000, 999, dtype=torch.float64))
    dropped = (out == 0).double().mean().item()
    sd = (share * (1 - share) / out.numel()) ** 0.5
    assert dropped == pytest.approx(share, abs=5 * sd + 0.5 / CHANCES)
    assert out.mean().item() == pytest.approx(1, abs=5 * sd / (1 - share))
    rows, columns = ((out == 0).double().mean(dim) for dim in (1, 0))
    for part, size in ((rows, 999), (columns, 1000)):  # neighbours are independent of each other
        assert part.var().item() == pytest.approx(share * (1 - share) / size, rel=0.25)


def test_masks_are_a_function_of_the_generator() -> None:
    x = torch.randn(7, 13)
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        drop = layer(0.3)
        masks.append((drop(x), drop(x.clone())))
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0] == 0, masks[0][1] == 0)


def test_layers_that_read_one_tensor_share_a_mask_and_no_others_do() -> None:
    last: list[Tensor] = []
    first, second = LoraDropout(0.5, last), LoraDropout(0.5, last)
    x = torch.randn(50, 8)
    out = first(x)
    assert torch.equal(out, second(x.view(50, 8)))
    assert not torch.equal(out == 0, second(x + 0) == 0)
    assert not torch.equal(out == 0, first(x) == 0)  # another tensor was read in between
    assert torch.equal(first.eval()(x), x)


def adapted(folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = BackboneConfig(source=str(folder), lora_rank=2, **settings)
    llm = tunable(load_backbone(folder, torch.float32), config).train()
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return llm


class Recorded(nn.Module):
    """Multiplies by a mask that was recorded elsewhere."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def gradients(llm: Any, ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    llm(ids).logits.square().mean().backward()
    return {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_peft_under_the_same_masks(random_llm: Path) -> None:
    llm, ids = adapted(random_llm, lora_dropout=0.3), torch.arange(12).view(2, 6) + 40
    factors: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        factors[name] = (out / inputs[0]).detach()

    plain = copy.deepcopy(llm)
    layers = {n: m for n, m in llm.named_modules() if isinstance(m, LoraDropout)}
    for name, module in layers.items():
        module.register_forward_hook(lambda *a, name=name: record(name, *a))
    found = gradients(llm, ids)
    for name in layers:
        parent = plain.get_submodule(name.rsplit(".", 1)[0])
        parent["default"] = Recorded(factors[name])
    expected = gradients(plain, ids)
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    shared = [factors[n] for n in layers if "layers.0.self_attn" in n and "o_proj" not in n]
    assert len(shared) == 3
    assert all(torch.equal(shared[0], other) for other in shared)


def test_recomputed_activations_are_dropped_alike(random_llm: Path) -> None:
    ids = torch.arange(12).view(2, 6) + 40
    whole = gradients(adapted(random_llm, lora_dropout=0.3), ids)
    again = gradients(adapted(random_llm, lora_dropout=0.3, gradient_checkpointing=True), ids)
    assert whole.keys() == again.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, again[name])
