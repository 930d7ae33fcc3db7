"""Can a backbone rank all candidates in one pass? Each is asked when it is loaded.

Axes: B rows, C candidates, T tokens, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsllm.errors import ConfigError
from rsllm.model.branches import branch_scores
from rsllm.model.hybrid import HybridLM
from rsllm.prompts.collate import Row, collate
from rsllm.prompts.encode import PromptEncoder

CHECK_TITLES = ("Heat", "The Long Way Home")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}
"""Largest difference, relative or absolute, between one-pass and plain candidate scores."""


def ranks_in_one_pass(llm: Any, encoder: PromptEncoder, backbone: str | Path) -> bool:
    """Whether one pass scores candidates as plain forwards do; warns where it does not.

    ALiBi counts tokens instead of positions, a sliding window gives way to the branches' mask, and
    recurrent layers take no mask: such backbones pass over every candidate separately.

    Raises:
        ConfigError: not even separate passes do: what the output head says is not the whole of a
            logit (it is scaled or capped), so ranking and generation would disagree; or it looks
            ahead, so that the answer would be seen.
    """
    window = getattr(llm.config, "sliding_window", None)
    row = Row(history=[1], candidates=[0, 1], target=0, user=0)
    if _looks_ahead(llm, encoder.prompt(row.history, row.candidates, 0).tokens.ids):
        raise ConfigError(
            f"backbone {backbone}: its attention is not causal, so the answer would be seen; choose"
            " a causal language model"
        )
    separate = [replace(row, target=item) for item in row.candidates]
    if reason := _misfit(llm, encoder, row, separate, all_branches=False):
        raise ConfigError(
            f"backbone {backbone}: its output head alone does not give its token probabilities"
            f" ({reason}); use a model without logit scaling, such as a Llama- or Qwen-like one"
        )
    if window and window < encoder.max_tokens + encoder.config.max_title_tokens:
        reason = f"its window is {window} tokens, prompt.max_tokens {encoder.max_tokens}"
    else:
        reason = _misfit(llm, encoder, row, [row], all_branches=True)
    if reason:
        warnings.warn(
            f"backbone {backbone} cannot rank candidates in one pass ({reason}); every candidate"
            " takes a pass of its own, which is much slower",
            stacklevel=3,
        )
    return not reason


@torch.no_grad()
def _looks_ahead(llm: Any, ids: list[int]) -> bool:
    """Whether what is said of a token changes when the last one becomes another."""
    # As many tokens both times, since with their number bf16 rounds sums otherwise.
    other = [*ids[:-1], (ids[-1] + 1) % llm.config.vocab_size]
    said_TV, again_TV = (llm(torch.tensor([own])).logits[0, :-1].float() for own in (ids, other))
    tolerance = TOLERANCE[llm.dtype]
    return not torch.allclose(said_TV, again_TV, rtol=tolerance, atol=tolerance)


def _misfit(
    llm: Any, encoder: PromptEncoder, row: Row, rows: Sequence[Row], *, all_branches: bool
) -> str:
    """How the scores of `row`'s candidates, laid out as `rows`, differ from a plain forward's."""
    tolerance = TOLERANCE[llm.dtype]
    model, keys_I = HybridLM(llm, slots=None), np.arange(len(CHECK_TITLES))
    try:
        batch = collate(rows, encoder, keys_I, all_branches=all_branches)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            scores_BC = branch_scores(model.label_log_probs(model.states(batch), batch), batch)
            plain_C = _scores(llm, encoder, row)
        fits = torch.allclose(scores_BC.flatten(), plain_C, rtol=tolerance, atol=tolerance)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "" if fits else "the scores differ from a plain forward's"


def _scores(llm: Any, encoder: PromptEncoder, row: Row) -> Tensor:
    """One plain sequence per candidate, without mask and position ids. [C]."""
    prompt = encoder.prompt(row.history, row.candidates, row.template).tokens.ids
    scores = []
    for own in encoder.answers(row.candidates):
        answer = own + encoder.ending
        logits_TV = llm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        scores.append(logits_TV.log_softmax(-1)[range(len(answer)), answer].sum())
    return torch.stack(scores)
