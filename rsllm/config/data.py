"""Which interactions, and how they become windows, splits and candidate sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rsllm.config.checks import at_least, positive, require

Domain = Literal["movie", "game", "artist", "item"]
TimeUnit = Literal["seconds", "milliseconds", "iso8601"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """Names of the columns of a table that no known layout describes."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    rating: str = ""
    """Empty: interactions carry no rating, and `data.min_rating` is not applied."""
    title: str = "title"
    text: tuple[str, ...] = ()
    """Columns whose words follow the title in parentheses, such as genres."""
    split: str = ""
    """Column that says train, validation or test, the same for all rows of a user."""
    items: str = ""
    """File or folder of item titles; empty: the titles stand beside the interactions."""
    time_unit: TimeUnit = "seconds"
    encoding: str = "utf-8"
    domain: Domain = "item"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which interactions, and how they become windows, splits and candidate sets."""

    source: str = "movielens-100k"
    """A data set name (see `rsllm fetch`), `synthetic`, or a file, folder or URI of raw data."""
    table: TableConfig = field(default_factory=TableConfig)
    """Columns of a raw file or folder in no known layout."""
    min_rating: float = 3.0
    """Interactions rated lower are dropped (LLaRA's MovieLens rule)."""
    duplicates: Literal["event", "first", "last", "keep"] = "event"
    """Of equal (user, item, time) keep one; of equal (user, item) the first or last; keep all."""
    min_user_events: int = 1
    """k-core: users with fewer interactions are dropped, and so on to a fixed point ..."""
    min_item_events: int = 0
    """... with items that have fewer; 0 keeps items that nobody interacted with."""
    window: int = 10
    """Longest history of a row, in items."""
    min_history: int = 3
    """Rows with a shorter history are dropped (LLaRA's loading rule)."""
    max_history: int = 0
    """Most recent interactions of a user that are used at all; 0 uses all."""
    split: Literal["user", "leave-one-out", "time", "given"] = "user"
    """By user, as LLaRA; each user's last two interactions; two cuts in time; the source's own."""
    train_share: float = 0.8
    """Share of users (by first interaction) or of interactions (by time) that train; the rest is
    halved."""
    cold_items: Literal["text-only", "drop"] = "text-only"
    """Held-out targets that no training row holds: kept, their slots empty; or dropped, and no
    cold item is a candidate."""
    candidates: Literal["uniform", "popularity", "full"] = "uniform"
    """How negatives are drawn: evenly, by their training interactions, or all titles at once."""
    num_candidates: int = 20
    """Size of a candidate set: the target and `num_candidates - 1` negatives."""
    num_draws: int = 1
    """Independent candidate sets per held-out row; metrics are means over them."""
    num_shards: int = 16
    """Groups of users, each prepared by one task and written to one training file."""
    max_rejected_rows: int = 0
    """Broken raw rows tolerated before `prepare` refuses."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "data", "window", "num_shards", "num_draws", "min_user_events")
        at_least(0, self, "data", "max_rejected_rows", "seed", "min_item_events", "max_history")
        require(
            1 <= self.min_history <= self.window,
            f"data.min_history is {self.min_history}; choose 1 to data.window = {self.window}",
        )
        require(
            not 0 < self.max_history <= self.min_history,
            f"data.max_history is {self.max_history}; a row needs data.min_history ="
            f" {self.min_history} interactions and a target: choose more, or 0 for all",
        )
        at_least(2, self, "data", "num_candidates")
        require(
            0 < self.train_share < 1,
            f"data.train_share is {self.train_share}; it must lie between 0 and 1",
        )
        require(
            self.candidates != "full" or self.num_draws == 1,
            f"data.num_draws is {self.num_draws}, but with data.candidates = full every draw is"
            " the same; choose 1",
        )
        require(
            self.split == "given" or not self.table.split,
            f"data.table.split is {self.table.split}, but data.split = {self.split} would not use"
            " it; set data.split=given",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedData:
    """A further data set of stage 1."""

    data: DataConfig
    weight: float = 1.0
    """Share of the samples, relative to the target domain's 1."""

    def __post_init__(self) -> None:
        positive(self, "mixture", "weight")
