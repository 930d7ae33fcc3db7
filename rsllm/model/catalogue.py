"""The catalogue scorer: histories and items as vectors of one space, whose cosine ranks.

It ranks by L_UT's own similarity (`rsllm.model.history`) and is an extension of ours: RSLLM
compares states as they are, over the few targets of a batch. An item's key is made of its
recommender's vector and its title, without a pass of the language model, so that every item of the
catalogue is a negative at every position, and one pass of a history ranks them all.

Axes: B histories, M items of a history, N positions, D language-model width, F title width, P parts
of a key, K key width, I items, J rivals, X rows of the stacked item tables (tables * I).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsllm.config import CatalogueConfig
from rsllm.data.sequences import Catalogue
from rsllm.errors import CheckpointError
from rsllm.model.losses import Contrast
from rsllm.prompts.collate import PADDING
from rsllm.prompts.histories import Asked

SCALARS = 10.0
"""How much faster the few scalars move than entries of a matrix, in one group of parameters."""
STATE_SHARE = 0.1
"""Length of what a state adds to a user's vector at the start, where the shortcut has length 1."""


class Gain(nn.Module):
    """A factor that is learned, from 1 on."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))

    def forward(self, value: Tensor) -> Tensor:
        """`value`, made larger or smaller."""
        return (SCALARS * self.log).exp() * value


class Score(nn.Module):
    """Scales cosines, and adds what popularity says.

    A module of its own, as `Gain` is: ZeRO 3 gathers the parameters of what is called, and no
    others.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.gain = temperature, Gain()
        self.popularity = nn.Parameter(torch.zeros(1))

    def forward(self, cosine_NJ: Tensor, popularity_J: Tensor) -> Tensor:
        """Scores [N, J]."""
        scaled_NJ: Tensor = self.gain(cosine_NJ / self.temperature)
        return scaled_NJ + SCALARS * self.popularity * popularity_J


