"""Score held-out rows: all candidates of a user in one forward pass, or the whole catalogue.

Axes: R rows, C candidates, I items, H history positions, X items seen, K distinct titles,
T representatives, P orders of the candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsllm.config import Scorer
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Bools, Catalogue, Ints, Rows, Split
from rsllm.errors import EvaluationError
from rsllm.evaluate.deployed import lists_of
from rsllm.evaluate.metrics import Floats, expected_metrics, rank_metrics, target_ranks
from rsllm.model.catalogue import ItemKeys
from rsllm.model.history import HistoryObjective
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Row, collate
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.histories import Whole, collate_histories
from rsllm.recommenders.base import Recommender
from rsllm.terminal import DELAY, Progress

EXPECTED, CATALOGUE = "expected/", "catalogue/"
ROWS_AT_ONCE = 4096
ORDER_SEED = 0


def fixed_sample(rows: Rows, limit: int) -> Rows:
    """At most `limit` rows (0: all), evenly spaced, so that every run scores the same ones."""
    if not limit or limit >= len(rows):
        return rows
    return rows.take(np.linspace(0, len(rows) - 1, limit).round().astype(np.int64))


def held_out(data: PreparedData, split: Split, limit: int = 0) -> list[Rows]:
    """The same rows with each draw of their candidates; at most `limit` rows (0: all)."""
    return [fixed_sample(data.rows(split, draw), limit) for draw in range(data.num_draws)]


def candidate_sets(rows: Rows) -> Ints:
    """The candidates of each row. [R, C].

    Raises:
        EvaluationError: the rows have no candidate sets.
    """
    if rows.candidates_RC is None:
        raise EvaluationError("training rows have no fixed candidate sets")
    return rows.candidates_RC


def decision(rows: Rows, index: int) -> Row:
    """A held-out row with its fixed candidate set."""
    return Row(
        history=rows.histories(index).tolist(),
        candidates=candidate_sets(rows)[index].tolist(),
        target=int(rows.target_R[index]),
        user=int(rows.user_R[index]),
    )


def target_places(rows: Rows) -> NDArray[np.int64]:
    """Where the target stands in each candidate set. [R]."""
    return np.asarray((candidate_sets(rows) == rows.target_R[:, None]).argmax(axis=1))


@torch.inference_mode()
def catalogue_scores(model: Recommender, rows: Rows) -> Floats:
    """A recommender's scores of the whole catalogue for every row. [R, I]"""
    model.eval()
    device = next(model.parameters()).device
    history_RH = torch.tensor(rows.history_RH, dtype=torch.long, device=device)
    length_R = torch.tensor(rows.length_R, dtype=torch.long, device=device)
    scores: Floats = model.scores(model(history_RH, length_R)).double().cpu().numpy()
    return scores


def candidate_scores(scores_RI: Floats, rows: Rows) -> Floats:
    """The scores of each row's candidates, out of those of the catalogue. [R, C]"""
    candidates_RC = candidate_sets(rows)
    chosen_RC = np.take_along_axis(scores_RI, candidates_RC.astype(np.int64), axis=1)
    return np.where(candidates_RC == NO_ITEM, np.finfo(np.float64).min, chosen_RC)


def eligible(target_R: Ints, history_RH: Ints, catalogue: Catalogue) -> Bools:
    """Which of the catalogue's representatives may be a row's negatives. [R, T]

    Those (one id per distinct title) whose title is neither the target's nor one in the history.
    """
    seen_RX = catalogue.keys(np.column_stack([target_R, history_RH]))
    open_RK = np.ones((len(target_R), catalogue.title_keys_I.max() + 2), dtype=bool)
    np.put_along_axis(open_RK, seen_RX, False, axis=1)  # of padding (-1): a column of its own
    return open_RK[:, catalogue.keys(catalogue.representatives)]


