"""Recommender width -> language-model width.

Axes: E recommender width, D language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsllm.config import ProjectorConfig


class Projector(nn.Module):
    """A linear map of item vectors plus an MLP that starts at zero.

    Standardised item vectors come out at the scale of the backbone's token embeddings, so that
    slots neither vanish nor drown the text from the first step on. The shape of RSLLM's projector
    is not known (arXiv 2412.16933, abstract); LLaRA's is a two-layer perceptron (arXiv 2312.02445).
    """

    def __init__(self, width: int, llm_width: int, config: ProjectorConfig, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, llm_width)
        nn.init.normal_(self.linear.weight, std=scale / width**0.5)
        nn.init.zeros_(self.linear.bias)
        layers: list[nn.Module] = []
        for depth in range(config.depth):
            layers += [nn.Linear(config.hidden if depth else width, config.hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(config.hidden, llm_width)) if layers else None
        if self.mlp is not None:
            last = self.mlp[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, items_E: Tensor) -> Tensor:
        """[..., E] standardised item vectors -> [..., D] slot vectors."""
        items_E = items_E.to(self.linear.weight.dtype)
        out: Tensor = self.linear(items_E)
        return out if self.mlp is None else out + self.mlp(items_E)


def embedding_scale(embeddings_VD: Tensor) -> float:
    """Standard deviation of a token-embedding table."""
    with torch.no_grad():
        return float(embeddings_VD.float().std())
