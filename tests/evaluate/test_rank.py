"""Scores of candidate sets and exact expectations, against naive counterparts."""

# Axes: D draws, R rows, C candidates, I items.
from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from model.small_models import make_model, save_bloom, save_mistral
from small_data import NUM_CANDIDATES, TITLES, WINDOW, small_data

from rsllm.config import LossConfig, PromptConfig, RecommenderConfig, Scorer
from rsllm.data.candidates import draw_candidates, row_keys
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import Catalogue, Rows
from rsllm.errors import EvaluationError
from rsllm.evaluate import rank
from rsllm.evaluate.metrics import rank_metrics, target_ranks
from rsllm.evaluate.rank import (
    CATALOGUE,
    EXPECTED,
    candidate_scores,
    catalogue_scores,
    decision,
    fixed_sample,
    held_out,
    named,
    num_better,
    presented_places,
    rank_catalogue,
    reordered_scores,
    score_candidates,
    target_places,
)
from rsllm.model.backbone import load_backbone, load_tokenizer
from rsllm.model.hybrid import HybridLM, ItemSlots
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.encode import NO_ITEM, PromptEncoder, Tokens
from rsllm.recommenders import build


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "small")


def objective_and_encoder(folder: Path) -> tuple[LanguageObjective, PromptEncoder]:
    model = make_model(load_backbone(folder, torch.float32))
    assert isinstance(model.slots, ItemSlots)
    items_IE = torch.randn(len(TITLES), model.slots.items_IE.shape[1])
    model.slots.items_IE = items_IE
    encoder = PromptEncoder(load_tokenizer(folder), TITLES, PromptConfig(), "unified", "movie")
    return LanguageObjective(HybridLM(model.llm, model.slots), LossConfig()), encoder


@pytest.mark.parametrize("scorer", ["likelihood", "pointer"])
def test_scores_do_not_depend_on_the_batch_size(
    data: PreparedData, random_llm: Path, scorer: Scorer
) -> None:
    objective, encoder = objective_and_encoder(random_llm)
    rows = data.rows("validation")
    scores = [
        score_candidates(objective, rows, encoder, data, scorer, batch_size=size)
        for size in (1, 4, 99)
    ]
    assert scores[0].shape == (len(rows), NUM_CANDIDATES)
    assert np.ptp(scores[0], axis=1).min() > 1e-3
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-4, rtol=0)


def test_scores_follow_the_order_of_rows(data: PreparedData, random_llm: Path) -> None:
    objective, encoder = objective_and_encoder(random_llm)
    rows = data.rows("validation")
    order = np.array([4, 0, 2])
    settings = {"scorer": "likelihood", "batch_size": 2}
    whole = score_candidates(objective, rows, encoder, data, **settings)
    some = score_candidates(objective, rows.take(order), encoder, data, **settings)
    np.testing.assert_allclose(some, whole[order], atol=1e-4, rtol=0)


def test_target_places_are_where_the_targets_stand(data: PreparedData) -> None:
    rows = data.rows("test")
    assert rows.candidates_RC is not None
    expected = [c.index(t) for c, t in zip(rows.candidates_RC.tolist(), rows.target_R, strict=True)]
    assert target_places(rows).tolist() == expected
    assert decision(rows, 3).candidates[expected[3]] == decision(rows, 3).target


def test_training_rows_have_no_candidates(data: PreparedData) -> None:
    rows = data.rows("train")
    scores_RI = np.zeros((len(rows), len(TITLES)))
    for use in (target_places, lambda r: decision(r, 0), lambda r: candidate_scores(scores_RI, r)):
        with pytest.raises(EvaluationError, match="training rows"):
            use(rows)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, range(60)), (60, range(60)), (99, range(60)), (1, [0]), (4, [0, 20, 39, 59])],
)
def test_fixed_sample(data: PreparedData, limit: int, expected: list[int]) -> None:
    rows = data.rows("train")
    assert len(rows) == 60
    sample = fixed_sample(rows, limit)
    assert sample.target_R.tolist() == rows.target_R[list(expected)].tolist()
    assert sample.history_RH.tolist() == rows.history_RH[list(expected)].tolist()


def test_catalogue_scores_equal_one_row_at_a_time(data: PreparedData) -> None:
    torch.manual_seed(0)
    model = build(RecommenderConfig(width=8, dropout=0.5), len(TITLES), WINDOW).train()
    rows = data.rows("validation")
    scores_RI = catalogue_scores(model, rows)
    assert scores_RI.shape == (len(rows), len(TITLES))
    for i in range(len(rows)):
        history = torch.tensor(rows.histories(i)[None].tolist())
        state_1E = model(history, torch.tensor([history.shape[1]]))
        expected_I = (state_1E @ model.item_table.T)[0].detach().numpy()
        np.testing.assert_allclose(scores_RI[i], expected_I, atol=1e-5)


