"""What every recommender must hold; `rsllm.recommenders.base` states it."""

# Axes: B rows, H history positions, I items, E width, D title width, C candidates.
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rsllm.config import RecommenderConfig
from rsllm.config.models import RECOMMENDERS
from rsllm.config.plain import replace_in
from rsllm.data.sequences import Rows
from rsllm.errors import CheckpointError, ConfigError
from rsllm.evaluate.rank import candidate_scores, catalogue_scores
from rsllm.recommenders import FILE, Recommender, build, load, save

NUM_ITEMS = 30
WINDOW = 6
KINDS = ("ids", "titles")


def config_of(model: str) -> RecommenderConfig:
    return replace_in(
        RecommenderConfig(), {"model": model, "width": 16, "num_heads": 2, "dropout": 0.1}
    )


def make(model: str, seed: int = 0, kind: str = "ids") -> Recommender:
    torch.manual_seed(seed)
    titles_ID = torch.randn(NUM_ITEMS, 10) if kind == "titles" else None
    recommender = build(config_of(model), NUM_ITEMS, WINDOW, titles_ID)
    with torch.no_grad():
        for parameter in recommender.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return recommender.double()


def random_rows(rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    history_BH = torch.randint(NUM_ITEMS, (rows, WINDOW), generator=generator)
    length_B = torch.arange(rows) % WINDOW + 1
    return history_BH.masked_fill(torch.arange(WINDOW) >= length_B[:, None], -1), length_B


def cycle_rows(first_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Users who walk 0, 1, ..., NUM_ITEMS - 1, 0, ...: histories and the items that follow."""
    walk_BH = (first_B[:, None] + torch.arange(WINDOW)) % NUM_ITEMS
    history_BH = walk_BH.masked_fill(torch.arange(WINDOW) >= length_B[:, None], -1)
    return history_BH, (first_B + length_B) % NUM_ITEMS


def fit_cycle(recommender: Recommender, steps: int = 400) -> None:
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(recommender.parameters(), lr=1e-2)
    for _ in range(steps):
        first_B = torch.randint(NUM_ITEMS, (64,), generator=generator)
        length_B = torch.randint(1, WINDOW + 1, (64,), generator=generator)
        history_BH, target_B = cycle_rows(first_B, length_B)
        loss = F.cross_entropy(recommender.scores(recommender(history_BH, length_B)), target_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("model", sorted(RECOMMENDERS))
class TestRecommenderContract:
    def test_shapes(self, model: str) -> None:
        recommender = make(model)
        state_BE = recommender(*random_rows())
        assert recommender.item_table.shape == (NUM_ITEMS, 16)
        assert state_BE.shape == (40, 16)
        assert recommender.scores(state_BE).shape == (40, NUM_ITEMS)

    def test_learns_a_world_with_a_known_answer(self, model: str) -> None:
        torch.manual_seed(0)
        recommender = build(
            RecommenderConfig(model=model, width=16, dropout=0.1), NUM_ITEMS, WINDOW
        )
        fit_cycle(recommender)
        recommender.eval()
        for length in range(1, WINDOW + 1):
            length_B = torch.full((NUM_ITEMS,), length)
            history_BH, target_B = cycle_rows(torch.arange(NUM_ITEMS), length_B)
            scores_BI = recommender.scores(recommender(history_BH, length_B))
            assert torch.equal(scores_BI.argmax(dim=1), target_B)

    def test_batch_equals_one_by_one_without_padding(self, model: str) -> None:
        recommender = make(model).eval()
        history_BH, length_B = random_rows()
        alone = [
            recommender(history_H[None, :length], length[None])
            for history_H, length in zip(history_BH, length_B, strict=True)
        ]
        torch.testing.assert_close(
            recommender(history_BH, length_B), torch.cat(alone), atol=1e-6, rtol=1e-6
        )

    @pytest.mark.parametrize("padding", [0, 7, NUM_ITEMS, 10**9, -5])
    def test_padding_is_never_read(self, model: str, padding: int) -> None:
        recommender = make(model).eval()
        history_BH, length_B = random_rows()
        other_BH = history_BH.masked_fill(history_BH < 0, padding)
        wider_BH = F.pad(other_BH, (0, 5), value=padding)
        expected_BE = recommender(history_BH, length_B)
        assert torch.equal(recommender(other_BH, length_B), expected_BE)
        torch.testing.assert_close(
            recommender(wider_BH, length_B), expected_BE, atol=1e-6, rtol=1e-6
        )

    def test_order_matters(self, model: str) -> None:
        recommender = make(model).eval()
        length_B = torch.tensor([WINDOW])
        history_BH = torch.arange(WINDOW)[None]
        for swap in ([1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4]):
            change = recommender(history_BH[:, swap], length_B) - recommender(history_BH, length_B)
            assert change.abs().max() > 1e-3

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_parameter_gets_a_gradient(self, model: str, kind: str) -> None:
        recommender = make(model, kind=kind)
        history_BH, length_B = random_rows()
        target_B = torch.arange(len(length_B)) % NUM_ITEMS
        F.cross_entropy(recommender.scores(recommender(history_BH, length_B)), target_B).backward()
        dead = [
            name
            for name, parameter in recommender.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().max() > 0
        ]
        assert dead == []

    def test_padding_gets_no_gradient(self, model: str) -> None:
        recommender = make(model)
        history_BH, length_B = torch.tensor([[3, 4, 5, -1, -1, -1]]), torch.tensor([3])
        recommender(history_BH, length_B).sum().backward()
        read = [
            name
            for name, parameter in recommender.named_parameters()
            if parameter.shape[0] == NUM_ITEMS and parameter.grad[[0, NUM_ITEMS - 1]].any()
        ]
        assert read == []

    def test_seed_decides_the_weights(self, model: str) -> None:
        first, same, other = make(model, 0), make(model, 0), make(model, 1)
        assert torch.equal(first.item_table, same.item_table)
        assert not torch.equal(first.item_table, other.item_table)

    @pytest.mark.parametrize("kind", KINDS)
    def test_candidates_score_as_in_the_catalogue(self, model: str, kind: str) -> None:
        recommender, rows = make(model, kind=kind), candidate_rows()
        assert rows.candidates_RC is not None
        found_BC = candidate_scores(catalogue_scores(recommender, rows), rows)
        state_BE = recommender(*random_rows()).detach().numpy()
        table_IE = recommender.item_table.detach().numpy()
        for row, items in enumerate(rows.candidates_RC):
            alone_C = [sum(state_BE[row] * table_IE[item]) for item in items]
            np.testing.assert_allclose(found_BC[row], alone_C, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_saved_model_scores_alike(self, model: str, kind: str, tmp_path: Path) -> None:
        """One of titles is kept as the table that they project to, and loads without them."""
        saved = make(model, kind=kind).float().eval()
        save(saved, tmp_path)
        loaded = load(tmp_path, config_of(model), NUM_ITEMS, WINDOW)
        assert not loaded.training
        history_BH, length_B = random_rows()
        scores = [m.scores(m(history_BH, length_B)) for m in (saved, loaded)]
        torch.testing.assert_close(scores[1], scores[0], atol=1e-6, rtol=0)
        assert scores[0].std() > 0.1

    def test_a_file_of_another_shape_is_refused(self, model: str, tmp_path: Path) -> None:
        save(make(model).float(), tmp_path)
        other = "caser" if model != "caser" else "sasrec"
        narrow = replace_in(config_of(model), {"width": 8})
        for config, items in ((config_of(other), 30), (narrow, 30), (config_of(model), 31)):
            with pytest.raises(CheckpointError, match="fit the recommender again"):
                load(tmp_path, config, items, WINDOW)

    def test_a_missing_or_damaged_file_is_refused(self, model: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=f"cannot read a {model}"):
            load(tmp_path, config_of(model), NUM_ITEMS, WINDOW)
        (tmp_path / FILE).write_bytes(b"not safetensors")
        with pytest.raises(CheckpointError, match=f"cannot read a {model}"):
            load(tmp_path, config_of(model), NUM_ITEMS, WINDOW)


def candidate_rows() -> Rows:
    """`random_rows` with five candidates each."""
    history_BH, length_B = (tensor.numpy() for tensor in random_rows())
    rng, size = np.random.default_rng(0), len(length_B)
    candidates_BC = np.stack([rng.permutation(NUM_ITEMS)[:5] for _ in range(size)])
    number_B = np.arange(size)
    return Rows(
        number_B, number_B, history_BH, length_B, candidates_BC[:, 0], number_B, candidates_BC
    )


def test_the_item_table_is_the_projection_of_the_titles() -> None:
    """Linear, GELU, linear; written out for every item."""
    items = make("gru4rec", kind="titles").items
    (inner, offset), (outer, shift) = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (items.project[0], items.project[2])
    )
    for title_D, vector_E in zip(items.titles_ID.numpy(), items.weight.detach(), strict=True):
        hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner @ title_D + offset]
        np.testing.assert_allclose(vector_E, outer @ hidden + shift, atol=1e-12)
    assert not [name for name in items.state_dict() if "titles" in name], "titles are not weights"


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bert4rec.*sasrec"):
        RecommenderConfig(model="bert4rec")  # type: ignore[arg-type]
