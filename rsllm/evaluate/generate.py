"""Greedy answers, decoded under explicit settings and cut at the terminator, a newline."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import Tensor

from rsllm.data.sequences import Rows
from rsllm.evaluate.rank import decision
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.encode import NO_ITEM, PromptEncoder, Tokens


@torch.inference_mode()
def greedy_answers(
    objective: LanguageObjective,
    rows: Rows,
    encoder: PromptEncoder,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One answer per row: greedy, left-padded, at most `max_new_tokens`, up to the terminator."""
    from transformers import GenerationConfig

    objective.eval()
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=encoder.terminator,
        pad_token_id=encoder.terminator,
        use_cache=True,
    )
    device = next(objective.parameters()).device
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        chosen = [decision(rows, i) for i in range(start, min(start + batch_size, len(rows)))]
        prompts = [encoder.prompt(r.history, r.candidates, r.template).tokens for r in chosen]
        ids_BT, item_BT, mask_BT = (x.to(device) for x in _left_padded(prompts, encoder.terminator))
        with torch.autocast(device.type, torch.bfloat16, enabled=objective.autocast):
            new_BN = objective.model.backbone.generate(
                inputs_embeds=objective.model.embed(ids_BT, item_BT),
                attention_mask=mask_BT,
                generation_config=settings,
            )
        answers += [_answer(ids, encoder) for ids in new_BN.tolist()]
        progress(len(answers))
    return answers


def _answer(ids: list[int], encoder: PromptEncoder) -> str:
    """The text before the terminator; behind it stands padding, or nothing."""
    own = takewhile(lambda token: token != encoder.terminator, ids)
    return str(encoder.tokenizer.decode(list(own), skip_special_tokens=True))


def _left_padded(prompts: list[Tokens], fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, items and attention mask, each [B, T], prompts flush right."""
    width = max(len(prompt) for prompt in prompts)
    gaps = [width - len(prompt) for prompt in prompts]
    padded = zip(gaps, prompts, strict=True)
    lists = [
        ([fill] * gap + p.ids, [NO_ITEM] * gap + p.items, [0] * gap + [1] * len(p))
        for gap, p in padded
    ]
    ids, items, masks = zip(*lists, strict=True)
    return torch.tensor(ids), torch.tensor(items), torch.tensor(masks)
