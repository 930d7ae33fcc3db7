"""Where rsllm must be exactly the plain language model."""

# Axes: B rows, T tokens, V vocabulary.
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    TITLES,
    make_batch,
    make_encoder,
    make_model,
    make_rows,
    make_trainable,
    save_gpt2,
    stir,
)
from torch import Tensor

from rsllm.config import BackboneConfig, LossConfig, ProjectorConfig
from rsllm.model.backbone import attach_lora, load_backbone, load_tokenizer
from rsllm.model.hybrid import HybridLM, ItemSlots, pool
from rsllm.model.losses import contrast, negatives
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import PROMPT, Batch, Row
from rsllm.prompts.encode import PromptEncoder

PLAIN = LossConfig(alpha=0.0, beta=0.0, gamma=0.0)


def sequences(batch: Batch) -> list[Tensor]:
    """The unpadded ids of each row of a single-branch batch."""
    lengths = (batch.branch_BT >= 0).sum(1).tolist()
    return [ids[:length] for ids, length in zip(batch.ids_BT, lengths, strict=True)]


@torch.no_grad()
def test_fresh_lora_leaves_logits_bit_identical(backbone_folder: Path) -> None:
    llm = load_backbone(backbone_folder, torch.float32).eval()
    batch = make_batch(make_encoder(load_tokenizer(backbone_folder), "text"), make_rows(2))
    before = [llm(ids[None]).logits for ids in sequences(batch)]
    adapted = attach_lora(llm, BackboneConfig(lora_rank=4))
    after = [adapted(ids[None]).logits for ids in sequences(batch)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    stir(adapted, 0.05)
    assert not torch.equal(adapted(sequences(batch)[0][None]).logits, before[0])


@torch.no_grad()
def test_a_merged_adapter_is_the_unmerged_one(backbone_folder: Path) -> None:
    adapted = attach_lora(load_backbone(backbone_folder, torch.float32), BackboneConfig()).eval()
    stir(adapted, 0.05)
    batch = make_batch(make_encoder(load_tokenizer(backbone_folder), "text"), make_rows(2))
    before = [adapted(ids[None]).logits for ids in sequences(batch)]
    merged = adapted.merge_and_unload()
    for ids, logits in zip(sequences(batch), before, strict=True):
        scale = float(logits.abs().max())
        torch.testing.assert_close(merged(ids[None]).logits, logits, atol=1e-5 * scale, rtol=1e-5)


@torch.no_grad()
def test_slots_with_their_stand_ins_vector_are_the_plain_model(backbone_folder: Path) -> None:
    llm = load_backbone(backbone_folder, torch.float64).eval()
    encoder = make_encoder(load_tokenizer(backbone_folder), "unified")
    batch = make_batch(encoder, make_rows(3), all_branches=False)
    model = HybridLM(llm, stand_ins(llm, encoder.terminator))
    states_BTD = model.states(batch)
    for states_TD, ids in zip(states_BTD, sequences(batch), strict=True):
        expected_TV = llm(ids[None]).logits[0]
        logits_TV = llm.get_output_embeddings()(states_TD[: len(ids)])
        torch.testing.assert_close(logits_TV, expected_TV, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(make_model(llm).states(batch), states_BTD, atol=1e-2)


def stand_ins(llm: Any, token: int) -> ItemSlots:
    """Slots that hold the embedding of `token`, whatever the item."""
    table_VD = llm.get_input_embeddings().weight
    slots = ItemSlots(torch.randn(len(TITLES), 4), table_VD, ProjectorConfig(depth=0))
    slots.projector.linear.weight.zero_()
    slots.projector.linear.bias.copy_(table_VD[token])
    slots.marker_D.copy_(table_VD[token])
    return slots


@pytest.fixture
def trainable(random_llm: Path) -> tuple[HybridLM, PromptEncoder, list[Row]]:
    encoder = make_encoder(load_tokenizer(random_llm), "text")
    return make_trainable(random_llm), encoder, make_rows(5)


@pytest.mark.parametrize("all_branches", [False, True])
def test_without_contrasts_it_is_the_cross_entropy_of_labels(
    trainable: tuple[HybridLM, PromptEncoder, list[Row]], all_branches: bool
) -> None:
    model, encoder, rows = trainable
    batch = make_batch(encoder, rows, all_branches=all_branches)
    loss, _ = LanguageObjective(model, PLAIN)(batch)
    expected = labelled_loss(model, encoder, rows)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    ours, theirs = gradients(loss, model), gradients(expected, model)
    assert max(float(gradient.abs().max()) for gradient in theirs) > 1e-3
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, atol=1e-6, rtol=1e-4)


def labelled_loss(model: HybridLM, encoder: PromptEncoder, rows: list[Row]) -> Tensor:
    """transformers' own loss: one right-padded batch, -100 outside the answers."""
    ids, labels = [], []
    for row in rows:
        prompt = encoder.prompt(row.history, row.candidates, row.template).tokens.ids
        answer = [*encoder.title_ids[row.target], encoder.terminator]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    labels_BT = pad(labels, batch_first=True, padding_value=-100)
    mask_BT = pad([torch.ones_like(row) for row in ids], batch_first=True)
    loss: Tensor = model.llm(
        pad(ids, batch_first=True), attention_mask=mask_BT, labels=labels_BT
    ).loss
    return loss


def gradients(loss: Tensor, model: HybridLM) -> list[Tensor]:
    lora = [p for p in model.llm.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, lora))


