"""The routes of the endpoint, without Ray: who ranks is given to `application`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rsllm import __version__
from rsllm.data.sequences import Ints
from rsllm.errors import ConfigError, require
from rsllm.recommend.items import UnknownItem
from rsllm.recommend.ranker import Filter, Ranked, Ranker
from rsllm.serve.arms import Arm, Late, Question, Reply, Side, side_of
from rsllm.serve.bodies import (
    Answer,
    Asked,
    Found,
    Item,
    Matches,
    Model,
    Name,
    Neighbour,
    Neighbours,
    Problem,
    Rank,
    Ready,
    Recommend,
    State,
    Took,
    problem,
)

MOST_ERRORS, MOST_CHARACTERS = 5, 200
"""What a refusal tells at most of what is wrong with a body."""
CODES = {400: "invalid", 404: "not_found", 405: "no_such_method", 503: "not_ready"}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "No JSON."},
    401: {"description": "No token, or a wrong one."},
    403: {"description": "A foreign Host or Origin."},
    404: {"description": "There is no such item, or page."},
    408: {"description": "The body did not come."},
    413: {"description": "The body is too large."},
    422: {"description": "Something in the body cannot be, or is unknown."},
    429: {"description": "Too much at once; Retry-After says when to try again."},
    503: {"description": "No answer came in time, and nobody stands in."},
}
K = Annotated[int, Query(ge=1, le=100, description="At most so many items.")]


async def _always() -> bool:
    return True


@dataclass(eq=False)
class Desk:
    """What the routes need to know."""

    arms: dict[Side, Arm]
    """`model`, and perhaps `against`."""
    deadline: float
    """Seconds until the recommender stands in for a language model."""
    share: float = 0.0
    """Of the users that `against` serves."""
    facts: dict[str, Any] = field(default_factory=dict)
    """`manifest` and `validation` of the model."""
    is_ready: Callable[[], Awaitable[bool]] = _always
    """Whether all language models answer."""
    is_whole: Callable[[], Awaitable[bool]] = _always
    """Whether the artifacts on disk are undamaged."""
    note: Callable[[Side, Reply], None] = lambda side, reply: None
    """Counts an answer."""

    @property
    def main(self) -> Ranker:
        return self.arms["model"].ranker

    def arm(self, user: str) -> Side:
        """The side that serves a user; nobody in particular is served by the model."""
        if not user or "against" not in self.arms:
            return "model"
        return side_of(user, (self.main.name, self.arms["against"].ranker.name), self.share)

    async def answer(self, body: Asked, question: Question, skipped: Sequence[str | int]) -> Answer:
        """Have a question answered on the user's side."""
        side = self.arm(body.user)
        arm = self.arms[side]
        reply = await arm.answer(question, self.deadline)
        self.note(side, reply)
        return Answer(
            items=listed(arm.ranker, reply.ranked),
            ranker=reply.ranker,
            model=arm.ranker.name,
            arm=side,
            degraded=reply.degraded,
            truncated=len(question.past) > arm.ranker.window,
            skipped=[*skipped],
            took_ms=Took(queue=1000 * reply.queue_seconds, rank=1000 * reply.pass_seconds),
        )

    async def find(self, names: Sequence[Name], body: Asked, skipped: list[str | int]) -> Ints:
        """The items of names; those that the data do not have are put to `skipped`, or refused."""
        items = self.main.items
        found = [items.known(name) for name in names]
        missing = [name for name, item in zip(names, found, strict=True) if item is None]
        if missing and body.unknown == "refuse":
            await asyncio.to_thread(items.find, missing[0])  # refuses it, with the nearest titles
        skipped += missing
        return np.array([item for item in found if item is not None], np.int32)

    def most(self, items: int) -> int:
        """How many items can be ranked: all, or as many as a choice prompt lists."""
        asked = [a.ranker.language for a in self.arms.values() if a.ranker.by != "recommender"]
        return min([items, *(own.num_candidates for own in asked if own and own.num_candidates)])


def listed(ranker: Ranker, ranked: Ranked) -> list[Item]:
    """A list as the body of an answer; `Ranker.table` says the same and takes ten times as long."""
    ids, titles = ranker.data.source_ids, ranker.data.titles
    trained = ranker.data.catalogue.counts_I[ranked.items] > 0
    places = zip(ranked.items.tolist(), ranked.scores.tolist(), trained.tolist(), strict=True)
    return [
        Item(
            rank=rank,
            item_id=ids[item],
            title=titles[item],
            score=score,
            source="interactions" if seen else "title",
        )
        for rank, (item, score, seen) in enumerate(places, 1)
    ]


