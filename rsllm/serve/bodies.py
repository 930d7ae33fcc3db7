"""What the endpoint is asked and what it answers, as `/openapi.json` describes it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints
from starlette.responses import Response

LONGEST = 1000
"""Characters of a title or an id; no body may be above `guard.MOST_BYTES` anyway."""
Name = Annotated[str, StringConstraints(strict=True, max_length=LONGEST)] | StrictInt
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
TITLES = ["Titanic (1997)", "City of Angels (1998)"]


class Asked(BaseModel):
    """What every question has."""

    model_config = STRICT
    history: list[Name] = Field(
        min_length=1, description="Titles or ids, the oldest first.", examples=[TITLES]
    )
    user: str = Field(
        "", max_length=LONGEST, description="Your name of the user: who is served by --against."
    )
    unknown: Literal["refuse", "skip"] = Field(
        "refuse", description="What is done about items that the data do not have."
    )


class Recommend(Asked):
    """For whom to recommend what."""

    k: int = Field(10, ge=1, description="At most so many items.", examples=[5])
    include_seen: bool = Field(False, description="Whether items of the history may come again.")
    only: list[Name] | None = Field(None, description="The items to choose from; null for all.")
    never: list[Name] = Field([], description="Items that are left out.")


class Rank(Asked):
    """What to put into order for whom."""

    candidates: list[Name] = Field(min_length=1, examples=[["Ghost (1990)", "Alien (1979)"]])


class Found(BaseModel):
    """An item that was looked for."""

    rank: int
    item_id: str
    title: str


class Neighbour(Found):
    """An item and how well it fits."""

    score: float


class Item(Neighbour):
    """An item of an answer."""

    source: Literal["interactions", "title"] = Field(
        description="`title` for an item that no training row holds."
    )


class Took(BaseModel):
    """Where the time went."""

    queue: float
    rank: float


class Answer(BaseModel):
    """Items, best first, and who ranked them."""

    items: list[Item]
    ranker: str = Field(description="What ranked: the recommender, or the language model by what.")
    model: str = Field(description="The artifact.")
    arm: Literal["model", "against"] = Field(description="The side of the comparison.")
    degraded: bool = Field(
        description="Whether the recommender stood in, as the language model would have been late."
    )
    truncated: bool = Field(description="Whether the history has older items than were read.")
    skipped: list[str | int] = Field(description="Items that the data do not have.")
    took_ms: Took


class Neighbours(BaseModel):
    """Items like one."""

    items: list[Neighbour]


class Matches(BaseModel):
    """Items of a title."""

    items: list[Found]


class Model(BaseModel):
    """What is served, and how good it was."""

    model: str
    ranker: str
    why: str = Field(description="How the ranker was chosen.")
    items: int
    window: int = Field(description="How many of a history's newest items are read.")
    manifest: dict[str, Any]
    validation: dict[str, Any] = Field(
        description="Of every ranker by the task as deployed, with intervals; {} if unmeasured."
    )


class State(BaseModel):
    """How it is."""

    status: Literal["ok"] = "ok"


class Ready(State):
    """How it is, and how what it would start from again is."""

    artifact: Literal["whole", "damaged"] = Field(
        description="The files; what is served lies in memory."
    )


class Fault(BaseModel):
    """What went wrong."""

    code: str
    message: str
    details: list[str] = []


class Problem(BaseModel):
    """The one shape of all refusals."""

    error: Fault


def problem(
    status: int, code: str, message: str, *, details: tuple[str, ...] = (), retry: int = 0
) -> Response:
    """A refusal; `retry` is in how many seconds another try makes sense."""
    fault = Fault(code=code, message=message, details=list(details))
    headers = {"Retry-After": str(retry)} if retry else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    text = json.dumps(Problem(error=fault).model_dump())  # ASCII, so that no text can break it
    return Response(text, status, headers, "application/json")