def test_without_weights_only_the_next_item_part_is_left(
    trainable: tuple[HybridLM, PromptEncoder, list[Row]],
) -> None:
    model, encoder, rows = trainable
    loss, parts = LanguageObjective(model, PLAIN)(make_batch(encoder, rows))
    assert set(parts) == {"loss", "loss/next_item"}
    assert torch.equal(loss.detach(), parts["loss/next_item"])


@pytest.mark.parametrize("scorer", ["likelihood", "pointer"])
def test_the_loss_is_the_weighted_sum_of_its_parts(random_llm: Path, scorer: Any) -> None:
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    config = LossConfig(alpha=0.2, beta=0.3, gamma=0.7, alignment=0.4, scorer=scorer)
    objective = LanguageObjective(make_trainable(random_llm), config)
    batch = make_batch(encoder, make_rows(6))
    loss, parts = objective(batch)
    expected = (
        0.5 * parts["loss/next_item"]
        + 0.2 * parts["loss/target_contrast"]
        + 0.3 * parts["loss/user_contrast"]
        + 0.4 * parts["loss/alignment_contrast"]
        + 0.7 * parts["loss/ranking"]
    )
    torch.testing.assert_close(loss.detach(), expected)
    logp_BK = objective.score(batch, scorer).log_softmax(-1)
    chosen_B = logp_BK[range(6), batch.choice_target_B]
    torch.testing.assert_close(parts["loss/ranking"], -chosen_B.mean())


def test_micro_batches_average_to_the_whole_batch(
    trainable: tuple[HybridLM, PromptEncoder, list[Row]],
) -> None:
    """Though one has two rows and the other three."""
    model, encoder, rows = trainable
    objective = LanguageObjective(model, PLAIN)
    whole = make_batch(encoder, rows)
    share = whole.tokens_per_batch / 2
    halves = [make_batch(encoder, part, tokens_per_batch=share) for part in (rows[:2], rows[2:])]
    losses = [objective(half)[0].item() for half in halves]
    assert sum(losses) / 2 == pytest.approx(objective(whole)[0].item(), abs=1e-6)


def test_both_passes_of_cached_gradients_drop_the_same(random_llm: Path, tmp_path: Path) -> None:
    """GPT-2 has dropout of its own."""
    model = make_trainable(save_gpt2(tmp_path, random_llm)).train()
    batch = make_batch(make_encoder(load_tokenizer(random_llm), "unified"), make_rows(6))
    objective = LanguageObjective(model, LossConfig(alpha=0.5, beta=0.4))
    found = []
    for seed, look_ahead in ((0, list), (0, objective.look_ahead), (1, list)):
        torch.manual_seed(seed)
        (own,) = look_ahead([batch])
        loss, _ = objective(own)
        found.append((float(loss), torch.cat([g.flatten() for g in gradients(loss, model)])))
    (plain, plain_gradient), (cached, cached_gradient), (other, _) = found
    assert cached == pytest.approx(plain, abs=1e-6)
    torch.testing.assert_close(cached_gradient, plain_gradient, atol=1e-6, rtol=1e-4)
    assert abs(other - plain) > 1e-3, "it does drop"


@torch.no_grad()
def test_the_user_vector_may_pool_the_whole_prompt_behind_its_first_token(random_llm: Path) -> None:
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    batch, model = make_batch(encoder, make_rows(6)), make_trainable(random_llm).eval()
    behind_first = (batch.branch_BT == PROMPT) & (torch.arange(batch.ids_BT.shape[1]) > 0)
    whole = replace(batch, history_BT=behind_first)
    choices: list[tuple[Any, Batch]] = [("history", batch), ("prompt", batch), ("history", whole)]
    losses = [
        LanguageObjective(model, LossConfig(alpha=0.0, beta=0.5, user_span=span))(own)[0]
        for span, own in choices
    ]
    assert torch.equal(losses[1], losses[2])
    assert not torch.allclose(losses[0], losses[1], atol=1e-4)


@torch.no_grad()
def test_contrasts_under_autocast_are_those_of_its_states_in_fp32(random_llm: Path) -> None:
    encoder = make_encoder(load_tokenizer(random_llm), "unified")
    batch, model = make_batch(encoder, make_rows(6)), make_trainable(random_llm).eval()
    objective = LanguageObjective(model, LossConfig(temperature=0.01), autocast=True)
    _, parts = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        states_BTD = model.states(batch)
        targets_BD = model.item_states(batch.targets)[batch.target_item_B]
    answers_BD = pool(states_BTD, batch.answer_BT)
    expected = contrast(targets_BD, answers_BD, negatives([batch])[0], 0.01).loss
    assert torch.equal(parts["loss/target_contrast"], expected)
