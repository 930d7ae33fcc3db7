"""Dropout on LoRA's input as peft has it, by one cheap mask for all layers that read a tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from rsllm.model.attention import product_dtype

CHANCES = 2**16
"""Of which dropping an entry takes a share: its probability is rounded to one of so many."""


class LoraDropout(nn.Module):
    """Zeroes entries of a layer's input at random, and scales the others so that its mean stays.

    The layers of a model that read the same tensor one after another (queries, keys and values, or
    gate and up) read it under the same mask. What they read is in the type of their products.

    Args:
        share: of entries that are dropped.
        last: what the latest layer of the model read, and what was left of it.
    """

    def __init__(self, share: float, last: list[Tensor]) -> None:
        super().__init__()
        self.num_dropped, self.last = round(share * CHANCES), last

    def forward(self, x: Tensor) -> Tensor:
        """`x` under a mask that is drawn from torch's generator."""
        if not self.training:
            return x
        # ZeRO 3 hands each layer a view of its own. What is kept here cannot be overwritten.
        if not (self.last and x.is_set_to(self.last[0])):
            self.last[:] = x, self._dropped(x.to(product_dtype(x)))
        return self.last[1]

    def _dropped(self, x: Tensor) -> Tensor:
        # On CPUs 64-bit words are drawn several times as fast as booleans: one for four entries.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        number = words.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = torch.ge(number, self.num_dropped - CHANCES // 2, out=torch.empty_like(x))
        return x * kept * (CHANCES / (CHANCES - self.num_dropped))


def share_dropout(llm: Any, share: float) -> None:
    """Replace peft's dropout in all LoRA layers of a model."""
    from peft.tuners.lora import LoraLayer

    last: list[Tensor] = []
    for layer in llm.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # to fp32, and back where autocast is on
            for name in layer.lora_dropout if share else ():
                layer.lora_dropout[name] = LoraDropout(share, last)
