"""Which interactions, and how they become windows, splits and candidate sets."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rsllm.config.checks import settings
from rsllm.errors import ConfigError

Domain = Literal["movie", "game", "artist", "item"]
TimeUnit = Literal["seconds", "milliseconds", "iso8601"]


@settings
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


@settings
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
    min_user_events: PositiveInt = 1
    """k-core: users with fewer interactions are dropped, and so on to a fixed point ..."""
    min_item_events: NonNegativeInt = 0
    """... with items that have fewer; 0 keeps items that nobody interacted with."""
    window: PositiveInt = 10
    """Longest history of a row, in items."""
    min_history: int = 3
    """Rows with a shorter history are dropped (LLaRA's loading rule)."""
    max_history: NonNegativeInt = 0
    """Most recent interactions of a user that are used at all; 0 uses all."""
    split: Literal["user", "leave-one-out", "time", "given"] = "user"
    """By user, as LLaRA; each user's last two interactions, also where the source has a split;
    two cuts in time; the source's own."""
    train_share: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of users (by first interaction) or of interactions (by time) that train; the rest is
    halved."""
    cold_items: Literal["text-only", "drop"] = "text-only"
    """Held-out targets that no training row holds: kept, their slots empty; or dropped, and no
    cold item is a candidate."""
    candidates: Literal["uniform", "popularity", "full"] = "uniform"
    """How negatives are drawn: evenly, by their training interactions, or all titles at once."""
    num_candidates: Annotated[int, Field(ge=2)] = 20
    """Size of a candidate set: the target and `num_candidates - 1` negatives."""
    num_draws: PositiveInt = 1
    """Independent candidate sets per held-out row; metrics are means over them."""
    num_shards: PositiveInt = 16
    """Groups of users, each prepared by one task and written to one training file."""
    max_rejected_rows: NonNegativeInt = 0
    """Broken raw rows tolerated before `prepare` refuses."""
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        least = self.min_history
        if not 1 <= least <= self.window:
            raise ConfigError(
                f"data.min_history is {least}; choose 1 to data.window = {self.window}"
            )
        if 0 < self.max_history <= least:
            raise ConfigError(
                f"data.max_history is {self.max_history}; a row needs data.min_history = {least}"
                " interactions and a target: choose more, or 0 for all"
            )
        if self.candidates == "full" and self.num_draws > 1:
            raise ConfigError(
                f"data.num_draws is {self.num_draws}, but with data.candidates = full every draw is"
                " the same; choose 1"
            )
        if self.table.split and self.split != "given":
            raise ConfigError(
                f"data.table.split is {self.table.split}, but data.split = {self.split} would not"
                " use it; set data.split=given"
            )


@settings
class MixedData:
    """A further data set of stage 1."""

    data: DataConfig
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the target domain's 1."""
