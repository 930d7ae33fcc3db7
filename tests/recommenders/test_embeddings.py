from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsllm.errors import CheckpointError
from rsllm.recommenders.embeddings import ItemEmbeddings


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    embeddings = ItemEmbeddings(torch.randn(7, 5), source="0123456789abcdef")
    embeddings.save(tmp_path)
    loaded = ItemEmbeddings.load(tmp_path)
    assert torch.equal(loaded.table_IE, embeddings.table_IE)
    assert loaded.source == embeddings.source
    assert [path.name for path in tmp_path.iterdir()] == ["items.safetensors"]


def test_a_trainable_table_is_saved(tmp_path: Path) -> None:
    table_IE = torch.nn.Embedding(7, 5).weight
    ItemEmbeddings(table_IE, source="a").save(tmp_path)
    loaded = ItemEmbeddings.load(tmp_path)
    assert torch.equal(loaded.table_IE, table_IE)
    assert not loaded.table_IE.requires_grad


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.randn(7), "shape"),
        (torch.randn(0, 5), "shape"),
        (torch.randn(7, 5).double(), "float64"),
        (torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 0.0]]), "2 of 3 items"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, table: torch.Tensor, message: str) -> None:
    save_file({"table": table}, tmp_path / "items.safetensors", metadata={"source": "a"})
    with pytest.raises(CheckpointError, match=message):
        ItemEmbeddings.load(tmp_path)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.safetensors"
    with pytest.raises(CheckpointError, match="fit the recommender again"):
        ItemEmbeddings.load(tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="fit the recommender again"):
        ItemEmbeddings.load(tmp_path)
    save_file({"other": torch.randn(7, 5)}, path, metadata={"source": "a"})
    with pytest.raises(CheckpointError, match="fit the recommender again"):
        ItemEmbeddings.load(tmp_path)
    save_file({"table": torch.randn(7, 5)}, path)
    with pytest.raises(CheckpointError, match="fit the recommender again"):
        ItemEmbeddings.load(tmp_path)


def test_an_item_without_a_vector_stays_at_zero_and_moves_no_other() -> None:
    known_IE = 0.3 * torch.randn(20, 4) + 5.0
    table_IE = torch.cat([known_IE[:8], torch.zeros(30, 4), known_IE[8:]])
    standardised_IE = ItemEmbeddings(table_IE, source="a").standardised()
    assert not standardised_IE[8:38].any()
    expected_IE = ItemEmbeddings(known_IE, source="a").standardised()
    assert torch.equal(torch.cat([standardised_IE[:8], standardised_IE[38:]]), expected_IE)


def test_standardised_against_numpy() -> None:
    table_IE = torch.randn(50, 4) * torch.tensor([1.0, 1e-3, 40.0, 0.0]) + 0.1
    standardised_IE = ItemEmbeddings(table_IE, source="a").standardised().numpy()
    wide_IE = table_IE.double().numpy()[:, :3]
    expected_IE = (wide_IE - wide_IE.mean(axis=0)) / wide_IE.std(axis=0)
    np.testing.assert_allclose(standardised_IE[:, :3], expected_IE, rtol=1e-5, atol=1e-5)
    assert (standardised_IE[:, 3] == 0).all()
