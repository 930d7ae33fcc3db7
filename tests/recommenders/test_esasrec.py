"""A gated block against the equations of LiGR (arXiv 2502.03417), written out with loops."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from rsllm.config import RecommenderConfig
from rsllm.recommenders.esasrec import WIDENING, GatedBlock

WIDTH, HEADS, LENGTH = 6, 2, 4
Floats = NDArray[np.float64]


def block() -> GatedBlock:
    torch.manual_seed(0)
    config = RecommenderConfig(model="esasrec", width=WIDTH, num_heads=HEADS, dropout=0.0)
    made = GatedBlock(config).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def weights(made: GatedBlock) -> dict[str, Floats]:
    return {name: parameter.detach().numpy() for name, parameter in made.named_parameters()}


def sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def norm(x: Floats, scale: Floats, shift: Floats) -> Floats:
    return np.asarray((x - x.mean()) / math.sqrt(x.var() + 1e-5) * scale + shift)


def attended(x_HE: Floats, place: int, w: dict[str, Floats]) -> Floats:
    """What attention gives to a place that sees itself and all before it."""
    normed = [norm(x, w["attention_norm.weight"], w["attention_norm.bias"]) for x in x_HE]
    query = w["query.weight"] @ normed[place] + w["query.bias"]
    both = [w["key_value.weight"] @ x + w["key_value.bias"] for x in normed[: place + 1]]
    size, heads = WIDTH // HEADS, []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        keys, values = [b[:WIDTH][own] for b in both], [b[WIDTH:][own] for b in both]
        chance = np.exp([query[own] @ key / math.sqrt(size) for key in keys])
        heads.append(sum(c * v for c, v in zip(chance / chance.sum(), values, strict=True)))
    return np.asarray(w["out.weight"] @ np.concatenate(heads) + w["out.bias"])


def test_a_block_is_the_equations() -> None:
    made = block()
    w = weights(made)
    x_HE = np.random.default_rng(0).normal(size=(LENGTH, WIDTH))
    expected = []
    for place, x in enumerate(x_HE):
        opened = sigmoid(w["attention_gate.weight"] @ x + w["attention_gate.bias"])
        y = x + opened * attended(x_HE, place, w)
        normed = norm(y, w["feed_forward.0.weight"], w["feed_forward.0.bias"])
        gate, value = np.split(w["feed_forward.1.opened.weight"] @ normed, 2)
        assert len(gate) == WIDENING * WIDTH
        changed = w["feed_forward.1.out.weight"] @ (gate * sigmoid(gate) * value)
        opened = sigmoid(w["feed_forward_gate.weight"] @ y + w["feed_forward_gate.bias"])
        expected.append(y + opened * changed)
    x_BHE = torch.from_numpy(x_HE)[None]
    sees_HH = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(made(x_BHE, x_BHE, sees_HH)[0], torch.from_numpy(np.stack(expected)))
    last = made(x_BHE[:, -1:], x_BHE, torch.ones(1, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(last[0, 0], torch.from_numpy(expected[-1]))
