"""The three losses of RSLLM at every position of a history prompt.

L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT, each a mean over all positions of a step:

    L_NIP  the tokens of each next title, in the sequence
    L_UT   the user's vector after every prefix against the key of the item that came next
    L_TT   the mean state over each item's name, in its context, against that item's key

An extension of ours (RSLLM, arXiv 2412.16933, has one target a prompt), and so are the keys, which
make every item of the catalogue a negative (`rsllm.model.catalogue`).

Axes: B prompts, T tokens, M items of a prompt, N labels, V vocabulary, D language-model width,
K key width, I items, X rows of the stacked item tables.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rsllm.model.catalogue import CatalogueHead
from rsllm.model.objective import Objective, Parts, total
from rsllm.prompts.histories import HistoryBatch


class HistoryObjective(Objective):
    """`HybridLM` under RSLLM's losses at every position."""

    @property
    def head(self) -> CatalogueHead:
        """The catalogue scorer's part of the model."""
        assert self.model.catalogue is not None
        return self.model.catalogue

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Parts]:
        """The weighted loss and its parts, detached, for logs."""
        weights, states_BTD = self.loss.weights, self._states(batch)
        terms: Parts = {}
        facts: Parts = {}
        if "next_item" in weights:
            logits_NV = self.model.logits(states_BTD.flatten(0, 1)[batch.label_state_N])
            summed = F.cross_entropy(logits_NV, batch.label_N, reduction="sum")
            next_item = summed / batch.tokens_per_batch
            terms["next_item"] = weights["next_item"] * next_item
            facts["loss/next_item"] = next_item
        if self.loss.contrasts:
            keys_XK, asked = self.head.keys(), batch.asked
        pairs = {}
        if self.loss.alpha:
            # Not over an item's slot, which would tell whose key is asked for.
            names_BMD = means(states_BTD, batch.start_BM, batch.name_end_BM)
            pairs["target"] = self.head.answers(names_BMD), asked.past_BM
        if self.loss.beta:
            pairs["user"] = self._users(states_BTD, batch, keys_XK), asked.next_BM
        for name, sides in pairs.items():
            part = self.head.keys.contrast(*sides, keys_XK, asked)
            terms[f"{name}_contrast"] = weights[f"{name}_contrast"] * part.loss
            facts |= part.facts(name)
        facts["loss"] = loss = total(terms)
        return loss, {name: value.detach().float() for name, value in facts.items()}

    def _states(self, batch: HistoryBatch) -> Tensor:
        with self.precision(batch):
            return self.model.history_states(batch)

    def _users(self, states_BTD: Tensor, batch: HistoryBatch, keys_XK: Tensor) -> Tensor:
        """The user's vector after each item. [B, M, K]."""
        if self.head.keys.config.user_state == "mean":
            states_BMD = means(states_BTD, batch.start_BM[:, :1], batch.end_BM)
        else:
            states_BMD = at(states_BTD, batch.end_BM)
        return self.head.users(states_BMD, batch.asked, keys_XK)

    @torch.inference_mode()
    def score(self, batch: HistoryBatch, keys_XK: Tensor) -> Tensor:
        """Scores of all items, by their keys, as the next one after each history. [B, I], fp32."""
        users_BMK = self._users(self._states(batch), batch, keys_XK)
        return self.head.keys.last_scores(users_BMK, keys_XK, batch.asked)


def at(states_BTD: Tensor, place_BM: Tensor) -> Tensor:
    """The states at some places of each row. [B, M, D]."""
    return states_BTD.gather(1, place_BM[..., None].expand(-1, -1, states_BTD.shape[2]))


def means(states_BTD: Tensor, start_BM: Tensor, end_BM: Tensor) -> Tensor:
    """Mean state over places of each row, the ends included, in fp32; starts may be one a row."""
    sums_BTD = states_BTD.float().cumsum(1)
    before_BMD = at(sums_BTD, (start_BM - 1).clamp(min=0)) * (start_BM > 0)[..., None]
    size_BM1 = (end_BM + 1 - start_BM).clamp(min=1)[..., None]
    return (at(sums_BTD, end_BM) - before_BMD) / size_BM1
