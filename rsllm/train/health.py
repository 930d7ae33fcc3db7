"""Does a language-model stage learn what it should? Signs of collapse on a few probe rows.

Axes: B rows, T tokens, D language-model width, H heads.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rsllm.model.history import HistoryObjective
from rsllm.model.objective import LanguageObjective
from rsllm.prompts.collate import Batch
from rsllm.prompts.encode import NO_ITEM
from rsllm.prompts.histories import HistoryBatch

PROBE_ROWS = 4
SLOT_SCALE, SLOT_SPREAD = "health/slot_scale", "health/slot_spread"
SLOT_ATTENTION = "health/slot_attention"
DOUBTS = {
    "health/loss_peak": (0, 3, "the loss rose to {value:.2g} times its median: a spike"),
    SLOT_SCALE: (0.1, 30, "slots are {value:.2g} times as long as tokens; see projector.scale"),
    SLOT_SPREAD: (0.3, math.inf, "slots keep {value:.0%} of their vectors' directions"),
    SLOT_ATTENTION: (0.1, math.inf, "slots get {value:.2g} times the attention of other tokens"),
    "contrast/target_accuracy": (0, 0.95, "the target contrast is solved: alpha has no leverage"),
    "contrast/(target|user)_cosine": (-1, 0.95, "{} vectors collapse (cosine {value:.2f})"),
}
"""Of a reported quantity: the least and the most that is sound, and what to say otherwise."""


def health(objective: LanguageObjective, batch: Batch) -> dict[str, float]:
    """What a validation reports beside its metrics. Every rank must call it, under ZeRO 3.

    Args:
        batch: probe rows with one branch each.

    Returns:
        `slot_scale`: mean length of slot vectors over that of token vectors. `slot_spread`: in how
        many directions slots vary, over those of the recommender's vectors. `slot_attention`:
        what share of its attention the last prompt token pays to slots, mean over layers and
        heads, over the share of tokens that are slots; 1 is no preference. Nothing where prompts
        have no slots.
    """
    objective.eval()
    found = slots_health(objective, batch)
    if objective.model.slots is not None:
        with torch.no_grad(), objective.precision(batch):
            found[SLOT_ATTENTION] = _slot_attention(objective, batch)
    return found


@torch.no_grad()
def slots_health(
    objective: LanguageObjective | HistoryObjective, batch: Batch | HistoryBatch
) -> dict[str, float]:
    """`slot_scale` and `slot_spread` of `health`, of prompts of either form."""
    objective.eval()
    if (slots := objective.model.slots) is None:
        return {}
    item_N = batch.item_BT[batch.item_BT >= 0]
    with objective.precision(batch):
        length_BT = objective.model.embed(batch.ids_BT, batch.item_BT).float().norm(dim=-1)
        vectors_NE, slots_ND = slots.items_IE[item_N], slots.projected(item_N)
    text_BT = (batch.item_BT == NO_ITEM) & batch.real_BT
    return {
        SLOT_SCALE: float(length_BT[batch.item_BT >= 0].mean() / length_BT[text_BT].mean()),
        SLOT_SPREAD: directions(slots_ND) / directions(vectors_NE),
    }


def warnings(entry: Mapping[str, float]) -> list[str]:
    """What an entry of a learning curve gives reason to doubt."""
    return [
        text.format(*match.groups(), value=value)
        for name, value in entry.items()
        for pattern, (low, high, text) in DOUBTS.items()
        if (match := re.fullmatch(pattern, name)) and not low <= value <= high
    ]


def directions(rows_ND: Tensor) -> float:
    """In how many directions rows vary: the participation ratio of their variances."""
    covariance_DD = rows_ND.double().T.cov(correction=0)
    return max(1.0, float(covariance_DD.trace() ** 2 / covariance_DD.square().sum()))


def _slot_attention(objective: LanguageObjective, batch: Batch) -> float:
    model, width = objective.model, batch.ids_BT.shape[1]
    before = model.backbone.config._attn_implementation
    model.backbone.set_attn_implementation("eager")  # the one that gives its weights away
    try:
        decoder: Any = model.backbone.get_decoder()
        layers: tuple[Tensor, ...] = decoder(
            inputs_embeds=model.embed(batch.ids_BT, batch.item_BT),
            position_ids=batch.position_BT,
            output_attentions=True,
            use_cache=False,
        ).attentions
    finally:
        model.backbone.set_attn_implementation(before)
    row_B = torch.arange(len(batch.last_B), device=batch.last_B.device)
    last_B = batch.last_B - row_B * width
    weight_BT = torch.stack([a_BHTT[row_B, :, last_B].float().mean(1) for a_BHTT in layers]).mean(0)
    slot_BT = (batch.item_BT >= 0).float()
    paid_B = (weight_BT * slot_BT).sum(1) / weight_BT.sum(1)
    return float((paid_B * (last_B + 1) / slot_BT.sum(1)).mean())
