from __future__ import annotations

import runpy
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsllm.errors import CheckpointError
from rsllm.recommenders.embeddings import ItemEmbeddings, other_items


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


def folds_of(table_IE: torch.Tensor, count: int) -> list[ItemEmbeddings]:
    """The table turned (or mirrored), scaled and shifted; item f has no vector in fold f."""
    folds = []
    for fold in range(count):
        turn = torch.linalg.qr(torch.randn(table_IE.shape[1], table_IE.shape[1]).double()).Q
        moved_IE = (0.3 + fold) * table_IE.double() @ turn + torch.randn(table_IE.shape[1]).double()
        moved_IE[fold] = 0.0
        folds.append(ItemEmbeddings(moved_IE.float(), source="fold"))
    return folds


def test_crossing_undoes_turns_scales_and_shifts() -> None:
    torch.manual_seed(0)
    table_IE = torch.randn(30, 5) + torch.arange(5)
    table_IE[20] = 0.0  # no vector: what stands there in a fold fits nothing
    folds = folds_of(table_IE, 3)
    crossed = ItemEmbeddings(table_IE, source="a").crossed_with(folds)
    assert torch.equal(crossed.table_IE, table_IE)
    assert crossed.source == "a"
    for number, found_IE in enumerate(crossed.fold_tables):
        assert not torch.allclose(folds[number].table_IE, table_IE, atol=0.5)
        kept = [item for item in range(30) if item not in (number, 20)]
        torch.testing.assert_close(found_IE[kept], table_IE[kept], atol=1e-4, rtol=0)
        assert not found_IE[number].any()


@pytest.mark.parametrize("shape", [(6, 5), (7, 4)])
def test_tables_of_differing_shapes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="differ in shape"):
        ItemEmbeddings(torch.randn(7, 5), "a", (torch.randn(7, 5), torch.randn(shape)))


def test_a_broken_table_of_a_fold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="7 of 7 items are not finite"):
        ItemEmbeddings(torch.randn(7, 5), "a", (torch.full((7, 5), torch.nan),))


def test_tables_of_folds_are_saved_in_their_order(tmp_path: Path) -> None:
    tables = tuple(torch.randn(7, 5) for _ in range(12))
    ItemEmbeddings(torch.randn(7, 5), "a", tables).save(tmp_path)
    loaded = ItemEmbeddings.load(tmp_path).fold_tables
    assert len(loaded) == 12
    assert all(torch.equal(a, b) for a, b in zip(loaded, tables, strict=True))


def test_all_tables_are_standardised_alike() -> None:
    table_IE, fold_IE = 3 * torch.randn(20, 4) + 1.0, torch.randn(20, 4)
    fold_IE[7] = 0.0
    stacked_XE = ItemEmbeddings(table_IE, "a", (fold_IE, table_IE)).standardised().numpy()
    wide_IE = table_IE.double().numpy()
    mean_E, deviation_E = wide_IE.mean(axis=0), wide_IE.std(axis=0)
    expected = [(t.double().numpy() - mean_E) / deviation_E for t in (table_IE, fold_IE, table_IE)]
    expected[1][7] = 0.0
    np.testing.assert_allclose(stacked_XE, np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_nearest_against_a_loop() -> None:
    table_IE = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    table_IE[[3, 11]] = 0.0
    script = runpy.run_path(str(jobs.ROOT / "experiments" / "compare_recommenders.py"))
    nearest, wide_IE = script["nearest"], table_IE.double().numpy()

    def cosine(first: int, second: int) -> float:
        a, b = wide_IE[first], wide_IE[second]
        return float(a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5)

    for item in (0, 10, 24):
        others = [other for other in range(25) if other not in (item, 3, 11)]
        expected = sorted(others, key=lambda other, own=item: -cosine(own, other))
        assert nearest(table_IE, item, 6) == expected[:6]


@pytest.mark.parametrize("count", [2, 3, 50])
def test_other_items_is_one_cycle(count: int) -> None:
    others, item, seen = other_items(count).tolist(), 0, []
    for _ in range(count):
        seen.append(item)
        item = others[item]
    assert sorted(seen) == list(range(count))
    assert item == 0
