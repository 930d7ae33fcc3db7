"""Recommender width -> language-model width.

Axes: I items, E recommender width, D language-model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm.config import ProjectorConfig

RIDGE = 0.1
"""Weight of the penalty per item, in variances of a standardised vector's entry."""
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
_NORMS = {"none": None, "layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Projector(nn.Module):
    """A linear map of item vectors plus an MLP that starts at zero.

    Standardised item vectors come out at the scale of the backbone's token embeddings, or the
    configured multiple of it, so that slots neither vanish nor drown the text by accident. The
    shape of RSLLM's projector is not known (arXiv 2412.16933, abstract); LLaRA's is a two-layer
    perceptron (arXiv 2312.02445).
    """

    def __init__(self, width: int, llm_width: int, config: ProjectorConfig, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, llm_width)
        self.length, self.gain = scale, nn.Parameter(torch.ones(1)) if config.bounded else None
        nn.init.normal_(self.linear.weight, std=(1.0 if config.bounded else scale) / width**0.5)
        nn.init.zeros_(self.linear.bias)
        layers: list[nn.Module] = []
        norm = _NORMS[config.norm]
        for depth in range(config.depth):
            layers.append(nn.Linear(config.hidden if depth else width, config.hidden))
            layers += [norm(config.hidden)] if norm else []
            layers.append(_ACTIVATIONS[config.activation]())
        self.mlp = nn.Sequential(*layers, nn.Linear(config.hidden, llm_width)) if layers else None
        if self.mlp is not None:
            for parameter in self.mlp[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, items_E: Tensor) -> Tensor:
        """[..., E] standardised item vectors -> [..., D] slot vectors."""
        items_E = items_E.to(self.linear.weight.dtype)
        out: Tensor = self.linear(items_E)
        if self.mlp is not None:
            out = out + self.mlp(items_E)
        if self.gain is not None:
            out = self.gain * self.length * F.rms_norm(out, out.shape[-1:])
        return out

    @torch.no_grad()
    def start_at_titles(self, items_IE: Tensor, titles_ID: Tensor) -> None:
        """Start the linear map at the ridge regression of titles on items, at its present scale.

        Both are centred, for what all titles share says nothing about an item. Rows of zeros, items
        that have no vector, are left out.
        """
        known_I = items_IE.any(dim=1)
        items, titles = items_IE[known_I].double(), titles_ID[known_I].double()
        items, titles = items - items.mean(dim=0), titles - titles.mean(dim=0)
        penalty_EE = RIDGE * len(items) * torch.eye(items.shape[1], dtype=items.dtype)
        weight_ED = torch.linalg.solve(items.T @ items + penalty_EE, items.T @ titles)
        present_ED = self.linear.weight.T.double()
        scale = (items @ present_ED).std() / (items @ weight_ED).std()
        self.linear.weight.copy_((scale * weight_ED).T)


def mean_embeddings(embeddings_VD: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Mean embedding of each text's tokens. [I, D]."""
    return torch.stack([embeddings_VD[list(ids)].float().mean(dim=0) for ids in texts])


def embedding_scale(embeddings_VD: Tensor) -> float:
    """Standard deviation of a token-embedding table."""
    return float(embeddings_VD.detach().float().std())
