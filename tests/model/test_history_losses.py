"""The losses at every position against loops over positions and items in float64."""

# Axes: B prompts, T tokens, D language-model width, K key width, I items.
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import (
    CATALOGUE,
    TITLES,
    make_encoder,
    make_histories,
    make_history_batch,
    make_history_objective,
)
from torch import Tensor
from world import run_in_world

from rsllm.config import LossConfig
from rsllm.errors import CheckpointError
from rsllm.model.backbone import load_tokenizer
from rsllm.model.catalogue import ItemKeys
from rsllm.model.history import HistoryObjective
from rsllm.prompts.collate import Row
from rsllm.prompts.encode import PromptEncoder
from rsllm.prompts.histories import Whole

LOSS = LossConfig(alpha=0.3, beta=0.4)
COUNTS = CATALOGUE.counts_I.tolist()


def unit(vector_D: Tensor) -> Tensor:
    length = (vector_D * vector_D).sum().sqrt()
    return vector_D / length if length.item() else vector_D


class Naive:
    """What a step's losses are, position by position, of the states that the model gives.

    Everything behind the states is computed anew, one vector at a time, in float64.
    """

    def __init__(
        self, objective: HistoryObjective, encoder: PromptEncoder, rows: Sequence[Row]
    ) -> None:
        self.encoder, self.rows, self.loss = encoder, rows, objective.loss
        self.model, head = objective.model, objective.head
        self.config = head.keys.config
        self.weights = {name: value.double() for name, value in head.named_parameters()}
        base_XK = head.keys.base_XK.double()
        gains = [(10 * gain).exp() for gain in self.weights["keys.log_gain_P"]]
        both = zip(gains, head.keys.widths, strict=True)
        gain_K = torch.stack([gain for gain, width in both for _ in range(width)])
        turn_KK = self.weights["keys.turn_KK"]
        self.keys = [unit(base_K * gain_K + turn_KK.T @ (base_K * gain_K)) for base_K in base_XK]
        with_states = objective.model.history_states(make_history_batch(list(rows), encoder))
        self.states = with_states.double()

    def level(self, state_D: Tensor) -> Tensor:
        return state_D / ((state_D * state_D).mean() + torch.finfo(torch.float32).eps).sqrt()

    def spans(self, row: Row) -> list[tuple[int, int]]:
        prompt = self.encoder.history(row.history, row.template)
        return list(zip(prompt.starts, prompt.ends, strict=True))

    def key(self, item: int, row: Row) -> Tensor:
        return self.keys[row.table * len(TITLES) + item]

    def user(self, number: int, place: int) -> Tensor:
        """The user's vector after the item at a place."""
        row, spans = self.rows[number], self.spans(self.rows[number])
        first, last = spans[0][0], spans[place][1]
        tokens = range(first, last + 1) if self.config.user_state == "mean" else [last]
        state_D = torch.stack([self.states[number, at] for at in tokens]).mean(0)
        gain = (10 * self.weights["state_gain.log"][0]).exp()
        vector_K = gain * (self.weights["state_map.weight"] @ self.level(state_D))
        if self.config.shortcut:
            past_K = torch.zeros(len(vector_K), dtype=torch.float64)
            for age, item in enumerate(reversed(row.history[: place + 1])):
                past_K = past_K + self.config.recency**age * self.key(item, row)
            vector_K = 0.1 * vector_K + unit(past_K)
        return unit(vector_K)

    def answer(self, number: int, place: int) -> Tensor:
        """The vector of the item at a place, as it stands there."""
        row = self.rows[number]
        start, end = self.spans(row)[place]
        if self.encoder.representation != "behavioural":  # its name, without its slot
            end = start + len(self.encoder.title_ids[row.history[place]]) - 1
        tokens = [self.states[number, at] for at in range(start, end + 1)]
        state_D = torch.stack(tokens).mean(0)
        return unit(self.weights["answer_map.weight"] @ self.level(state_D))

    def score(self, vector_K: Tensor, item: int, row: Row) -> Tensor:
        scale = (10 * self.weights["keys.score.gain.log"][0]).exp() / self.config.temperature
        popular = 10 * self.weights["keys.score.popularity"][0] * math.log1p(COUNTS[item])
        return scale * (vector_K @ self.key(item, row)) + popular

    def rivals(self) -> dict[int, float]:
        """Items of the step or of the catalogue, and how often each is expected among them."""
        if self.loss.negatives == "catalogue":
            return dict.fromkeys(range(len(TITLES)), 1.0)
        items = [item for row in self.rows for item in [*row.history, row.target]]
        shares = {item: max(COUNTS[item], 1) / sum(COUNTS) for item in items}
        return {item: 1 - (1 - share) ** len(items) for item, share in shares.items()}

    def term(self, vector_K: Tensor, target: int, row: Row, place: int) -> tuple[Tensor, bool, int]:
        """-log of the target's share, whether it comes first, and how many it is told from."""
        known = {TITLES[item] for item in row.history[: place + 1]} | {TITLES[target]}
        others = [
            self.score(vector_K, item, row) - math.log(share)
            for item, share in self.rivals().items()
            if TITLES[item] not in known
        ]
        own = self.score(vector_K, target, row)
        loss = torch.logsumexp(torch.stack([own, *others]), 0) - own
        return loss, all(bool(own > other) for other in others), len(others)

    def contrast(self, kind: str) -> tuple[Tensor, float, float]:
        terms = []
        for number, row in enumerate(self.rows):
            following = [*row.history[1:], row.target]
            for place, item in enumerate(row.history):
                user = kind == "user"
                vector_K = (self.user if user else self.answer)(number, place)
                terms.append(self.term(vector_K, following[place] if user else item, row, place))
        losses, hits, sizes = zip(*terms, strict=True)
        return torch.stack(losses).mean(), sum(hits) / len(hits), sum(sizes) / len(sizes)

    def next_item(self) -> Tensor:
        """Mean over the tokens of all names but a history's first, and their ends."""
        head_VD, losses = self.model.backbone.get_output_embeddings().weight.double(), []
        for number, row in enumerate(self.rows):
            for item, (start, _) in list(zip(row.history, self.spans(row), strict=True))[1:]:
                for offset, token in enumerate([*self.encoder.title_ids[item], 10**9]):
                    logits_V = head_VD @ self.states[number, start - 1 + offset]
                    label = self.encoder.terminator if token == 10**9 else token
                    losses.append(torch.logsumexp(logits_V, 0) - logits_V[label])
        return torch.stack(losses).mean()

    def facts(self) -> dict[str, Tensor | float]:
        found: dict[str, Tensor | float] = {}
        found["loss/next_item"] = self.next_item()
        for kind in ("target", "user"):
            loss, hits, size = self.contrast(kind)
            found[f"loss/{kind}_contrast"] = loss
            found[f"contrast/{kind}_accuracy"] = hits
            found[f"contrast/{kind}_negatives"] = size
        return found


