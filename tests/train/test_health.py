"""The health monitor against worlds whose answer is known."""

# Axes: B rows, T tokens, D language-model width.
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tasks import language_task

from rsllm.data.prepared import PreparedData
from rsllm.evaluate.rank import decision
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import PADDING, Batch, collate
from rsllm.train.health import SLOT_ATTENTION, SLOT_SCALE, health, warnings

WEIGHTS = {"loss.alpha": 0.2, "loss.beta": 0.1, "loss.gamma": 0.5, "loss.scorer": "pointer"}


@pytest.fixture
def probe(data: PreparedData, random_llm: Path) -> tuple[LanguageObjective, Batch]:
    task = language_task(data, random_llm, **WEIGHTS)
    rows = [decision(task.validation, row) for row in range(3)]
    keys = data.catalogue.title_keys_I
    objective: Any = task.objective
    return objective, collate(rows, task.model.encoder, keys, all_branches=False)


def test_uniform_attention_prefers_no_slot(probe: tuple[LanguageObjective, Batch]) -> None:
    objective, batch = probe
    with torch.no_grad():
        for name, parameter in objective.model.llm.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    implementation = objective.model.backbone.config._attn_implementation
    assert health(objective, batch)[SLOT_ATTENTION] == pytest.approx(1.0, abs=1e-5)
    assert objective.model.backbone.config._attn_implementation == implementation


@torch.no_grad()
def test_slot_attention_equals_a_loop_over_unpadded_rows(
    probe: tuple[LanguageObjective, Batch],
) -> None:
    objective, batch = probe
    llm = objective.model.backbone
    llm.set_attn_implementation("eager")
    ratios = []
    for ids, items, branches in zip(batch.ids_BT, batch.item_BT, batch.branch_BT, strict=True):
        length = int((branches == 0).sum())
        vectors_TD = objective.model.embed(ids[:length], items[:length])
        layers = llm.get_decoder()(inputs_embeds=vectors_TD[None], output_attentions=True)
        slots = [at for at, item in enumerate(items[:length].tolist()) if item >= 0]
        paid = [
            sum(float(head[-1, at]) for at in slots)
            for layer in layers.attentions
            for head in layer[0]
        ]
        ratios.append(sum(paid) / len(paid) / (len(slots) / length))
    found = health(objective, batch)[SLOT_ATTENTION]
    assert found == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert abs(found - 1) > 1e-4


def test_slot_scale_is_a_ratio_of_lengths(probe: tuple[LanguageObjective, Batch]) -> None:
    objective, batch = probe
    model = objective.model
    table_VD = model.backbone.get_input_embeddings().weight
    slots, tokens = [], []
    for ids, items, branches in zip(
        batch.ids_BT.tolist(), batch.item_BT.tolist(), batch.branch_BT.tolist(), strict=True
    ):
        for token, item, branch in zip(ids, items, branches, strict=True):
            if item >= 0:
                assert model.slots is not None
                slots.append(float(model.slots.projected(torch.tensor(item)).norm()))
            elif item == -1 and branch != PADDING:
                tokens.append(float(table_VD[token].norm()))
    expected = (sum(slots) / len(slots)) / (sum(tokens) / len(tokens))
    assert health(objective, batch)[SLOT_SCALE] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("collapsed", [False, True])
@torch.no_grad()
def test_slot_spread_is_a_ratio_of_directions(
    probe: tuple[LanguageObjective, Batch], collapsed: bool
) -> None:
    objective, batch = probe
    slots = objective.model.slots
    assert slots is not None
    if collapsed:
        slots.projector.linear.weight[1:] = 0.0

    def directions(rows: list[torch.Tensor]) -> float:
        shares = np.linalg.eigvalsh(np.cov(np.stack([row.double().numpy() for row in rows]).T))
        return float((shares / shares.sum() @ (shares / shares.sum())) ** -1)

    items = [item for item in batch.item_BT.flatten().tolist() if item >= 0]
    projected = directions([slots.projected(torch.tensor(item)) for item in items])
    assert projected == pytest.approx(1.0) if collapsed else projected > 1.5
    expected = projected / directions([slots.items_IE[item] for item in items])
    assert health(objective, batch)["health/slot_spread"] == pytest.approx(expected, rel=1e-5)


def test_text_prompts_have_no_slots_to_watch(data: PreparedData, random_llm: Path) -> None:
    task = language_task(data, random_llm, representation="text")
    report = task.validate(task.objective)
    assert {SLOT_SCALE, "health/slot_spread", SLOT_ATTENTION}.isdisjoint(report)


@pytest.mark.parametrize(
    ("entry", "doubt"),
    [
        ({"health/loss_peak": 3.6}, "rose to 3.6 times"),
        ({SLOT_SCALE: 40.0}, "40 times as long"),
        ({SLOT_SCALE: 0.01}, "0.01 times as long"),
        ({"health/slot_spread": 0.17}, "keep 17% of their vectors' directions"),
        ({SLOT_ATTENTION: 0.02}, "0.02 times the attention"),
        ({"contrast/target_accuracy": 0.99}, "alpha has no leverage"),
        ({"contrast/user_cosine": 0.97}, "user vectors .* 0.97"),
        ({"contrast/target_cosine": 0.96}, "target vectors .* 0.96"),
    ],
)
def test_a_doubt_is_told(entry: dict[str, float], doubt: str) -> None:
    (told,) = warnings(entry)
    assert re.search(doubt, told)


def test_a_healthy_entry_is_not_doubted() -> None:
    healthy = {
        "health/loss_peak": 1.8,
        SLOT_SCALE: 1.2,
        SLOT_ATTENTION: 0.8,
        "contrast/target_accuracy": 0.7,
        "contrast/user_cosine": 0.4,
    }
    assert warnings(healthy) == []
    assert warnings({}) == []
