"""One pass over parallel branches equals a plain forward per candidate."""

# Axes: B rows, T tokens, C branches, K candidates, D language-model width.
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_models import make_batch, make_encoder, make_model, make_rows, save_gpt2, save_mistral
from torch import Tensor

from rsllm.config import LossConfig, Representation
from rsllm.model.backbone import load_backbone, load_tokenizer
from rsllm.model.branches import branch_mask, pointer_scores
from rsllm.model.hybrid import HybridLM
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import PADDING, Batch, Row
from rsllm.prompts.encode import MARKER, NO_ITEM, PromptEncoder

REPRESENTATIONS: tuple[Representation, ...] = get_args(Representation)


def likelihood(model: HybridLM, batch: Batch) -> Tensor:
    return LanguageObjective(model, LossConfig()).score(batch, "likelihood")


def plain_score(model: HybridLM, encoder: PromptEncoder, row: Row, candidate: int) -> float:
    """Log-probability of the answer after the prompt: one sequence, no mask."""
    prompt = encoder.prompt(row.history, row.candidates, row.template).tokens
    answer = [*encoder.title_ids[candidate], encoder.terminator]
    if encoder.config.answer == "letter":
        answer = encoder.answers(row.candidates)[row.candidates.index(candidate)]
    items = prompt.items + [NO_ITEM] * len(answer)
    vectors_TD = by_hand(model, prompt.ids + answer, items)
    logits_TV = model.llm(inputs_embeds=vectors_TD[None]).logits[0].double()
    logp_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    return float(sum(logp_TV[t, token] for t, token in enumerate(answer)))


def by_hand(model: HybridLM, ids: list[int], items: list[int]) -> Tensor:
    """The vector of each token, slot and marker, one after the other. [T, D]."""
    table_VD, slots = model.llm.get_input_embeddings().weight, model.slots
    assert slots is not None
    vectors = []
    for token, item in zip(ids, items, strict=True):
        if item == NO_ITEM:
            vectors.append(table_VD[token])
        elif item == MARKER:
            vectors.append(slots.marker_D)
        else:
            vectors.append(slots.projector(slots.items_IE[item]))
    return torch.stack(vectors)


def world(
    folder: Path, representation: Representation, **prompt: Any
) -> tuple[HybridLM, PromptEncoder]:
    model = make_model(load_backbone(folder, torch.float32).eval())
    return model, make_encoder(load_tokenizer(folder), representation, **prompt)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@torch.no_grad()
