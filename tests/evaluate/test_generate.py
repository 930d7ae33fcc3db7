"""Greedy answers equal the plainest decoding there is, alone or in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.small_models import make_model
from small_data import TITLES, small_data

from rsllm.config import LossConfig, PromptConfig, Representation
from rsllm.data.sequences import Rows
from rsllm.evaluate.generate import greedy_answers
from rsllm.evaluate.rank import decision
from rsllm.model.backbone import load_backbone, load_tokenizer
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.encode import NO_ITEM, PromptEncoder, Tokens

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return small_data(tmp_path_factory.mktemp("data") / "small").rows("test")


World = tuple[LanguageObjective, PromptEncoder]


@pytest.fixture(params=["tiny_llm", "random_llm"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def make_world(folder: Path, representation: Representation) -> World:
    model = make_model(load_backbone(folder, torch.float32).eval())
    assert model.slots is not None
    model.slots.items_IE = torch.randn(len(TITLES), model.slots.items_IE.shape[1])
    encoder = PromptEncoder(load_tokenizer(folder), TITLES, PromptConfig(), representation, "movie")
    return LanguageObjective(model, LossConfig()), encoder


def answers(world: World, rows: Rows, batch_size: int, limit: int = NEW_TOKENS) -> list[str]:
    objective, encoder = world
    return greedy_answers(objective, rows, encoder, max_new_tokens=limit, batch_size=batch_size)


def prompts(world: World, rows: Rows) -> list[Tokens]:
    decisions = [decision(rows, i) for i in range(len(rows))]
    return [world[1].prompt(d.history, d.candidates, d.template).tokens for d in decisions]


@torch.no_grad()
def greedy_by_hand(world: World, prompt: Tokens) -> list[int]:
    """The likeliest token, NEW_TOKENS times: the whole sequence anew each time, no padding."""
    objective, _ = world
    ids, items = list(prompt.ids), list(prompt.items)
    for _ in range(NEW_TOKENS):
        vectors = objective.model.embed(torch.tensor([ids]), torch.tensor([items]))
        ids.append(int(objective.model.llm(inputs_embeds=vectors).logits[0, -1].argmax()))
        items.append(NO_ITEM)
    return ids[len(prompt) :]


def up_to(token: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(token)] if token in ids else ids


@pytest.mark.parametrize("representation", ["text", "unified"])
def test_greedy_is_the_likeliest_token_each_time(
    folder: Path, rows: Rows, representation: Representation
) -> None:
    world = make_world(folder, representation)
    _, encoder = world
    by_hand = [
        up_to(encoder.terminator, greedy_by_hand(world, prompt)) for prompt in prompts(world, rows)
    ]
    expected = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in by_hand]
    assert any(expected)
    assert len({len(prompt) for prompt in prompts(world, rows)}) > 1, "so that some are padded"
    for batch_size in (1, 4, 6):
        assert answers(world, rows, batch_size) == expected


def test_greedy_equals_plain_generate(folder: Path, rows: Rows) -> None:
    world = make_world(folder, "text")
    objective, encoder = world
    found = answers(world, rows, batch_size=6)
    for prompt, answer in zip(prompts(world, rows), found, strict=True):
        ids = torch.tensor([prompt.ids])
        output = objective.model.llm.generate(
            ids, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=encoder.terminator
        )
        new = up_to(encoder.terminator, output[0, ids.shape[1] :].tolist())
        assert answer == encoder.tokenizer.decode(new, skip_special_tokens=True)


def test_an_answer_ends_before_the_terminator(folder: Path, rows: Rows) -> None:
    """Here a token that the model does write, sooner in one row than in another."""
    world = make_world(folder, "text")
    _, encoder = world
    by_hand = [greedy_by_hand(world, prompt) for prompt in prompts(world, rows)]
    encoder.terminator = by_hand[0][3]
    cut = [up_to(encoder.terminator, ids) for ids in by_hand]
    assert len(cut[0]) <= 3
    expected = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]
    assert answers(world, rows, batch_size=6) == expected


def test_a_limit_and_progress(random_llm: Path, rows: Rows) -> None:
    world = make_world(random_llm, "text")
    objective, encoder = world
    (prompt, *_), done = prompts(world, rows), []
    found = greedy_answers(
        objective, rows, encoder, max_new_tokens=2, batch_size=4, progress=done.append
    )
    expected = encoder.tokenizer.decode(greedy_by_hand(world, prompt)[:2], skip_special_tokens=True)
    assert found[0] == expected
    assert done == [4, 6]
