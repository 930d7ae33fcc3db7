"""Which interactions, and how they become windows, splits and candidate sets."""

import json
import shlex
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rsllm.config.checks import settings
from rsllm.errors import ConfigError

Domain = Literal["movie", "game", "artist", "item"]
SplitRule = Literal["user", "leave-one-out", "time", "given"]
AUTO = "auto"
"""Value of a setting that is found in the files, and printed as the setting that would say it."""
TABS = ("tab", "\\t")
"""Names that a command line may give a tab."""
Mark = Annotated[str, Field(pattern="^(auto|none|[ -~])$")]
TimeUnit = Annotated[
    str, Field(pattern="^(auto|seconds|milliseconds|microseconds|nanoseconds|iso8601|.*%.*)$")
]


@settings
class TableConfig:
    """How a table is read that no known layout describes; what is `auto` is found in its files.

    Known layouts have columns of their own and obey the rest.
    """

    user: str = AUTO
    """Name of a column, as those that follow; looked for under the usual names."""
    item: str = AUTO
    time: str = AUTO
    rating: str = ""
    """Empty: interactions carry no rating, and `data.min_rating` is not applied."""
    title: str = AUTO
    text: tuple[str, ...] = ()
    """Columns whose words follow the title in parentheses, such as genres."""
    split: str = ""
    """Column that says train, validation or test, the same for all rows of a user."""
    items: str = ""
    """File or folder of item titles; empty: the files of a folder that name no user, or else the
    titles stand beside the interactions."""
    item_id: str = AUTO
    """Column of that table which `item` refers to."""
    header: tuple[str, ...] = ()
    """Names of the columns where the first line is data already."""
    separator: Annotated[str, Field(min_length=1, max_length=4)] = AUTO
    """Up to four characters, or `tab`."""
    quote: Mark = AUTO
    """A character around fields that may hold separators and line breaks; `none`: just text."""
    escape: Mark = AUTO
    """A character before quotes that are text; `none`: they are doubled."""
    encoding: str = AUTO
    time_unit: TimeUnit = AUTO
    """seconds, milliseconds, microseconds or nanoseconds since 1970, iso8601, or a format of dates
    such as %d/%m/%Y; without a zone they are UTC."""
    missing: tuple[str, ...] = ("nan", "NaN", "null", "NULL", "None", "\\N")
    """What, beside an empty field, is no id."""
    fold_ids: bool = True
    """Whether the ids 1.0 and 1 are one, as they are once an empty field made floats of them."""
    years: Literal["auto", "strip", "keep"] = "auto"
    """A year in parentheses after a title; `auto` strips it off films."""
    move_articles: bool = True
    """Whether "Matrix, The" is shown as "The Matrix"."""
    unescape: bool = False
    """Whether titles are HTML, in which `&amp;` is an ampersand."""
    domain: Domain = "item"

    def __post_init__(self) -> None:
        try:
            "".encode("utf-8" if self.encoding == AUTO else self.encoding)
        except (LookupError, ValueError):
            raise ConfigError(
                f"data.table.encoding is {self.encoding!r}, which is no encoding of text; use one"
                " such as utf-8, cp1252 or utf-16, or auto"
            ) from None


def table_flag(name: str, value: str) -> str:
    """The flag of the command line that gives a setting of `data.table` a value."""
    value = json.dumps(value) if value.isdigit() else value  # which JSON would make a number
    return f"--set {shlex.quote(f'data.table.{name}={value}')}"


@settings
class DataConfig:
    """Which interactions, and how they become windows, splits and candidate sets."""

    source: str = "movielens-100k"
    """A data set name (see `rsllm fetch`), `synthetic`, or a file, folder or URI of raw data."""
    layout: str = ""
    """File (TOML) that describes the raw files; empty: a known layout, or `table`."""
    table: TableConfig = field(default_factory=TableConfig)
    """How a raw file or folder in no known layout is read."""
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
    split: SplitRule | Literal["auto"] = "auto"
    """By user, as LLaRA; each user's last two interactions, also where the source has a split;
    two cuts in time; the source's own. `auto` takes that if there is one, splits MovieLens and the
    other data sets known by name by user, and holds out of every user in any other table."""
    train_share: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of users (by first interaction) or of interactions (by time) that train; the rest is
    halved."""
    cold_items: Literal["text-only", "drop"] = "text-only"
    """Held-out targets that no training row holds: kept, their slots empty; or dropped, and no
    cold item is a candidate."""
    candidates: Literal["uniform", "popularity", "full", "recommender"] = "uniform"
    """How negatives are drawn: evenly, by their training interactions, or all titles at once; or
    those that `recommender`, fitted on the same rows, ranks highest: what a re-ranker is for."""
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
        if self.candidates in ("full", "recommender") and self.num_draws > 1:
            raise ConfigError(
                f"data.num_draws is {self.num_draws}, but with data.candidates = {self.candidates}"
                " every draw is the same; choose 1"
            )
        if self.table.split and self.split not in ("auto", "given"):
            raise ConfigError(
                f"data.table.split is {self.table.split}, but data.split = {self.split} would not"
                " use it; set data.split=given"
            )


_UNREAD = {
    "user": "user_id",
    "item": "item_id",
    "time": "timestamp",
    "rating": "",
    "title": "title",
    "text": [],
    "split": "",
    "items": "",
    "time_unit": "seconds",
    "encoding": "utf-8",
    "domain": "item",
}
"""The table as keys of known data sets, which do not read it, have it."""


def plain_of_known(config: DataConfig) -> dict[str, Any]:
    """The plain data in the key of a known data set, whatever settings it does not read."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    if config.table == TableConfig():
        plain["table"] = _UNREAD
    if not config.layout:
        del plain["layout"]
    return plain | ({"split": "user"} if config.split == "auto" else {})


@settings
class MixedData:
    """A further data set of stage 1."""

    data: DataConfig
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the target domain's 1."""

    def __post_init__(self) -> None:
        if self.data.candidates == "recommender":
            raise ConfigError(
                f"data.candidates of {self.data.source} in the mixture is recommender, but none is"
                " fitted on it; choose uniform or popularity"
            )