def application(desk: Desk) -> FastAPI:
    """The routes as an ASGI app; `rsllm.serve.guard` belongs before it."""
    app = FastAPIOffline(
        title="rsllm",
        version=__version__,
        description="Recommendations of a trained model.",
        redoc_url=None,
        responses={status: told | {"model": Problem} for status, told in REFUSALS.items()},
        strict_content_type=False,  # as curl -d sends it; pages elsewhere are kept out by the guard
    )
    _add_questions(app, desk)
    _add_facts(app, desk)
    _add_refusals(app)
    for route in app.routes:
        if isinstance(route, APIRoute):  # so that /docs lists sentences, not names of functions
            route.summary, route.description = route.description, ""
    return app


def _add_questions(app: FastAPI, desk: Desk) -> None:
    token = HTTPBearer(auto_error=False, description="The token of the endpoint.")
    ask: Any = {"dependencies": [Depends(token)], "tags": ["questions"]}

    @app.post("/v1/recommend", **ask)
    async def recommend(body: Recommend) -> Answer:
        """The best items after a history, of those that are not in it."""
        skipped: list[str | int] = []
        past = await desk.find(body.history, body, skipped)
        require(len(past) > 0, "none of the history's items is known; give at least one that is")
        only = None if body.only is None else await desk.find(body.only, body, skipped)
        allowed = Filter(body.include_seen, only, await desk.find(body.never, body, skipped))
        most = desk.most(len(desk.main.data.catalogue.representatives))
        require(body.k <= most, f"k is {body.k}; at most {most} items can be ranked")
        question = Question(past, desk.main.open_items(past, allowed), body.k)
        return await desk.answer(body, question, skipped)

    @app.post("/v1/rank", **ask)
    async def rank(body: Rank) -> Answer:
        """Your candidates after a history, best first."""
        skipped: list[str | int] = []
        past = await desk.find(body.history, body, skipped)
        items = await desk.find(body.candidates, body, skipped)
        require(len(past) > 0, "none of the history's items is known; give at least one that is")
        require(len(items) > 0, "none of the candidates is known; give at least one that is")
        once = len(np.unique(items)) == len(items)
        require(once, "a candidate is given twice; name each item once")
        most = desk.most(len(items))
        require(
            len(items) <= most, f"{len(items)} candidates; at most {most} can be ranked at once"
        )
        return await desk.answer(body, Question(past, items, len(items)), skipped)

    @app.get("/v1/similar/{item_id}", **ask)
    async def similar(item_id: str, k: K = 10) -> Neighbours:
        """The items most like one, by the cosine of their vectors."""
        if desk.main.items.known(item_id) is None:
            raise HTTPException(404, "there is no such item; /v1/items?title= finds it")
        table = await asyncio.to_thread(desk.main.similar, item_id, k)
        return Neighbours(items=[Neighbour.model_validate(row) for row in table.to_dict("records")])

    @app.get("/v1/items", **ask)
    async def items(
        title: Annotated[str, Query(min_length=1, max_length=MOST_CHARACTERS)], k: K = 10
    ) -> Matches:
        """Items whose titles contain a text, or else are written most like it."""
        found = await asyncio.to_thread(desk.main.items.search, title, k)
        ids, titles = desk.main.data.source_ids, desk.main.data.titles
        places = enumerate(found, 1)
        return Matches(items=[Found(rank=r, item_id=ids[i], title=titles[i]) for r, i in places])

    @app.get("/v1/model", **ask)
    async def model() -> Model:
        """What is served, what made it, and how good it was on validation users."""
        main = desk.main
        known = {"model": main.name, "ranker": main.by, "why": main.why, "window": main.window}
        return Model.model_validate(known | {"items": len(main.data.titles)} | desk.facts)


def _add_facts(app: FastAPI, desk: Desk) -> None:
    @app.get("/healthz", tags=["state"])
    async def healthz() -> State:
        """Whether it lives."""
        return State()

    @app.get("/readyz", tags=["state"])
    async def readyz() -> Ready:
        """Whether every model has passed its self-test and answers."""
        if not await desk.is_ready():
            raise HTTPException(503, "a model does not answer, or not yet")
        return Ready(artifact="whole" if await desk.is_whole() else "damaged")


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        """Say where and why, and repeat nothing that was sent but names of fields."""
        details = tuple(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}"[:MOST_CHARACTERS]
            for e in error.errors()[:MOST_ERRORS]
        )
        return problem(422, "invalid", "the request cannot be read", details=details)

    @app.exception_handler(ConfigError)
    async def refused(_: Request, error: ConfigError) -> Response:
        code = "unknown_item" if isinstance(error, UnknownItem) else "invalid"
        return problem(422, code, str(error))

    @app.exception_handler(Late)
    async def late(_: Request, error: Late) -> Response:
        return problem(503, "late", str(error), retry=1)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, CODES.get(error.status_code, "failed"), error.detail)
