"""Greedy answers, free or among the candidates only, cut at the terminator, a newline.

Constrained decoding walks a trie of the row's answers (GENRE, arXiv 2010.00904).
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rsllm.config import Decoding
from rsllm.data.sequences import Rows
from rsllm.errors import EvaluationError
from rsllm.evaluate.rank import decision
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.encode import NO_ITEM, PromptEncoder, Tokens

Trie = dict[int, Any]
"""Token -> the trie of what may follow it."""


@torch.inference_mode()
def greedy_answers(
    objective: LanguageObjective,
    rows: Rows,
    encoder: PromptEncoder,
    titles: Sequence[str],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """One answer per row: greedy, left-padded, up to the terminator.

    An answer that is exactly one candidate's is spelled as its title, though the prompt may ask for
    a letter or cut a long title. So constrained answers are valid under the strict rule, unless two
    candidates share a title.

    Args:
        titles: of the whole catalogue.
        decoding: "free", at most `max_new_tokens` (or one letter), or "constrained": at every step
            the likeliest token that continues some candidate's answer, or ends one.

    Raises:
        EvaluationError: constrained answers of a row without candidates.
    """
    from transformers import GenerationConfig

    objective.eval()
    device = next(objective.parameters()).device
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        chosen = [decision(rows, i) for i in range(start, min(start + batch_size, len(rows)))]
        choices = [encoder.answers(row.candidates) for row in chosen]
        limit, allowed = max_new_tokens, None
        if decoding == "constrained":
            allowed = allowed_tokens([answer_trie(c, encoder.terminator) for c in choices])
        if allowed or not encoder.ending:
            limit = max(len(ids) for choice in choices for ids in choice) + len(encoder.ending)
        prompts = [encoder.prompt(r.history, r.candidates, r.template).tokens for r in chosen]
        ids_BT, item_BT, mask_BT = (x.to(device) for x in _left_padded(prompts, encoder.terminator))
        ends = {"eos_token_id": encoder.terminator, "pad_token_id": encoder.terminator}
        settings = GenerationConfig(max_new_tokens=limit, do_sample=False, use_cache=True, **ends)
        with torch.autocast(device.type, torch.bfloat16, enabled=objective.autocast):
            new_BN = objective.model.backbone.generate(
                inputs_embeds=objective.model.embed(ids_BT, item_BT),
                attention_mask=mask_BT,
                generation_config=settings,
                prefix_allowed_tokens_fn=allowed,
            )
        for ids, row, choice in zip(new_BN.tolist(), chosen, choices, strict=True):
            names = [titles[item] for item in row.candidates]
            answers.append(_spelled(ids, choice, names, encoder))
    return answers


def answer_trie(answers: Sequence[Sequence[int]], terminator: int) -> Trie:
    """The prefixes of some answers; each is followed by the terminator, and that by itself.

    An answer may be the prefix of another: there the terminator is one way on among others.

    Raises:
        EvaluationError: no answers, so that nothing would be allowed.
    """
    if not answers:
        raise EvaluationError(
            "a row has no candidates, so constrained decoding allows no answer; score rows with"
            ' candidate sets, or set evaluation.decoding to ["free"]'
        )
    end: Trie = {}
    end[terminator] = end
    root: Trie = {}
    for ids in answers:
        node = root
        for token in ids:
            node = node.setdefault(token, {})
        node[terminator] = end
    return root


def allowed_tokens(tries: Sequence[Trie]) -> Callable[[int, Tensor], list[int]]:
    """What may follow the tokens [N] that a row has been answered with so far."""

    def allowed(row: int, ids_N: Tensor) -> list[int]:
        node = tries[row]
        for token in ids_N.tolist():
            node = node[token]
        return list(node)

    return allowed


def _spelled(
    ids: list[int], choice: list[list[int]], names: Sequence[str], encoder: PromptEncoder
) -> str:
    """The text before the terminator (behind it stands padding), or the title it stands for."""
    own = list(takewhile(lambda token: token != encoder.terminator, ids))
    meant = {name for name, answer in zip(names, choice, strict=True) if answer == own}
    if len(meant) == 1:
        return meant.pop()
    return str(encoder.tokenizer.decode(own, skip_special_tokens=True))


def _left_padded(prompts: list[Tokens], fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, items and attention mask, each [B, T], prompts flush right."""

    def padded(lists: list[list[int]], value: int) -> Tensor:
        rows = [torch.tensor(tokens) for tokens in lists]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    ids_BT = padded([prompt.ids for prompt in prompts], fill)
    item_BT = padded([prompt.items for prompt in prompts], NO_ITEM)
    return ids_BT, item_BT, padded([[1] * len(prompt) for prompt in prompts], 0)