def test_one_pass_equals_separate_forwards(
    backbone_folder: Path, representation: Representation, attention: str
) -> None:
    model, encoder = world(backbone_folder, representation)
    model.llm.set_attn_implementation(attention)
    rows = make_rows(3)
    batch = make_batch(encoder, rows)
    assert (batch.branch_BT == PADDING).any(), "rows of different lengths"
    expected_BC = torch.tensor(
        [[plain_score(model, encoder, row, item) for item in row.candidates] for row in rows]
    )
    torch.testing.assert_close(likelihood(model, batch), expected_BC, atol=1e-4, rtol=0)

    blind = replace(batch, branch_BT=batch.branch_BT.clamp(max=0))
    assert (likelihood(model, blind) - expected_BC).abs().max() > 1e-3, "branches would interfere"


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@torch.no_grad()
def test_all_letters_are_read_at_the_end_of_the_prompt(
    backbone_folder: Path, representation: Representation
) -> None:
    model, encoder = world(backbone_folder, representation, answer="letter")
    rows = make_rows(3)
    batch = make_batch(encoder, rows)
    prompts = [encoder.prompt(row.history, row.candidates, row.template) for row in rows]
    assert batch.ids_BT.shape[1] == max(len(prompt.tokens) for prompt in prompts)
    assert batch.state_U.tolist() == batch.last_B.tolist()
    expected_BC = torch.tensor(
        [[plain_score(model, encoder, row, item) for item in row.candidates] for row in rows]
    )
    torch.testing.assert_close(likelihood(model, batch), expected_BC, atol=1e-4, rtol=0)
    assert (expected_BC[:, :1] - expected_BC[:, 1:]).abs().min() > 1e-4, "letters differ"

    alone = make_batch(encoder, rows, all_branches=False)
    expected_B1 = expected_BC.gather(1, batch.target_B[:, None])
    torch.testing.assert_close(likelihood(model, alone), expected_B1, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_window_as_long_as_one_branch_is_long_enough(random_llm: Path, tmp_path: Path) -> None:
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    rows = make_rows(3, num_candidates=8)
    batch = make_batch(encoder, rows)
    window = int(batch.position_BT.max()) + 1
    assert window < batch.ids_BT.shape[1]
    llm = load_backbone(save_mistral(tmp_path, random_llm, window), torch.float32)
    model = make_model(llm.eval())
    expected_BC = torch.tensor(
        [[plain_score(model, encoder, row, item) for item in row.candidates] for row in rows]
    )
    torch.testing.assert_close(likelihood(model, batch), expected_BC, atol=1e-4, rtol=0)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@torch.no_grad()
def test_the_target_alone_scores_as_among_all(
    backbone_folder: Path, representation: Representation
) -> None:
    model, encoder = world(backbone_folder, representation)
    rows = make_rows(4, seed=1)
    batch = make_batch(encoder, rows)
    alone = make_batch(encoder, rows, all_branches=False)
    expected_B1 = likelihood(model, batch).gather(1, batch.target_B[:, None])
    torch.testing.assert_close(likelihood(model, alone), expected_B1, atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(random_llm: Path) -> None:
    model, encoder = world(random_llm, "unified")
    rows = make_rows(5, seed=2)
    together = likelihood(model, make_batch(encoder, rows))
    alone = torch.cat([likelihood(model, make_batch(encoder, [row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_positions_end_where_the_longest_answer_ends(random_llm: Path, tmp_path: Path) -> None:
    """Branches are parallel, so the context needs room for one, however many there are."""
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    rows = make_rows(3, num_candidates=8)
    longest = max(
        len(encoder.prompt(row.history, row.candidates, row.template).tokens)
        + max(len(encoder.title_ids[item]) for item in row.candidates)
        for row in rows
    )
    model = make_model(load_backbone(save_gpt2(tmp_path, random_llm, longest), torch.float32))
    assert likelihood(model, make_batch(encoder, rows)).isfinite().all()


def test_mask_equals_its_definition(random_llm: Path) -> None:
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    branch_BT = make_batch(encoder, make_rows(2)).branch_BT
    mask_BTT = branch_mask(branch_BT)[:, 0]
    for branch, mask in zip(branch_BT.tolist(), mask_BTT.tolist(), strict=True):
        for query, own in enumerate(branch):
            expected = [
                k <= query and key in (0, own) and key != -1 for k, key in enumerate(branch)
            ]
            assert mask[query] == expected
            assert any(mask[query])


@torch.no_grad()
def test_pointer_equals_the_naive_loop(random_llm: Path) -> None:
    model, encoder = world(random_llm, "unified")
    rows = make_rows(3)
    batch = make_batch(encoder, rows, all_branches=False)
    scores_BK = pointer_scores(model.states(batch), batch)
    for row, scores in zip(rows, scores_BK, strict=True):
        assert scores.tolist() == pytest.approx(naive_pointer(model, encoder, row), abs=1e-5)


def naive_pointer(model: HybridLM, encoder: PromptEncoder, row: Row) -> list[float]:
    tokens = encoder.prompt(row.history, row.candidates, row.template).tokens
    decoder: Any = model.llm.get_decoder()
    vectors_TD = by_hand(model, tokens.ids, tokens.items)
    states_TD = decoder(inputs_embeds=vectors_TD[None]).last_hidden_state[0].double()
    slots = [at for at, item in enumerate(tokens.items) if item >= 0][len(row.history) :]
    width = states_TD.shape[1]
    unit_TD = states_TD / (states_TD.norm(dim=1, keepdim=True) / width**0.5)
    return [float(unit_TD[-1] @ unit_TD[at]) / width**0.5 for at in slots]
