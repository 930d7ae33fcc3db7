"""Batches, token by token: labels, positions, branches, spans and targets."""

from __future__ import annotations

from dataclasses import fields, replace
from string import ascii_uppercase
from typing import Any, get_args

import numpy as np
import pytest
import torch

from rsllm.config import PromptConfig, Representation
from rsllm.prompts.collate import PADDING, PROMPT, Batch, Row, answer_tokens, collate
from rsllm.prompts.encode import PromptEncoder

TITLES = ("Heat", "Heat 2", "The Last Voyage (1996)", "</s>", "Heat", "Winter", "<|im_end|>")
TITLE_KEYS = np.array([0, 1, 2, 3, 0, 4, 5])
ROWS = [
    Row(history=[0, 2, 5], candidates=[1, 6, 4, 3], target=6, user=7),
    Row(history=[3], candidates=[5, 2, 1, 0], target=5, user=8, template=1),
    Row(history=[1, 4, 6, 3, 5], candidates=[0, 1, 3, 6], target=6, user=7, template=2),
]


@pytest.fixture(params=[(r, a) for r in get_args(Representation) for a in ("title", "letter")])
def encoder(request: pytest.FixtureRequest, tokenizer: Any) -> PromptEncoder:
    representation, answer = request.param
    config = PromptConfig(answer=answer)
    return PromptEncoder(tokenizer, TITLES, config, representation, "movie")


@pytest.fixture(params=[True, False], ids=["all", "target"])
def all_branches(request: pytest.FixtureRequest) -> Any:
    return request.param


def branches(row: Row, all_branches: bool) -> list[int]:
    return list(row.candidates) if all_branches else [row.target]


def labels(batch: Batch, row: int, branch: int) -> list[int]:
    return batch.label_N[batch.label_branch_N == row * batch.num_branches + branch].tolist()


def titles(encoder: PromptEncoder, row: Row, all_branches: bool) -> list[list[int]]:
    """What stands in each branch: a title, or nothing where letters answer."""
    letters = encoder.config.answer == "letter"
    return [[] if letters else encoder.title_ids[item] for item in branches(row, all_branches)]


def test_labels_are_titles_and_terminator_or_letters(
    encoder: PromptEncoder, all_branches: bool
) -> None:
    batch = collate(ROWS, encoder, TITLE_KEYS, all_branches=all_branches)
    for number, row in enumerate(ROWS):
        for branch, item in enumerate(branches(row, all_branches)):
            found = labels(batch, number, branch)
            if encoder.config.answer == "letter":
                place = row.candidates.index(item)
                assert [encoder.tokenizer.decode(found)] == [ascii_uppercase[place]]
                assert len(found) == 1
            else:
                assert found == [*encoder.title_ids[item], encoder.terminator]
        target = int(batch.target_B[number])
        own = titles(encoder, row, all_branches)[target]
        assert branches(row, all_branches)[target] == row.target
        assert batch.ids_BT[number][batch.answer_BT[number]].tolist() == own