def test_expectation_is_the_mean_over_many_candidate_sets(data: PreparedData) -> None:
    rows, rng, draws = data.rows("test"), np.random.default_rng(0), 3000
    scores_RI = rng.normal(size=(len(rows), len(TITLES))).round(1)  # with ties
    expected = named(rank_catalogue(lambda rows: scores_RI, [rows], data), EXPECTED)
    for i in range(len(rows)):
        target = int(rows.target_R[i])
        many = np.full(draws, i)
        keys_D = row_keys(1, "test", rows.user_R[many], rows.position_R[many], np.arange(draws))
        sets_DC = draw_candidates(
            keys_D, rows.history_RH[many], rows.target_R[many], data.catalogue, NUM_CANDIDATES
        )
        ranks_D = target_ranks(scores_RI[i][sets_DC], (sets_DC == target).argmax(axis=1))
        for name, sampled_D in rank_metrics(ranks_D).items():
            error = sampled_D.std() / draws**0.5
            assert abs(expected[name][i] - sampled_D.mean()) <= 4.5 * error + 1e-9, (i, name)


CatalogueScorer = Callable[[Rows], np.ndarray]


def made_up_scores(data: PreparedData) -> CatalogueScorer:
    """Scores with ties that depend on the user."""
    table_UI = np.random.default_rng(3).normal(size=(40, len(TITLES))).round(1)
    return lambda rows: table_UI[rows.user_R]


def pool_of(rows: Rows, row: int, data: PreparedData) -> list[int]:
    """The first item of each title that is neither the target's nor in the history."""
    keys = data.catalogue.title_keys_I.tolist()
    seen = {keys[item] for item in [*rows.histories(row), rows.target_R[row]]}
    return [item for item, key in enumerate(keys) if key not in seen and keys.index(key) == item]


