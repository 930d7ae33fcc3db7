"""A trained model as Python, the command line and the endpoint use it: histories in, lists out.

Axes: R histories, I items, N candidates of one history, H history positions, E vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from rsllm.config.stages import RANKERS
from rsllm.data.prepared import PreparedData
from rsllm.data.sequences import NO_ITEM, Ints, Rows
from rsllm.errors import ConfigError, require
from rsllm.evaluate.deployed import top, unseen
from rsllm.evaluate.metrics import Floats
from rsllm.recommend.items import Items, as_names

Names = Sequence[str | int]
"""Items by their titles or ids; of a history the oldest first."""


class Language(Protocol):
    """A tuned language model that scores items for histories."""

    @property
    def scorer(self) -> str:
        """One of `RANKERS`."""

    @property
    def num_candidates(self) -> int:
        """How many items a choice prompt lists; 0 where the whole catalogue is scored at once."""

    def __call__(self, rows: Rows) -> Floats:
        """The scores of the whole catalogue [R, I], or of each row's candidates [R, N]."""


class Filter(NamedTuple):
    """Which items may be recommended."""

    include_seen: bool = False
    """Whether items of the past may be, too."""
    only: Ints | None = None
    """The items to choose from; by default one of each title."""
    never: Ints = np.empty(0, np.int32)
    """Items that are left out."""


ANY_UNSEEN = Filter()


class Ranked(NamedTuple):
    """Items after one history, best first. [N] each."""

    items: Ints
    scores: Floats
    recommender_scores: Floats
    """NaN where there is no recommender."""
    recommender_ranks: Ints
    """Among all items that were open, 1 for the best; 0 where there is no recommender."""