def test_each_label_is_read_where_its_past_ends(encoder: PromptEncoder, all_branches: bool) -> None:
    """The input at a label's state is the answer's previous token, or the prompt's last."""
    batch = collate(ROWS, encoder, TITLE_KEYS, all_branches=all_branches)
    width = batch.ids_BT.shape[1]
    states = batch.state_U[batch.label_state_N]
    assert len(set(batch.state_U.tolist())) == len(batch.state_U), "no logits twice"
    assert set(states.tolist()) == set(batch.state_U.tolist()), "no logits in vain"
    for number, row in enumerate(ROWS):
        for branch, title in enumerate(titles(encoder, row, all_branches)):
            own = batch.label_branch_N == number * batch.num_branches + branch
            first, *others = states[own].tolist()
            assert first == batch.last_B[number]
            assert batch.ids_BT.flatten()[others].tolist() == title
            assert set(batch.branch_BT.flatten()[others].tolist()) <= {branch + 1}
            assert {at // width for at in others} <= {number}


def test_layout_is_prompt_branches_padding(encoder: PromptEncoder, all_branches: bool) -> None:
    batch = collate(ROWS, encoder, TITLE_KEYS, all_branches=all_branches)
    width = batch.ids_BT.shape[1]
    assert batch.parallel == (all_branches and encoder.config.answer == "title")
    longest = 0
    for number, row in enumerate(ROWS):
        prompt = encoder.prompt(row.history, row.candidates, row.template)
        length = len(prompt.tokens)
        ids, branch, position = [*prompt.tokens.ids], [PROMPT] * length, list(range(length))
        for place, title in enumerate(titles(encoder, row, all_branches), 1):
            ids += title
            branch += [place] * len(title)
            position += range(length, length + len(title))
        longest = max(longest, *position)
        assert batch.ids_BT[number].tolist() == ids + [encoder.terminator] * (width - len(ids))
        assert batch.position_BT[number, : len(ids)].tolist() == position
        assert batch.branch_BT[number].tolist() == branch + [PADDING] * (width - len(ids))
        assert batch.item_BT[number, :length].tolist() == prompt.tokens.items
        assert not (batch.item_BT[number, length:] != -1).any()
        assert batch.history_BT[number].nonzero().flatten().tolist() == list(range(*prompt.history))
        assert batch.last_B[number] == number * width + length - 1
        assert (batch.choice_BK[number] - number * width).tolist() == prompt.choices
        assert row.candidates[int(batch.choice_target_B[number])] == row.target
    assert batch.position_BT.min() == 0
    assert batch.position_BT.max() == longest


def test_targets_stand_alone_and_once(encoder: PromptEncoder) -> None:
    batch = collate(ROWS, encoder, TITLE_KEYS, all_branches=False)
    assert len(batch.targets.ids_GL) == len({row.target for row in ROWS})
    for row, place in zip(ROWS, batch.target_item_B.tolist(), strict=True):
        mask, alone = batch.targets.mask_GL[place], encoder.item(row.target)
        assert batch.targets.ids_GL[place][mask].tolist() == alone.ids
        assert batch.targets.item_GL[place][mask].tolist() == alone.items


def test_titles_users_and_token_counts(encoder: PromptEncoder) -> None:
    batch = collate(ROWS, encoder, TITLE_KEYS, all_branches=False)
    assert batch.user_B.tolist() == [7, 8, 7]
    assert batch.title_B.tolist() == [5, 4, 5]
    assert batch.past_BH.tolist() == [[0, 2, 4, -1, -1], [3, -1, -1, -1, -1], [1, 0, 5, 3, 4]]
    assert batch.tokens_per_batch == len(batch.label_N) == answer_tokens([6, 5, 6], encoder)
    given = collate(ROWS, encoder, TITLE_KEYS, all_branches=False, tokens_per_batch=5.0)
    assert given.tokens_per_batch == 5.0


def test_moving_moves_every_tensor(encoder: PromptEncoder) -> None:
    batch = collate(ROWS, encoder, TITLE_KEYS, all_branches=False).to(torch.device("meta"))
    assert batch.ids_BT.is_meta
    assert batch.past_BH.is_meta
    assert batch.targets.mask_GL.is_meta
    assert batch.num_branches == 1


def test_a_row_of_another_table_differs_in_its_slots_alone(
    encoder: PromptEncoder, all_branches: bool
) -> None:
    tables = [0, 2, 1]
    moved = [replace(row, table=table) for row, table in zip(ROWS, tables, strict=True)]
    plain, other = (
        collate(r, encoder, TITLE_KEYS, all_branches=all_branches) for r in (ROWS, moved)
    )
    assert (other.slot_B - plain.slot_B).tolist() == [table * len(TITLES) for table in tables]
    for number, table in enumerate(tables):
        slots = plain.item_BT[number] >= 0
        expected_T = plain.item_BT[number] + slots * table * len(TITLES)
        assert torch.equal(other.item_BT[number], expected_T)
        assert bool(slots.any()) == encoder.slotted
    same = {f.name for f in fields(plain)} - {"item_BT", "targets", "target_item_B", "slot_B"}
    for name in same:
        a, b = getattr(plain, name), getattr(other, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_a_target_alone_takes_the_slot_of_its_rows_table(encoder: PromptEncoder) -> None:
    """Rows 0 and 2 have one target: two of them in different tables, one in the same."""
    for tables, distinct in (((1, 2, 0), 3), ((1, 2, 1), 2)):
        rows = [replace(row, table=table) for row, table in zip(ROWS, tables, strict=True)]
        batch = collate(rows, encoder, TITLE_KEYS, all_branches=False)
        assert len(batch.targets.ids_GL) == distinct
        for row, place in zip(rows, batch.target_item_B.tolist(), strict=True):
            mask = batch.targets.mask_GL[place]
            assert batch.targets.ids_GL[place][mask].tolist() == encoder.item(row.target).ids
            slots = [item for item in batch.targets.item_GL[place].tolist() if item >= 0]
            own = [row.target + row.table * len(TITLES)] if encoder.slotted else []
            assert slots == own