class ItemKeys(nn.Module):
    """The key of every item, and how a user's vector scores it.

    A key starts as the recommender's vector beside the title's, each of unit length, so that the
    decayed mean of a history's keys starts as a rule that works: similar to what came before, by
    use and by title.

    Args:
        items_XE: standardised item vectors of the recommender, one table below the other (see
            `ItemEmbeddings.standardised`); None where items are titles alone.
        titles_IF: vectors of titles, of which the cosine says how alike they are.
        catalogue: how often each item trains, and which have equal titles.

    Raises:
        CheckpointError: vectors of other items than those of the catalogue.
    """

    base_XK: Tensor
    popularity_I: Tensor
    title_keys_I: Tensor

    def __init__(
        self,
        items_XE: Tensor | None,
        titles_IF: Tensor,
        catalogue: Catalogue,
        config: CatalogueConfig,
    ) -> None:
        super().__init__()
        self.config, self.num_items = config, len(catalogue.counts_I)
        parts = [titles_IF]
        if items_XE is not None:
            parts = [items_XE, titles_IF.repeat(len(items_XE) // self.num_items, 1)]
        if len(titles_IF) != self.num_items or len({len(part) for part in parts}) > 1:
            raise CheckpointError(
                f"vectors of {len(titles_IF)} titles and of {len(parts[0])} items do not fit a"
                f" catalogue of {self.num_items}; prepare the data as it was trained on"
            )
        self.widths = [part.shape[1] for part in parts]
        base_XK = torch.cat([F.normalize(part.float(), dim=-1) for part in parts], 1)
        popularity_I = torch.tensor(catalogue.counts_I).float().log1p()
        title_keys_I = torch.tensor(catalogue.title_keys_I).long()
        self.register_buffer("base_XK", base_XK, persistent=False)
        self.register_buffer("popularity_I", popularity_I, persistent=False)
        self.register_buffer("title_keys_I", title_keys_I, persistent=False)
        self.turn_KK = nn.Parameter(torch.zeros(self.width, self.width))
        self.log_gain_P = nn.Parameter(torch.zeros(len(parts)))
        self.score = Score(config.temperature)

    @property
    def width(self) -> int:
        """Of a key."""
        return sum(self.widths)

    def forward(self) -> Tensor:
        """The keys, of unit length, in fp32. [X, K]."""
        return self.made_by(self.turn_KK, self.log_gain_P)

    def made_by(self, turn_KK: Tensor, log_gain_P: Tensor) -> Tensor:
        """The keys that these weights make, which need not be those of the module."""
        gain_P = (SCALARS * log_gain_P).exp()
        gain_K = torch.cat([g.expand(w) for g, w in zip(gain_P, self.widths, strict=True)])
        base_XK = self.base_XK.to(turn_KK) * gain_K
        return F.normalize((base_XK + base_XK @ turn_KK).float(), dim=-1)

    def rows(self, asked: Asked) -> Tensor:
        """The histories as rows of the item tables; padding stays. [B, M]."""
        first_B1 = asked.table_B[:, None] * self.num_items
        return torch.where(asked.past_BM != PADDING, asked.past_BM + first_B1, PADDING)

    def shortcut(self, asked: Asked, keys_XK: Tensor) -> Tensor:
        """The decayed mean of a history's keys up to each item, of unit length. [B, M, K]."""
        rows_BM = self.rows(asked)
        past_BMK = keys_XK[rows_BM.clamp(min=0)] * (rows_BM != PADDING)[..., None]
        decay_MM = decayed(rows_BM.shape[1], self.config.recency).to(past_BMK)
        return F.normalize(decay_MM @ past_BMK, dim=-1)

    def scores(
        self, vectors_NK: Tensor, table_N: Tensor, keys_XK: Tensor, items_J: Tensor
    ) -> Tensor:
        """Scores of items for users: scaled cosines, and what popularity says. [N, J].

        Each user is scored by the keys of the own item table.
        """
        cosine_NJ = vectors_NK.new_empty(len(vectors_NK), len(items_J))
        tables = torch.split(keys_XK, self.num_items)
        whole = len(items_J) == self.num_items  # a copy of every key, and its gradient, are slow
        for table in set(table_N.tolist()):
            own_N = torch.where(table_N == table)[0]
            keys_JK = tables[table] if whole else tables[table][items_J]
            cosine_NJ = cosine_NJ.index_copy(0, own_N, vectors_NK[own_N] @ keys_JK.T)
        return cast(Tensor, self.score(cosine_NJ, self.popularity_I[items_J]))

    def contrast(
        self, vectors_BMK: Tensor, target_BM: Tensor, keys_XK: Tensor, asked: Asked
    ) -> Contrast:
        """Cross-entropy of each position's item among the rivals; its sum / `asked.per_batch`.

        Rivals that are drawn count for as many items as they stand for; the target is there with
        certainty and keeps its score (see `rsllm.train.recommender.sampled_softmax`).
        """
        prompt_N, place_N = torch.where(target_BM != PADDING)
        vectors_NK, target_N = vectors_BMK[prompt_N, place_N], target_BM[prompt_N, place_N]
        own_NJ = asked.rivals_J == target_N[:, None]
        logits_NJ = self.scores(vectors_NK, asked.table_B[prompt_N], keys_XK, asked.rivals_J)
        logits_NJ = logits_NJ - asked.log_share_J.masked_fill(own_NJ, 0.0)
        excluded_NJ = self.excluded(asked, prompt_N, place_N, target_N)
        logits_NJ = logits_NJ.masked_fill(excluded_NJ, -torch.inf)
        own_N = own_NJ.byte().argmax(1)
        loss = F.cross_entropy(logits_NJ, own_N, reduction="sum") / asked.per_batch
        with torch.no_grad():
            hits = (logits_NJ.argmax(1) == own_N).float().mean()
            num_negatives = (~excluded_NJ).sum(1).float().mean() - 1
        return Contrast(loss, hits, num_negatives)

    def excluded(self, asked: Asked, prompt_N: Tensor, place_N: Tensor, target_N: Tensor) -> Tensor:
        """Which rivals are no negatives. [N, J].

        Those with the title of an item that the history holds up to there, or with that of the
        target, but for the target itself: what held-out candidate sets leave out too.
        """
        titles_I, past_BM = self.title_keys_I, asked.past_BM
        title_J = titles_I[asked.rivals_J]
        seen_BMJ = titles_I[past_BM.clamp(min=0)][..., None] == title_J
        seen_BMJ &= (past_BM != PADDING)[..., None]
        for place in range(1, seen_BMJ.shape[1]):
            seen_BMJ[:, place] |= seen_BMJ[:, place - 1]
        excluded_NJ = seen_BMJ[prompt_N, place_N] | (titles_I[target_N][:, None] == title_J)
        return excluded_NJ & (asked.rivals_J != target_N[:, None])

    def last_scores(self, vectors_BMK: Tensor, keys_XK: Tensor, asked: Asked) -> Tensor:
        """Scores of all items as the next one after each whole history. [B, I]."""
        last_B = asked.last_B
        users_BK = vectors_BMK[torch.arange(len(last_B), device=last_B.device), last_B]
        items_I = torch.arange(self.num_items, device=last_B.device)
        return self.scores(users_BK, asked.table_B, keys_XK, items_I)


class StateMap(nn.Linear):
    """Turns states of the language model into vectors of a key's width, in fp32."""

    def __init__(self, llm_width: int, width: int) -> None:
        super().__init__(llm_width, width, bias=False)
        nn.init.normal_(self.weight, std=(width * llm_width) ** -0.5)

    def forward(self, states_D: Tensor) -> Tensor:
        """States at unit root mean square first, whatever the gain of the backbone's final norm."""
        level_D = F.rms_norm(states_D.float(), states_D.shape[-1:])
        return super().forward(level_D.to(self.weight.dtype)).float()


class CatalogueHead(nn.Module):
    """Keys of items, and what turns states of the language model into vectors of their space."""

    def __init__(self, keys: ItemKeys, llm_width: int) -> None:
        super().__init__()
        self.keys = keys
        self.state_map = StateMap(llm_width, keys.width)
        self.answer_map = StateMap(llm_width, keys.width)
        self.state_gain = Gain()

    def users(self, states_BMD: Tensor, asked: Asked, keys_XK: Tensor) -> Tensor:
        """The user's vector after each item of a history, of unit length. [B, M, K].

        Args:
            states_BMD: what the language model makes of the history up to there.
            asked: the histories.
            keys_XK: of all items.
        """
        vectors_BMK: Tensor = self.state_gain(self.state_map(states_BMD))
        if self.keys.config.shortcut:
            vectors_BMK = STATE_SHARE * vectors_BMK + self.keys.shortcut(asked, keys_XK)
        return F.normalize(vectors_BMK, dim=-1)

    def answers(self, states_BMD: Tensor) -> Tensor:
        """The vector of items as they stand in a history, from their mean states. [B, M, K]."""
        return F.normalize(self.answer_map(states_BMD), dim=-1)


def decayed(size: int, recency: float) -> Tensor:
    """Row k weighs items 0 to k: the last one 1, the one before `recency`, and so on. [M, M]."""
    age_MM = torch.arange(size)[:, None] - torch.arange(size)
    return torch.where(age_MM >= 0, recency ** age_MM.clamp(min=0).double(), 0.0)
