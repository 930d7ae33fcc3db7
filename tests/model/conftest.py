"""Backbones of five kinds, each as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import save_gpt2, save_mistral, save_qwen2


@pytest.fixture(scope="session", params=["tiny_llm", "random_llm", "gpt2", "qwen2", "mistral"])
def backbone_folder(
    request: pytest.FixtureRequest, random_llm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trained and a random Llama, a random GPT-2, Qwen2 and Mistral."""
    saves = {"gpt2": save_gpt2, "qwen2": save_qwen2, "mistral": save_mistral}
    save = saves.get(request.param)
    if save is not None:
        return save(tmp_path_factory.mktemp(request.param), random_llm)
    folder: Path = request.getfixturevalue(request.param)
    return folder
