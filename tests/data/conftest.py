"""The real MovieLens-100K in both layouts, where its files are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsllm.assets.catalogue import cache_root


def _find(assets: Path | None, name: str) -> Path:
    for root in (assets, cache_root() / "movielens-100k"):
        for path in sorted(root.rglob(name)) if root else ():
            return path
    pytest.skip(f"no {name} under RSLLM_TEST_ASSETS or in the cache")


@pytest.fixture(scope="session")
def recbole(assets: Path | None) -> Path:
    """The folder of RecBole's files."""
    return _find(assets, "ml-100k.inter").parent


@pytest.fixture(scope="session")
def movielens_items(assets: Path | None) -> Path:
    """GroupLens' `u.item`."""
    return _find(assets, "u.item")


@pytest.fixture(scope="session")
def grouplens(
    recbole: Path, movielens_items: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """GroupLens' layout: `u.data` is RecBole's `.inter` without its header."""
    folder = tmp_path_factory.mktemp("grouplens")
    (folder / "u.item").write_bytes(movielens_items.read_bytes())
    _, interactions = (recbole / "ml-100k.inter").read_bytes().split(b"\n", maxsplit=1)
    (folder / "u.data").write_bytes(interactions)
    return folder
