"""Title vectors against a plain forward pass of one title at a time."""

# Axes: I items, T tokens, D language-model width.
from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
import torch
from small_models import TITLES

from rsllm.config import Experiment, PromptConfig
from rsllm.model import title_vectors as titles
from rsllm.model.title_vectors import title_vectors

MANY = [f"{title} {number}" for number in range(7) for title in sorted(set(TITLES))]


@torch.inference_mode()
def one_by_one(backbone: Path, some: list[str], limit: int) -> torch.Tensor:
    """The mean over a title's tokens, behind what opens a text, of what the final norm puts out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    llm = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    plain = tokenizer("a", add_special_tokens=False).input_ids
    opening = tokenizer("a").input_ids[: -len(plain)] or tokenizer("\n").input_ids[-1:]
    lead = "" if tokenizer.tokenize("a")[0].startswith("\u2581") else " "
    vectors = []
    for title in some:
        ids = tokenizer(lead + title, add_special_tokens=False, split_special_tokens=True).input_ids
        output = llm(torch.tensor([opening + ids[:limit]]), output_hidden_states=True)
        vectors.append(output.hidden_states[-1][0, len(opening) :].mean(dim=0))
    return torch.stack(vectors)


@pytest.fixture(scope="module")
def vectors_ID(random_llm: Path) -> torch.Tensor:
    assert len(MANY) > titles.TITLES_AT_ONCE, "more than one chunk"
    return title_vectors(random_llm, MANY, PromptConfig(), 0)


def test_vectors_equal_a_plain_forward_pass(random_llm: Path, vectors_ID: torch.Tensor) -> None:
    expected_ID = one_by_one(random_llm, MANY, PromptConfig().max_title_tokens)
    assert vectors_ID.dtype == torch.float32
    assert torch.pdist(expected_ID).min() > 1e-3
    torch.testing.assert_close(vectors_ID, expected_ID, atol=1e-5, rtol=1e-5)


def test_a_title_of_one_token_is_told_from_others(tiny_llm: Path) -> None:
    """As the first token of a text, it would be hardly more than where attention goes to rest."""
    vectors_ID = title_vectors(tiny_llm, ["the", "in", "said", "was", "it"], PromptConfig(), 0)
    expected_ID = one_by_one(tiny_llm, ["the", "in", "said", "was", "it"], 9)
    torch.testing.assert_close(vectors_ID, expected_ID, atol=1e-4, rtol=1e-4)


def test_long_titles_are_cut(random_llm: Path) -> None:
    cut_ID = title_vectors(random_llm, TITLES, PromptConfig(max_title_tokens=3), 0)
    expected_ID = one_by_one(random_llm, list(TITLES), 3)
    torch.testing.assert_close(cut_ID, expected_ID, atol=1e-5, rtol=1e-5)


def test_order_and_chunks_do_not_matter(
    random_llm: Path, vectors_ID: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(titles, "TITLES_AT_ONCE", 7)
    reversed_ID = title_vectors(random_llm, MANY[::-1], PromptConfig(), 0)
    torch.testing.assert_close(reversed_ID.flip(0), vectors_ID, atol=1e-5, rtol=1e-5)


def test_the_probe_of_titles_reads_the_same_states(
    random_llm: Path, vectors_ID: torch.Tensor
) -> None:
    probe = runpy.run_path(str(jobs.ROOT / "experiments" / "probe_titles.py"))
    data, last = SimpleNamespace(titles=MANY), [-1]
    (states_ID,) = probe["states"](str(random_llm), data, Experiment(), last)
    torch.testing.assert_close(states_ID, vectors_ID, atol=1e-5, rtol=1e-5)
    white_IW = probe["whitened"](states_ID, 4).double()
    torch.testing.assert_close(white_IW.T @ white_IW, torch.eye(4).double(), atol=1e-4, rtol=0)
    assert white_IW.mean(0).abs().max() < 1e-5