CASES: dict[str, dict[str, Any]] = {
    "last": {},
    "mean": {"user_state": "mean"},
    "plain": {"shortcut": False},
    "mean, plain": {"user_state": "mean", "shortcut": False, "temperature": 0.5},
    "batch": {"negatives": "batch"},
    "tables": {"tables": 3, "recency": 0.4},
    "tables, batch, mean": {"tables": 3, "negatives": "batch", "user_state": "mean"},
    "titles alone": {"slots": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_equal_the_double_loop(random_llm: Path, case: dict[str, Any]) -> None:
    """And their gradients, with respect to all that learns."""
    negatives = case.get("negatives", "catalogue")
    loss = replace(LOSS, negatives=negatives)
    settings = {name: value for name, value in case.items() if name != "negatives"}
    objective = make_history_objective(random_llm, loss, **settings).eval()
    slotted = objective.model.slots is not None
    encoder = make_encoder(load_tokenizer(random_llm), "unified" if slotted else "text", "history")
    rows = make_histories(4, seed=3, tables=case.get("tables", 1))
    assert any(len(set(row.history)) < len(row.history) for row in rows), "an item comes twice"
    assert {0, 4} & {item for row in rows for item in [*row.history, row.target]}, "equal titles"

    value, parts = objective(make_history_batch(rows, encoder, sampled=negatives == "batch"))
    naive = Naive(objective, encoder, rows)
    expected = naive.facts()
    for name, fact in expected.items():
        value_of_it = fact.item() if isinstance(fact, Tensor) else fact
        assert float(parts[name]) == pytest.approx(value_of_it, rel=2e-5, abs=1e-6), name
    if case.get("tables") or negatives == "batch":
        assert float(parts["contrast/user_negatives"]) > 3
    whole = (
        0.3 * expected["loss/next_item"]
        + 0.3 * expected["loss/target_contrast"]
        + 0.4 * expected["loss/user_contrast"]
    )
    assert isinstance(whole, Tensor)
    assert float(value) == pytest.approx(float(whole), rel=1e-5)

    still = set()  # lengths that normalising takes away
    if not slotted:
        still.add("model.catalogue.keys.log_gain_P")
    if not case.get("shortcut", True):
        still.add("model.catalogue.state_gain.log")
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    theirs = torch.autograd.grad(whole, list(named.values()), allow_unused=True)
    for name, own, reference in zip(named, ours, theirs, strict=True):
        assert own is not None, name
        assert reference is not None, name
        largest = float(reference.abs().max())
        torch.testing.assert_close(
            own, reference, atol=2e-4 * largest + 5e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (largest > 1e-4) == (name not in still), name


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.25), (0.7, 0.3)])
def test_only_weighed_losses_are_computed(random_llm: Path, alpha: float, beta: float) -> None:
    """0.7 and 0.3 leave nothing to the language-model loss, though 1 - 0.7 - 0.3 is not 0."""
    objective = make_history_objective(random_llm, LossConfig(alpha=alpha, beta=beta)).eval()
    encoder = make_encoder(load_tokenizer(random_llm), "unified", "history")
    value, parts = objective(make_history_batch(make_histories(3), encoder))
    weights = {"next_item": 1 - alpha - beta, "target_contrast": alpha, "user_contrast": beta}
    weighed = {name for name, weight in weights.items() if weight > 1e-9}
    assert {n.removeprefix("loss/") for n in parts if n.startswith("loss/")} == weighed
    total = sum(weights[name] * float(parts[f"loss/{name}"]) for name in weighed)
    assert float(value) == pytest.approx(total, rel=1e-6)


