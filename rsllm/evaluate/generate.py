"""Greedy answers: free, among the candidates only, or among the titles of the catalogue.

Constrained decoding goes from token to token where some allowed answer goes (a trie, as in GENRE,
arXiv 2010.00904).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import takewhile
from sys import maxsize

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rsllm.config import Decoding
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Rows
from rsllm.errors import EvaluationError
from rsllm.evaluate.metrics import Floats, verdict
from rsllm.evaluate.rank import candidate_sets, decision
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Row
from rsllm.prompts.encode import NO_ITEM, PromptEncoder, Tokens
from rsllm.terminal import DELAY, Progress


@torch.inference_mode()
def greedy_answers(
    objective: LanguageObjective,
    rows: Rows,
    encoder: PromptEncoder,
    data: PreparedData,
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
        data: what the rows are of.
        decoding: "free", at most `max_new_tokens` (or one letter); "constrained", at every step the
            likeliest token that continues some candidate's answer, or ends one; "catalogue", the
            same with all titles that are not in the history.

    Raises:
        EvaluationError: constrained answers of a row without candidates.
    """
    from transformers import GenerationConfig

    objective.eval()
    device = next(objective.parameters()).device
    answers: list[str] = []
    starts = range(0, len(rows), batch_size)
    for start in Progress(starts, desc="answering", unit=" batches", delay=DELAY):
        chosen = [decision(rows, i) for i in range(start, min(start + batch_size, len(rows)))]
        options = [_options(row, data, decoding) for row in chosen]
        choices = [encoder.answers(items) for items in options]
        limit, allowed = max_new_tokens, None
        if decoding != "free":
            allowed = allowed_tokens(choices, encoder.terminator)
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
        for ids, items, choice in zip(new_BN.tolist(), options, choices, strict=True):
            names = [data.titles[item] for item in items]
            answers.append(_spelled(ids, choice, names, encoder))
    return answers


def written_scores(answers: Sequence[str], rows: Rows, titles: Sequence[str]) -> Floats:
    """1 for the candidate that an answer names by LLaRA's rule, 0 for all others. [R, C]."""
    named = []
    for answer, candidates in zip(answers, candidate_sets(rows).tolist(), strict=True):
        names = [titles[item] for item in candidates]
        named.append([verdict(answer, names, place).hit for place in range(len(names))])
    return np.array(named, dtype=np.float64)


def _options(row: Row, data: PreparedData, decoding: Decoding) -> Sequence[int]:
    """The items that a row's answer may name."""
    if decoding != "catalogue":
        return row.candidates
    items, keys_I = data.catalogue.representatives, data.catalogue.title_keys_I
    options: list[int] = items[~np.isin(keys_I[items], keys_I[list(row.history)])].tolist()
    return options


def allowed_tokens(
    choices: Sequence[Sequence[list[int]]], terminator: int
) -> Callable[[int, Tensor], list[int]]:
    """What may follow the tokens [N] that a row has been answered with so far.

    An answer is followed by the terminator, and that by itself. An answer may be the prefix of
    another: there the terminator is one way on among others.

    Args:
        choices: the answers that each row may have.
        terminator: in no answer.

    Raises:
        EvaluationError: a row without answers, so that nothing would be allowed.
    """
    if not all(choices):
        raise EvaluationError(
            "a row has no candidates, so constrained decoding allows no answer; score rows with"
            ' candidate sets, or set evaluation.decoding to ["free"]'
        )
    # In this order, answers that start alike stand together.
    ordered = [sorted([*ids, terminator] for ids in choice) for choice in choices]

    def allowed(row: int, ids_N: Tensor) -> list[int]:
        own, answers = ids_N.tolist(), ordered[row]
        if terminator in own:
            return [terminator]
        start, stop = (bisect_left(answers, [*own, *bound]) for bound in ([], [maxsize]))
        return list({ids[len(own)] for ids in answers[start:stop]})

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
