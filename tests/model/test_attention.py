"""Attention by products against a float64 reference, beside PyTorch's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rsllm.model import attention

B, H, G, T, D = 3, 6, 2, 37, 16


def inputs(dtype: torch.dtype, tokens: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, tokens, D), (B, G, tokens, D), (B, G, tokens, D))
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def module() -> Any:
    return SimpleNamespace(is_causal=True, num_key_value_groups=H // G, training=True)


def branches() -> Tensor:
    """A causal mask with holes, and one row that sees nothing at all."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(B, 1, T, T, generator=generator) < 0.7
    mask = (mask | torch.eye(T, dtype=torch.bool)).tril()
    mask[0, 0, 5] = False
    return mask


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """One head, one query at a time."""
    out = torch.zeros_like(query)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = torch.arange(T) <= t if mask is None else mask[b, 0, t]
                scores = key[b, h * G // H, seen] @ query[b, h, t] / D**0.5
                out[b, h, t] = scores.softmax(0) @ value[b, h * G // H, seen]
    return out.transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_as_near_to_the_exact_result_as_sdpa_is(masked: bool) -> None:
    mask = branches() if masked else None
    sees = slice(None) if mask is None else mask[:, 0].any(-1)
    weights = torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(2))
    errors: dict[str, list[float]] = {}
    wanted = inputs(torch.float64)
    reference = exact(*wanted, mask)
    expected = [reference[sees], *torch.autograd.grad((reference * weights)[sees].sum(), wanted)]
    for name, attend in (("products", attention._attend), ("sdpa", sdpa_attention_forward)):
        given = inputs(torch.bfloat16)
        out, _ = attend(module(), *given, mask, scaling=D**-0.5)
        found = [out[sees], *torch.autograd.grad((out * weights)[sees].sum(), given)]
        assert all(x.isfinite().all() for x in found)
        errors[name] = [
            ((x.double() - y).norm() / y.norm()).item()
            for x, y in zip(found, expected, strict=True)
        ]
    assert max(errors["products"]) < 0.02
    for ours, theirs in zip(errors["products"], errors["sdpa"], strict=True):
        assert ours < 3 * theirs


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.float32, T), (torch.bfloat16, attention.LONGEST + 1)]
)
def test_elsewhere_it_is_sdpa_itself(dtype: torch.dtype, tokens: int) -> None:
    given = inputs(dtype, tokens)
    ours, _ = attention._attend(module(), *given, None)
    repeated = [x.repeat_interleave(H // G, 1) for x in given[1:]]
    theirs = F.scaled_dot_product_attention(given[0], *repeated, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
