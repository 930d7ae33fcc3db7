"""Frozen vectors of titles: what a backbone knows of the items before any tuning."""

# Axes: I items, D language-model width.
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rsllm.config import PromptConfig
from rsllm.model.backbone import load_backbone, load_tokenizer
from rsllm.model.hybrid import HybridLM
from rsllm.prompts.collate import items_alone
from rsllm.prompts.encode import PromptEncoder
from rsllm.terminal import Progress

TITLES_AT_ONCE = 64


@torch.inference_mode()
def title_vectors(
    backbone: str | Path, titles: Sequence[str], config: PromptConfig, threads: int
) -> Tensor:
    """Mean final-norm state over each title's tokens, float32 [I, D].

    Raises:
        ConfigError: the backbone cannot be loaded.
        DataError: a title that cannot be tokenised.
    """
    if threads:
        torch.set_num_threads(threads)
    model = HybridLM(load_backbone(backbone, torch.float32), slots=None).eval()
    encoder = PromptEncoder(load_tokenizer(backbone), titles, config, "text", "item")
    items = [encoder.item(item) for item in range(len(titles))]
    order = sorted(range(len(items)), key=lambda item: len(items[item]))  # so that little is padded
    found = []
    with Progress(total=len(items), desc="titles", unit=" titles") as shown:
        for start in range(0, len(items), TITLES_AT_ONCE):
            chunk = [items[item] for item in order[start : start + TITLES_AT_ONCE]]
            found.append(model.item_states(items_alone(chunk, encoder)))
            shown.update(len(chunk))
    return torch.cat(found).float()[torch.tensor(order).argsort()]