@pytest.fixture(scope="module")
def two_draws(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_data(tmp_path_factory.mktemp("data") / "two", num_draws=2)


def test_a_catalogue_scorer_scores_the_candidates_of_each_draw(two_draws: PreparedData) -> None:
    draws, score = held_out(two_draws, "test"), made_up_scores(two_draws)
    scores_DRC = rank_catalogue(score, draws, two_draws)["scores"]
    assert scores_DRC.shape == (2, len(draws[0]), NUM_CANDIDATES)
    assert not np.array_equal(draws[0].candidates_RC, draws[1].candidates_RC)
    for draw, rows in enumerate(draws):
        scores_RI = score(rows)
        for row, candidates in enumerate(rows.candidates_RC.tolist()):
            expected = [scores_RI[row, item] for item in candidates]
            assert scores_DRC[draw, row].tolist() == expected


def test_catalogue_metrics_are_those_of_the_sorted_titles(two_draws: PreparedData) -> None:
    draws, score = held_out(two_draws, "test"), made_up_scores(two_draws)
    found = named(rank_catalogue(score, draws, two_draws), CATALOGUE)
    rows, scores_RI, ranks = draws[0], score(draws[0]), []
    for row, target in enumerate(rows.target_R.tolist()):
        items = [target, *pool_of(rows, row, two_draws)]
        order = sorted(items, key=lambda item: (-scores_RI[row, item], item == target))
        ranks.append(1 + order.index(target))
    assert max(ranks) > 10, "not only hits"
    assert found["MRR"].tolist() == pytest.approx([1 / rank for rank in ranks])
    assert found["HR@10"].tolist() == [float(rank <= 10) for rank in ranks]
    expected = [1 / np.log2(1 + rank) if rank <= 5 else 0.0 for rank in ranks]
    assert found["NDCG@5"].tolist() == pytest.approx(expected)


def test_expectations_are_means_over_all_candidate_sets(two_draws: PreparedData) -> None:
    rows, score = two_draws.rows("test"), made_up_scores(two_draws)
    found = named(rank_catalogue(score, [rows], two_draws), EXPECTED)
    assert set(found) == set(rank_metrics(np.ones(1, int)))
    scores_RI = score(rows)
    for row, target in enumerate(rows.target_R.tolist()):
        pool = pool_of(rows, row, two_draws)
        ahead = [bool(scores_RI[row, item] >= scores_RI[row, target]) for item in pool]
        sets = combinations(ahead, NUM_CANDIDATES - 1)
        ranks = np.array([1 + sum(chosen) for chosen in sets])
        for name, values in rank_metrics(ranks).items():
            assert found[name][row] == pytest.approx(values.mean(), abs=1e-9), name


def test_parts_of_the_rows_change_nothing(
    two_draws: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, score, sizes = held_out(two_draws, "test", 5), made_up_scores(two_draws), []
    whole = rank_catalogue(score, draws, two_draws)
    monkeypatch.setattr(rank, "ROWS_AT_ONCE", 2)

    def watched(rows: Rows) -> np.ndarray:
        sizes.append(len(rows))
        return score(rows)

    parts = rank_catalogue(watched, draws, two_draws)
    assert sizes == [2, 2, 1]
    assert parts.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-12, err_msg=name)


def test_training_rows_have_all_but_candidate_scores(data: PreparedData) -> None:
    rows, score = data.rows("train"), made_up_scores(data)
    found = rank_catalogue(score, [rows], data)
    assert found["scores"].shape == (1, len(rows), 0)
    assert len(named(found, EXPECTED)["MRR"]) == len(named(found, CATALOGUE)["MRR"]) == len(rows)


@pytest.mark.parametrize("save", [save_bloom, lambda *at: save_mistral(*at, window=8)])
@torch.no_grad()
def test_without_one_pass_every_candidate_is_a_plain_forward(
    data: PreparedData, random_llm: Path, tmp_path: Path, save: Callable[[Path, Path], Path]
) -> None:
    objective, encoder = objective_and_encoder(save(tmp_path, random_llm))
    rows = data.rows("validation")

    def scores() -> np.ndarray:
        return score_candidates(objective, rows, encoder, data, "likelihood", batch_size=4)

    objective.model.one_pass = False
    found, expected = scores(), []
    for i in range(len(rows)):
        d = decision(rows, i)
        prompt = encoder.prompt(d.history, d.candidates, d.template).tokens
        expected.append([plain_score(objective, encoder, prompt, item) for item in d.candidates])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def plain_score(
    objective: LanguageObjective, encoder: PromptEncoder, prompt: Tokens, candidate: int
) -> float:
    answer = [*encoder.title_ids[candidate], encoder.terminator]
    vectors = objective.model.embed(
        torch.tensor([prompt.ids + answer]),
        torch.tensor([prompt.items + [NO_ITEM] * len(answer)]),
    )
    logits_TV = objective.model.llm(inputs_embeds=vectors).logits[0, len(prompt) - 1 : -1].double()
    return float(logits_TV.log_softmax(-1)[range(len(answer)), answer].sum())


def test_scores_return_to_the_places_of_the_candidates(data: PreparedData) -> None:
    """A scorer that looks at the items only says the same under every order."""
    rows, shown = data.rows("test"), []

    def score(asked: Rows) -> np.ndarray:
        assert asked.candidates_RC is not None
        shown.append(asked.candidates_RC)
        return asked.candidates_RC.astype(float)

    scores_PRC = reordered_scores(score, rows, 3)
    assert rows.candidates_RC is not None
    places_PRC = presented_places(rows, 3)
    for scores_RC, shown_RC, places_RC in zip(scores_PRC, shown, places_PRC, strict=True):
        assert scores_RC.tolist() == rows.candidates_RC.tolist()
        assert not np.array_equal(shown_RC, rows.candidates_RC)
        again = np.take_along_axis(shown_RC, places_RC, axis=1)
        assert again.tolist() == rows.candidates_RC.tolist()
    assert len({shown_RC.tobytes() for shown_RC in shown}) == 3


SMALL_CATALOGUE = Catalogue(
    title_keys_I=np.array([0, 1, 2, 1, 3, 4, 0, 5], dtype=np.int32),
    representatives=np.array([0, 1, 2, 4, 5, 7], dtype=np.int32),
    counts_I=np.ones(6, np.int64),
)


def naive_better(scores: np.ndarray, target: int, history: list[int]) -> tuple[int, int]:
    keys = SMALL_CATALOGUE.title_keys_I
    seen = {keys[item] for item in [target, *history] if item >= 0}
    pool = [item for item in SMALL_CATALOGUE.representatives if keys[item] not in seen]
    return sum(scores[item] >= scores[target] for item in pool), len(pool)


def test_better_items_equal_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    scores_BI = rng.integers(0, 4, (300, 8)).astype(np.float32)
    target_B = rng.integers(0, 8, 300, dtype=np.int32)
    history_BH = rng.integers(-1, 8, (300, 4), dtype=np.int32)
    better_B, pool_B = num_better(scores_BI, target_B, history_BH, SMALL_CATALOGUE)
    for row, scores in enumerate(scores_BI):
        expected = naive_better(scores, int(target_B[row]), history_BH[row].tolist())
        assert (better_B[row], pool_B[row]) == expected


def test_ties_with_the_target_are_better_items() -> None:
    better_B, pool_B = num_better(
        np.zeros((1, 8)), np.array([6]), np.array([[1, -1]]), SMALL_CATALOGUE
    )
    assert better_B.tolist() == pool_B.tolist() == [4]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(broken: float) -> None:
    scores_BI = np.zeros((1, 8))
    scores_BI[0, 3] = broken
    with pytest.raises(EvaluationError, match="not finite"):
        num_better(scores_BI, np.array([0]), np.array([[-1]]), SMALL_CATALOGUE)
