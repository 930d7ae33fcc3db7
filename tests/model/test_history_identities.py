"""Where a history prompt must be exactly the prompts that end at its items."""

# Axes: B prompts, T tokens, M items of a prompt, D language-model width, K key width.
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import (
    CATALOGUE,
    TITLE_KEYS,
    TITLES,
    make_encoder,
    make_histories,
    make_history_batch,
    make_history_objective,
)

from rsllm.config import CatalogueConfig, LossConfig, Representation
from rsllm.model.backbone import load_tokenizer
from rsllm.model.catalogue import ItemKeys, decayed
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Row, collate

LOSS = LossConfig(alpha=0.3, beta=0.4)


def prefixes(row: Row) -> list[Row]:
    """The histories that end at each of a row's items, with what came next."""
    following = [*row.history[1:], row.target]
    return [
        replace(row, history=row.history[: place + 1], target=item)
        for place, item in enumerate(following)
    ]


@torch.no_grad()
@pytest.mark.parametrize("representation", ["text", "unified", "behavioural"])
def test_each_state_is_the_last_one_of_the_prompt_that_ends_there(
    backbone_folder: Path, representation: Representation
) -> None:
    """Of every token of the prompt, so of its items' ends and of the means over them."""
    objective = make_history_objective(backbone_folder, LOSS, slots=representation != "text").eval()
    encoder = make_encoder(load_tokenizer(backbone_folder), representation, "history")
    rows = make_histories(3)
    whole = make_history_batch(rows, encoder)
    states_BTD = objective.model.history_states(whole)
    for number, row in enumerate(rows):
        for place, prefix in enumerate(prefixes(row)):
            part = make_history_batch([prefix], encoder)
            states_TD = objective.model.history_states(part)[0]
            end = int(whole.end_BM[number, place])
            assert len(states_TD) == end + 1
            torch.testing.assert_close(
                states_BTD[number, : end + 1], states_TD, atol=2e-4, rtol=1e-4
            )
    assert (states_BTD[0, 3] - states_BTD[1, 3]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("user_state", ["last", "mean"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_a_score_is_the_logit_that_the_loss_used(
    random_llm: Path, user_state: str, shortcut: bool
) -> None:
    settings = {"user_state": user_state, "shortcut": shortcut}
    objective = make_history_objective(random_llm, LOSS, tables=2, **settings).eval()
    encoder = make_encoder(load_tokenizer(random_llm), "unified", "history")
    rows = make_histories(4, seed=2, tables=2)
    batch = make_history_batch(rows, encoder)
    keys, keys_XK = objective.head.keys, objective.head.keys()
    users_BMK = objective._users(objective._states(batch), batch, keys_XK)
    losses = []
    for number, row in enumerate(rows):
        asked = prefixes(row)
        scores_BI = objective.score(make_history_batch(asked, encoder), objective.head.keys())
        for place, prefix in enumerate(asked):
            own_1K, table_1 = users_BMK[number, place][None], torch.tensor([row.table])
            logits_1I = keys.scores(own_1K, table_1, keys_XK, torch.arange(len(TITLES)))
            torch.testing.assert_close(scores_BI[place][None], logits_1I, atol=2e-3, rtol=1e-4)
            assert scores_BI[place].std() > 0.1
            known = {TITLES[item] for item in (*prefix.history, prefix.target)}
            others = [
                score for score, t in zip(scores_BI[place], TITLES, strict=True) if t not in known
            ]
            own = scores_BI[place][prefix.target]
            losses.append(torch.stack([own, *others]).logsumexp(0) - own)
    _, parts = objective(batch)
    torch.testing.assert_close(
        parts["loss/user_contrast"], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_the_language_model_loss_trains_what_ranks_titles_by_likelihood(random_llm: Path) -> None:
    """The candidates of a history prompt are branches where its next item would stand."""
    objective = make_history_objective(random_llm, LossConfig(alpha=0.0, beta=0.0)).eval()
    encoder = make_encoder(load_tokenizer(random_llm), "unified", "history")
    rows, found, count = make_histories(3), 0.0, 0
    ranker = LanguageObjective(objective.model, LossConfig())
    for row in rows:
        for prefix in prefixes(row)[:-1]:
            other = next(i for i in range(len(TITLES)) if TITLES[i] != TITLES[prefix.target])
            asked = replace(prefix, candidates=[other, prefix.target])
            batch = collate([asked], encoder, TITLE_KEYS, all_branches=True)
            found -= float(ranker.score(batch, "likelihood")[0, 1])
            count += len(encoder.title_ids[prefix.target]) + 1
    _, parts = objective(make_history_batch(rows, encoder))
    assert found / count == pytest.approx(float(parts["loss/next_item"]), rel=1e-4)


@torch.no_grad()
def test_padding_and_company_change_nothing(random_llm: Path) -> None:
    objective = make_history_objective(random_llm, LOSS, user_state="mean").eval()
    encoder = make_encoder(load_tokenizer(random_llm), "llara", "history")
    rows = make_histories(5, seed=4)
    together = objective.score(make_history_batch(rows, encoder), objective.head.keys())
    for row, scores_I in zip(rows, together, strict=True):
        alone = objective.score(make_history_batch([row], encoder), objective.head.keys())[0]
        torch.testing.assert_close(scores_I, alone, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_at_the_start_it_is_the_rule_that_the_shortcut_says(random_llm: Path) -> None:
    """Fresh keys: the decayed mean of cosines of items' vectors and of titles'."""
    items_IE, titles_IF = torch.randn(len(TITLES), 5), torch.randn(len(TITLES), 4)
    keys = ItemKeys(items_IE, titles_IF, CATALOGUE, CatalogueConfig(recency=0.5, temperature=0.2))
    row = Row([3, 8, 1], (), 2, 0)
    encoder = make_encoder(load_tokenizer(random_llm), "text", "history")
    asked = make_history_batch([row], encoder).asked
    scores_I = keys.last_scores(keys.shortcut(asked, keys()), keys(), asked)[0].numpy()

    tables = (items_IE.numpy(), titles_IF.numpy())
    both = [table / np.linalg.norm(table, axis=1, keepdims=True) for table in tables]
    cosine_II = sum(table @ table.T for table in both) / 2
    expected_I = cosine_II[1] + 0.5 * cosine_II[8] + 0.25 * cosine_II[3]
    ratio_I = scores_I / expected_I
    np.testing.assert_allclose(ratio_I, ratio_I[0], rtol=1e-4)
    assert ratio_I[0] > 0
    np.testing.assert_allclose(keys().norm(dim=1), 1.0, rtol=1e-6)
    assert decayed(3, 0.5).tolist() == [[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]


@torch.no_grad()
def test_bf16_weights_compute_nearly_the_same(random_llm: Path) -> None:
    """As an engine in bf16 has them, buffers and all; losses and scores stay in fp32."""
    exact = make_history_objective(random_llm, LOSS, user_state="mean").eval()
    half = make_history_objective(random_llm, LOSS, user_state="mean").eval().bfloat16()
    encoder = make_encoder(load_tokenizer(random_llm), "unified", "history")
    batch = make_history_batch(make_histories(4), encoder)
    for name, part in exact(batch)[1].items():
        found = half(batch)[1][name]
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(part), rel=0.1, abs=0.15), name
    scores_BI, expected_BI = (m.score(batch, m.head.keys()) for m in (half, exact))
    assert scores_BI.dtype == torch.float32
    assert (scores_BI - expected_BI).abs().max() < 0.1 * expected_BI.std() + 0.5


@torch.no_grad()
def test_contrasts_under_autocast_are_those_of_its_states_in_fp32(random_llm: Path) -> None:
    objective = make_history_objective(random_llm, LOSS).eval()
    encoder = make_encoder(load_tokenizer(random_llm), "unified", "history")
    batch = make_history_batch(make_histories(4), encoder)
    exact_BTD = objective._states(batch)
    objective.autocast = True
    states_BTD = objective._states(batch)
    assert (states_BTD - exact_BTD).abs().max() > 1e-3, "the model runs in bf16"
    keys_XK = objective.head.keys()
    users_BMK = objective._users(states_BTD.float(), batch, keys_XK)
    expected = objective.head.keys.contrast(users_BMK, batch.asked.next_BM, keys_XK, batch.asked)
    assert torch.equal(objective(batch)[1]["loss/user_contrast"], expected.loss)
