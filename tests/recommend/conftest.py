"""Fixtures of lists: a store with models, each opened once."""

from __future__ import annotations

from pathlib import Path

import pytest
from recommend.small_store import make_store

from rsllm.recommend.load import open_ranker
from rsllm.recommend.ranker import Ranker
from rsllm.store.artifacts import Store


@pytest.fixture(scope="session")
def made(
    random_llm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, dict[str, str]]:
    """A store, and the names of its recommender, history and choice model."""
    return make_store(tmp_path_factory.mktemp("store"), random_llm)


@pytest.fixture(scope="session")
def history_model(made: tuple[Store, dict[str, str]]) -> Ranker:
    """A tuned model with a catalogue scorer, nothing chosen yet."""
    store, names = made
    return open_ranker(names["history"], store.location, "fp32")[0]


@pytest.fixture(scope="session")
def choice_model(made: tuple[Store, dict[str, str]]) -> Ranker:
    """A tuned model of choice prompts, which ranks by the pointer."""
    store, names = made
    return open_ranker(names["choice"], store.location, "fp32")[0]