@dataclass(eq=False)
class Ranker:
    """Ranks the items of a data set for histories; `rsllm.load` makes one.

    A history is read as far back as the window of the data. What is recommended is filtered by all
    of it.
    """

    name: str
    """The artifact's, KIND/KEY."""
    data: PreparedData
    vectors_IE: Floats
    """Vectors of items, of which the cosine says how alike two are."""
    recommender: Callable[[Rows], Floats] | None
    language: Language | None
    by: str = ""
    """Which of `rankers` it ranks by."""
    weight: float = 1.0
    """What the recommender's log-probability counts beside the language model's in `fused`."""
    why: str = "as asked"
    """How `by` was chosen."""
    exported: str = ""
    """The folder of an exported model, which was chosen where its users are; empty for others."""

    def __post_init__(self) -> None:
        self.by = self.by or self.rankers[-1]
        require(
            self.by in self.rankers,
            f"{self.name} cannot rank by {self.by!r}; choose one of {', '.join(self.rankers)}",
        )

    def __repr__(self) -> str:
        return f"Ranker({self.name} by {self.by}, {len(self.data.titles):,} items)"

    @property
    def rankers(self) -> list[str]:
        """What it could rank by, the cheapest first."""
        own = {"recommender"} if self.recommender else set()
        own |= {self.language.scorer} if self.language else set()
        return [name for name in RANKERS if name in own or (name == "fused" and len(own) > 1)]

    @property
    def window(self) -> int:
        """How many of a history's newest items are read."""
        return int(self.data.config["window"])

    @cached_property
    def items(self) -> Items:
        """The items by title and by id."""
        return Items(self.data)

    def recommend(
        self,
        history: Names | Mapping[str, Names] | None = None,
        *,
        users: Names | None = None,
        k: int = 10,
        include_seen: bool = False,
        only: Names | None = None,
        never: Names = (),
    ) -> pd.DataFrame:
        """The k best items after a history, after each of several, or for known users.

        Args:
            history: titles or ids, oldest first; or several of them, by a name of yours.
            users: ids of users of the data; all that is known of them counts.
            k: at most so many items each.
            include_seen: whether items of the history may be recommended again.
            only: the items to choose from; by default all.
            never: items to leave out.

        Returns:
            A row an item: `rank`, `title`, `score`, `item_id`, `source` (`interactions`, or `title`
            for an item that no training row holds), `recommender_rank` and `recommender_score`.
            For several histories `user_id` comes first.

        Raises:
            ConfigError: an item or a user that the data do not have, an empty history, or no k.
        """
        require((history is None) != (users is None), "give either a history or users")
        require(k > 0, f"k is {k}; ask for at least 1 item")
        pasts: dict[str, Ints] = {}
        if users is not None:
            pasts = self.pasts(users)
        elif isinstance(history, Mapping):
            pasts = {user: self.items.find_all(names) for user, names in history.items()}
        elif history is not None:
            pasts[""] = self.items.find_all(history)
        kept = None if only is None else self.items.find_all(only)
        allowed = Filter(include_seen, kept, self.items.find_all(never))
        found = zip(pasts, self.lists([*pasts.values()], k, allowed), strict=True)
        frames = [self.table(ranked).assign(user_id=user) for user, ranked in found]
        whole = pd.concat(frames, ignore_index=True)
        alone = users is None and not isinstance(history, Mapping)
        whole.insert(0, "user_id", whole.pop("user_id"))
        return whole.drop(columns="user_id") if alone else whole

    def rank(self, history: Names, candidates: Names) -> pd.DataFrame:
        """Your candidates after a history, best first, in the columns of `recommend`.

        Raises:
            ConfigError: an item that the data do not have, or one that is given twice; no item.
        """
        chosen_N = self.items.find_all(candidates)
        require(len(chosen_N) > 0, "there are no candidates to rank; give at least one")
        once = len(np.unique(chosen_N)) == len(chosen_N)
        require(once, "a candidate is given twice; name each item once")
        past = self.items.find_all(history)
        return self.table(self.best([past], [chosen_N], len(chosen_N))[0])

    def similar(self, item: str | int, k: int = 10) -> pd.DataFrame:
        """The k items most like one, by cosine: `rank`, `title`, `score` and `item_id`."""
        place = self.items.find(item)
        unit_IE = self.vectors_IE / np.linalg.norm(self.vectors_IE, axis=1, keepdims=True).clip(
            1e-9
        )
        open_N = self.open_items(np.array([place], np.int32))
        cosine_N = unit_IE[open_N] @ unit_IE[place]
        best = top(cosine_N, k)
        return self._named(open_N[best], cosine_N[best])

    def explain(self, history: Names, item: str | int) -> pd.DataFrame:
        """How the score of an item changes without each item of the history, in one batch.

        Returns:
            A row an item that is read: `title`, `item_id`, `without` (the score without it) and
            `adds` (the score after the whole history, less that).

        Raises:
            ConfigError: fewer than two items of history, or an item that the data do not have.
        """
        past, target = self.items.find_all(history)[-self.window :], self.items.find(item)
        require(len(past) > 1, "explain leaves out one item at a time; give at least two")
        pasts = [past, *(np.delete(past, at) for at in range(len(past)))]
        open_N = self.open_items(past, Filter(include_seen=True))
        others_N = open_N[open_N != target]
        rows = rows_of(pasts, self.window)
        alone_RI = self.recommender(rows) if self.recommender else None
        if size := self._num_listed:  # the same ones each time, so that scores can be compared
            others_N = others_N[top(_of(alone_RI, 0, others_N), size - 1)]
        chosen_N = np.append(others_N, np.int32(target))
        scores = self._scores(rows, alone_RI, [chosen_N] * len(pasts))
        whole, *without = [float(scores_N[-1]) for scores_N in scores]
        shown = self._named(past, np.array(without)).rename(columns={"score": "without"})
        return shown.drop(columns="rank").assign(adds=whole - shown["without"])

    def pasts(self, users: Names | None = None) -> dict[str, Ints]:
        """All that is known of users, oldest first, by their ids; of everybody by default.

        Raises:
            ConfigError: a user that the data do not have.
        """
        numbers = self._user_numbers
        asked = [*numbers] if users is None else [str(user) for user in as_names(users)]
        if unknown := [user for user in asked if user not in numbers]:
            raise ConfigError(
                f"no user is called {unknown[0]!r}; the data have {len(numbers):,}, such as"
                f" {next(iter(numbers))!r}. For somebody new give a history of titles"
            )
        start_U, item_E = self._events
        places = [(user, numbers[user]) for user in asked]
        return {user: item_E[start_U[at] : start_U[at + 1]] for user, at in places}

    def open_items(self, past: Ints, allowed: Filter = ANY_UNSEEN) -> Ints:
        """What may be recommended after a past. [N]."""
        catalogue, seen = self.data.catalogue, past[:0] if allowed.include_seen else past
        open_N = unseen(np.concatenate([seen, allowed.never]), catalogue)
        if allowed.only is None:
            return open_N
        only_N = np.unique(allowed.only)
        return only_N[np.isin(catalogue.keys(only_N), catalogue.keys(open_N))]

    def lists(self, pasts: Sequence[Ints], k: int, allowed: Filter = ANY_UNSEEN) -> list[Ranked]:
        """The k best items after each past, of those that are allowed."""
        return self.best(pasts, [self.open_items(past, allowed) for past in pasts], k)

    def best(self, pasts: Sequence[Ints], open_items: Sequence[Ints], k: int) -> list[Ranked]:
        """The k best of some items after each past.

        Of more than a choice prompt lists, the recommender names those that are put into it.

        Raises:
            ConfigError: an empty history, or a choice prompt and nobody to say what it lists.
        """
        rows = rows_of(pasts, self.window)
        alone_RI = self.recommender(rows) if self.recommender else None
        listed = [*open_items]
        if size := self._num_listed:
            for row, items_N in enumerate(listed):
                if len(items_N) > max(size, k):
                    require(
                        alone_RI is not None,
                        f"{self.name} chooses among {size} candidates, and was trained without a"
                        " recommender that could name them; give candidates",
                    )
                    listed[row] = items_N[top(_of(alone_RI, row, items_N), max(size, k))]
        found = []
        for row, scores_N in enumerate(self._scores(rows, alone_RI, listed)):
            chosen = top(scores_N, k)
            items_K = listed[row][chosen]
            known_K, open_N = _of(alone_RI, row, items_K), _of(alone_RI, row, open_items[row])
            ranks_K = 1 + (open_N > known_K[:, None]).sum(axis=1) if self.recommender else 0
            ranks_K = np.broadcast_to(np.int32(ranks_K), len(items_K))
            found.append(Ranked(items_K, scores_N[chosen], known_K, ranks_K))
        return found

    def table(self, ranked: Ranked) -> pd.DataFrame:
        """A list in the columns of `recommend`."""
        trained_N = self.data.catalogue.counts_I[ranked.items] > 0
        return self._named(ranked.items, ranked.scores).assign(
            source=np.where(trained_N, "interactions", "title"),
            recommender_rank=ranked.recommender_ranks,
            recommender_score=ranked.recommender_scores,
        )

    @property
    def _num_listed(self) -> int:
        """How many items the prompts list; 0 where they list none."""
        return self.language.num_candidates if self.language and self.by != "recommender" else 0

    def _scores(self, rows: Rows, alone_RI: Floats | None, items: Sequence[Ints]) -> list[Floats]:
        """The scores of each row's items by what it ranks by, higher is better."""
        alone = [_of(alone_RI, row, items_N) for row, items_N in enumerate(items)]
        if self.by == "recommender":
            return alone
        assert self.language is not None
        if not self._num_listed:
            language_RI = self.language(rows)
            language = [_of(language_RI, row, items_N) for row, items_N in enumerate(items)]
        else:
            language = [np.empty(0)] * len(items)
            for size in {len(items_N) for items_N in items}:
                same_R = [row for row, items_N in enumerate(items) if len(items_N) == size]
                listed_RN = np.stack([items[row] for row in same_R])
                some = replace(
                    rows.take(np.array(same_R)), candidates_RC=listed_RN, target_R=listed_RN[:, 0]
                )
                for row, scores_N in zip(same_R, self.language(some), strict=True):
                    language[row] = scores_N
        if self.by != "fused":
            return language
        pairs = zip(language, alone, strict=True)
        return [log_softmax(own_N) + self.weight * log_softmax(its_N) for own_N, its_N in pairs]

    def _named(self, items_N: Ints, scores_N: Floats) -> pd.DataFrame:
        titles, ids = self.data.titles, self.data.source_ids
        return pd.DataFrame(
            {
                "rank": np.arange(1, len(items_N) + 1),
                "title": [titles[item] for item in items_N],
                "score": scores_N,
                "item_id": [ids[item] for item in items_N],
            }
        )

    @cached_property
    def _user_numbers(self) -> dict[str, int]:
        return {user: number for number, user in enumerate(self.data.user_ids())}

    @cached_property
    def _events(self) -> tuple[Ints, Ints]:
        """Where the events of each user begin, and the items of all events."""
        events = self.data.events()
        start_U = np.searchsorted(events.user_E, np.arange(len(self._user_numbers) + 1))
        return start_U.astype(np.int32), events.item_E


def rows_of(pasts: Sequence[Ints], window: int) -> Rows:
    """Rows without a target, for scoring: the newest items of each past.

    Raises:
        ConfigError: an empty past.
    """
    require(all(len(past) for past in pasts), "a history is empty; give at least one item")
    length_R = np.minimum([len(past) for past in pasts], window).astype(np.int32)
    history_RH = np.full((len(pasts), window), NO_ITEM, np.int32)
    for row, past in enumerate(pasts):
        history_RH[row, : length_R[row]] = past[-window:]
    number_R, none_R = np.arange(len(pasts), dtype=np.int32), np.full(len(pasts), NO_ITEM, np.int32)
    return Rows(number_R, length_R, history_RH, length_R, none_R, none_R.astype(np.int64))


def _of(scores_RI: Floats | None, row: int, items_N: Ints) -> Floats:
    """A row's scores of some items; NaN where nobody scored them."""
    return np.full(len(items_N), np.nan) if scores_RI is None else scores_RI[row, items_N]