def num_better(
    scores_RI: Floats, target_R: Ints, history_RH: Ints, catalogue: Catalogue
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the `eligible` negatives that score at least as high as the target.

    Ties count against the target, so constant scores never look good.

    Args:
        scores_RI: finite scores of the whole catalogue.
        target_R: item ids of the true next items.
        history_RH: item ids of the windows, padded with -1.
        catalogue: titles and their representatives.

    Returns:
        `(better_R, pool_R)`: eligible negatives not outscored by the target, and all eligible.

    Raises:
        EvaluationError: a score is NaN or infinite.
    """
    if not np.isfinite(scores_RI).all():
        raise EvaluationError("the recommender's scores are not finite; lower its learning rate")
    eligible_RT = eligible(target_R, history_RH, catalogue)
    target_score_R1 = np.take_along_axis(scores_RI, target_R[:, None], axis=1)
    better_RT = eligible_RT & (scores_RI[:, catalogue.representatives] >= target_score_R1)
    return better_RT.sum(axis=1), eligible_RT.sum(axis=1)


def rank_catalogue(
    score: Callable[[Rows], Floats],
    draws: Sequence[Rows],
    data: PreparedData,
    pasts: Sequence[Ints] = (),
) -> dict[str, Any]:
    """What a scorer of the whole catalogue makes of the same rows under each draw.

    Args:
        score: rows -> scores [R, I], higher is better.
        draws: the rows with each draw of their candidates.
        data: what the rows are of.
        pasts: all that each row's user had done before; by default nobody asks for lists.

    Returns:
        "scores" of the candidates [D, R, C] (none of training rows); per row the exact expectation
        of each metric over uniform draws ("expected/HR@1" ..., none where the data's candidates
        are not drawn uniformly: there is no closed form then) and each metric among all titles
        that could be candidates ("catalogue/HR@1" ...). With pasts also "lists", the items that
        would be recommended (`rsllm.evaluate.deployed`).
    """
    parts: list[dict[str, Any]] = []
    for start in range(0, len(draws[0]), ROWS_AT_ONCE):
        part = [rows.take(slice(start, start + ROWS_AT_ONCE)) for rows in draws]
        scores_RI, rows = score(part[0]), part[0]
        better, pool = num_better(scores_RI, rows.target_R, rows.history_RH, data.catalogue)
        drawn = [candidate_scores(scores_RI, r) for r in part if r.candidates_RC is not None]
        found: dict[str, Any] = {"scores": np.stack(drawn or [scores_RI[:, :0]], axis=1)}
        found |= {CATALOGUE + name: values for name, values in rank_metrics(1 + better).items()}
        if data.config["candidates"] == "uniform":
            expected = expected_metrics(better, pool, data.config["num_candidates"] - 1)
            found |= {EXPECTED + name: values for name, values in expected.items()}
        if pasts:
            own = pasts[start : start + ROWS_AT_ONCE]
            found["lists"] = lists_of(scores_RI, own, data.catalogue)
        parts.append(found)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return whole | {"scores": whole["scores"].swapaxes(0, 1)}


def catalogue_metrics(
    score: Callable[[Rows], Floats], rows: Rows, data: PreparedData
) -> dict[str, Floats]:
    """Each metric of each row, by scores of the whole catalogue.

    Exact expectations over uniform candidate draws, or else on the drawn sets; {} of training rows
    whose candidates are not drawn uniformly.
    """
    found = rank_catalogue(score, [rows], data)
    if (expected := named(found, EXPECTED)) or rows.candidates_RC is None:
        return expected
    return rank_metrics(target_ranks(found["scores"][0], target_places(rows)))


def named(arrays: dict[str, Floats], prefix: str) -> dict[str, Floats]:
    """Those of `rank_catalogue`'s arrays under a prefix, by their metrics."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


@torch.inference_mode()
def score_candidates(
    objective: LanguageObjective,
    rows: Rows,
    encoder: PromptEncoder,
    data: PreparedData,
    scorer: Scorer,
    *,
    batch_size: int,
) -> Floats:
    """Scores [R, C] of every row's candidates, higher is better.

    Rows of similar length share a batch, which spares padding. A backbone that cannot rank in one
    pass reads the prompt anew for every candidate.
    """
    objective.eval()
    separate = scorer == "likelihood" and not objective.model.one_pass
    device = next(objective.parameters()).device

    def scored(decisions: Sequence[Row], all_branches: bool) -> Floats:
        keys_I = data.catalogue.title_keys_I
        batch = collate(decisions, encoder, keys_I, all_branches=all_branches).to(device)
        scores: Floats = objective.score(batch, scorer).double().cpu().numpy()
        return scores

    decisions = [decision(rows, index) for index in range(len(rows))]
    lengths = [encoder.length(row.history, row.candidates, row.template) for row in decisions]
    order = np.argsort(lengths, kind="stable")
    parts = []
    for start in Progress(range(0, len(rows), batch_size), "ranking", unit=" batches", delay=DELAY):
        chosen = [decisions[index] for index in order[start : start + batch_size]]
        if separate:
            alone = [[replace(row, target=item) for item in row.candidates] for row in chosen]
            parts += [scored(candidates, all_branches=False).T for candidates in alone]
        else:
            parts.append(scored(chosen, all_branches=scorer == "likelihood"))
    return np.concatenate(parts)[np.argsort(order)]


@torch.inference_mode()
def score_catalogue(
    objective: HistoryObjective, rows: Rows, encoder: PromptEncoder, *, batch_size: int
) -> Floats:
    """A tuned model's scores of the whole catalogue, one pass of each history. [R, I]."""
    objective.eval()
    device, num_items = next(objective.parameters()).device, objective.head.keys.num_items
    histories = history_rows(rows)
    order = np.argsort([encoder.length(row.history, (), 0) for row in histories], kind="stable")
    parts, keys_XK = [np.empty((0, num_items))], objective.head.keys()  # once for all batches
    for start in Progress(range(0, len(rows), batch_size), "ranking", unit=" batches", delay=DELAY):
        chosen = [histories[index] for index in order[start : start + batch_size]]
        whole = Whole.of(chosen, encoder, np.ones(num_items))
        batch = collate_histories(chosen, encoder, num_items, whole).to(device)
        parts.append(objective.score(batch, keys_XK).double().cpu().numpy())
    return np.asarray(np.concatenate(parts)[np.argsort(order)])


@torch.inference_mode()
def score_keys(keys: ItemKeys, rows: Rows) -> Floats:
    """Scores of the whole catalogue by the keys alone, without a language model. [R, I]."""
    keys.eval()
    histories = history_rows(rows)
    whole = Whole.of(histories, None, np.ones(keys.num_items))
    batch, keys_XK = whole.asked(histories).to(keys.popularity_I.device), keys()
    scores_BI = keys.last_scores(keys.shortcut(batch, keys_XK), keys_XK, batch)
    return np.asarray(scores_BI.double().cpu().numpy())


def history_rows(rows: Rows) -> list[Row]:
    """Held-out rows as histories, with what came next; their candidates are left out."""
    return [
        Row(rows.histories(i).tolist(), (), int(rows.target_R[i]), int(rows.user_R[i]))
        for i in range(len(rows))
    ]


def presented_places(rows: Rows, num_orders: int) -> NDArray[np.int64]:
    """Where each candidate stands under seeded random orders, 0 for the first. [P, R, C]."""
    places_PRC = np.empty((num_orders, *candidate_sets(rows).shape), dtype=np.int64)
    places_PRC[:] = np.arange(places_PRC.shape[2])
    return np.random.default_rng(ORDER_SEED).permuted(places_PRC, axis=2)


def reordered_scores(score: Callable[[Rows], Floats], rows: Rows, num_orders: int) -> Floats:
    """Scores under each of `presented_places`, back in the candidates' original places. [P, R, C].

    Args:
        score: rows -> scores [R, C] in the order of their candidates.
        rows: with candidate sets.
        num_orders: how often they are scored.
    """
    parts = []
    for place_RC in presented_places(rows, num_orders):
        shown_RC = np.take_along_axis(candidate_sets(rows), place_RC.argsort(axis=1), axis=1)
        scores_RC = score(replace(rows, candidates_RC=shown_RC))
        parts.append(np.take_along_axis(scores_RC, place_RC, axis=1))
    return np.stack(parts)