def test_prompts_without_names_have_no_language_model_loss(random_llm: Path) -> None:
    objective = make_history_objective(random_llm, LOSS).eval()
    encoder = make_encoder(load_tokenizer(random_llm), "behavioural", "history")
    value, parts = objective(make_history_batch(make_histories(3), encoder))
    assert float(parts["loss/next_item"]) == 0.0
    value.backward()
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in objective.parameters() if p.grad is not None
    )


def loss_and_gradient(
    folder: Path, negatives: Any, accumulation: int = 1
) -> tuple[dict[str, float], Tensor]:
    """This worker's mean parts and flat gradient over its share of the rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows, parts = make_histories(8, seed=1, tables=2), world * accumulation
    encoder = make_encoder(load_tokenizer(folder), "unified", "history")
    whole = Whole.of(rows, encoder, CATALOGUE.counts_I, sampled=negatives == "batch", parts=parts)
    objective = make_history_objective(folder, replace(LOSS, negatives=negatives), tables=2)
    reports = []
    for number in range(accumulation):
        own = rows[rank::world][number::accumulation]
        loss, report = objective.train()(make_history_batch(own, encoder, whole))
        (loss / accumulation).backward()
        reports.append(report)
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return {name: mean(reports, name) for name in reports[0]}, torch.cat(gradients)


def mean(reports: Sequence[Mapping[str, Tensor | float]], name: str) -> float:
    return sum(float(report[name]) for report in reports) / len(reports)


def assert_same(
    found: Sequence[tuple[dict[str, float], Tensor]], whole: tuple[dict[str, float], Tensor]
) -> None:
    """Losses and gradients are means over the parts; the share of hits is one of each part."""
    reports, gradients = zip(*found, strict=True)
    for name in (name for name in whole[0] if name.startswith("loss")):
        assert mean(reports, name) == pytest.approx(whole[0][name], abs=2e-6, rel=1e-5), name
    assert float(whole[1].abs().max()) > 1e-2
    torch.testing.assert_close(torch.stack(gradients).mean(0), whole[1], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("negatives", ["catalogue", "batch"])
def test_micro_batches_average_to_the_whole_step(random_llm: Path, negatives: str) -> None:
    """Though they differ in length, and rivals are those of the whole step."""
    whole = loss_and_gradient(random_llm, negatives)
    assert_same([loss_and_gradient(random_llm, negatives, accumulation=4)], whole)


def test_two_workers_equal_one(random_llm: Path) -> None:
    found = run_in_world(loss_and_gradient, 2, random_llm, "batch", 2)
    assert_same(found, loss_and_gradient(random_llm, "batch"))


def test_vectors_of_another_catalogue_are_refused(random_llm: Path) -> None:
    keys = make_history_objective(random_llm, LOSS).head.keys
    titles_IF, items_IE = torch.randn(len(TITLES), 4), torch.randn(len(TITLES) + 1, 3)
    with pytest.raises(CheckpointError, match=r"12 titles and of 13 items .* catalogue of 12"):
        ItemKeys(items_IE, titles_IF, CATALOGUE, keys.config)
    with pytest.raises(CheckpointError, match=r"11 titles .* catalogue of 12; prepare"):
        ItemKeys(None, titles_IF[1:], CATALOGUE, keys.config)
