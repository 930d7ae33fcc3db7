"""When the recommender stands in for a language model, and what is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from serve.conftest import asker, guarded, plain_desk
from small_data import TITLES

from rsllm.recommend.ranker import Ranked, Ranker
from rsllm.serve.arms import Arm, Late, Question, answers

PAST = np.array([4, 9], np.int32)


def question(ranker: Ranker) -> Question:
    return Question(PAST, ranker.open_items(PAST), 5)


def recommended(ranker: Ranker) -> list[int]:
    return replace(ranker, by="recommender").lists([PAST], 5)[0].items.tolist()


def arm_of(ranker: Ranker, seconds: float) -> Arm:
    """A language model elsewhere that answers, and says that its passes take so long."""

    async def ask(asked: Question) -> tuple[Ranked, float]:
        return answers(ranker, [asked])[0], seconds

    return Arm(ranker, ask, at_once=4)


async def never(_: Question) -> tuple[Ranked, float]:
    await asyncio.Event().wait()
    raise AssertionError


async def dead(_: Question) -> tuple[Ranked, float]:
    raise Late("it died")


def test_in_time_the_language_model_answers(ranker: Ranker) -> None:
    reply = asyncio.run(arm_of(ranker, 0.5).answer(question(ranker), 60.0))
    assert (reply.ranker, reply.degraded, reply.pass_seconds) == ("catalogue", False, 0.5)
    assert reply.ranked.items.tolist() == ranker.lists([PAST], 5)[0].items.tolist()


@pytest.mark.parametrize(("ask", "deadline"), [(never, 0.01), (dead, 60.0)])
def test_where_it_is_late_or_dead_the_recommender_answers(
    ranker: Ranker, ask: Any, deadline: float
) -> None:
    arm = Arm(ranker, ask)
    reply = asyncio.run(arm.answer(question(ranker), deadline))
    assert (reply.ranker, reply.degraded) == ("recommender", True)
    assert reply.ranked.items.tolist() == recommended(ranker)
    assert arm.waiting == 0


@pytest.mark.parametrize(
    ("waiting", "deadline", "asked"),
    [(0, 1.0, True), (4, 3.9, False), (4, 4.1, True), (6, 4.9, False), (6, 5.1, True)],
)
def test_it_is_not_asked_where_the_queue_is_too_long(
    ranker: Ranker, waiting: int, deadline: float, asked: bool
) -> None:
    """A pass takes two seconds and answers four: whoever finds six waits two passes and a half."""
    arm = arm_of(ranker, 2.0)
    arm.waiting, arm.pass_seconds = waiting, 2.0
    reply = asyncio.run(arm.answer(question(ranker), deadline))
    assert reply.degraded != asked
    assert arm.waiting == waiting


def test_the_mean_pass_follows_the_newest_ones(ranker: Ranker) -> None:
    arm = arm_of(ranker, 1.0)
    asyncio.run(arm.answer(question(ranker), 60.0))
    assert arm.pass_seconds == 1.0
    arm.ask = arm_of(ranker, 2.0).ask
    for _ in range(30):
        asyncio.run(arm.answer(question(ranker), 60.0))
    assert arm.pass_seconds == pytest.approx(2.0 - 0.8**30)


def test_without_a_recommender_it_says_that_it_is_late(ranker: Ranker) -> None:
    alone = replace(ranker, recommender=None)
    with pytest.raises(Late, match="has no recommender"):
        asyncio.run(Arm(alone, dead).answer(question(ranker), 60.0))
    desk = plain_desk(alone)
    desk.arms["model"].ask = dead
    found = asker(guarded(desk))("POST", "/v1/recommend", json={"history": [TITLES[4]]})
    assert found.status_code == 503
    assert found.headers["Retry-After"] == "1"
    assert found.json()["error"]["code"] == "late"


def test_the_answer_says_that_it_is_degraded_and_is_counted(ranker: Ranker) -> None:
    counted: list[Any] = []
    desk = plain_desk(ranker)
    desk.arms["model"].ask, desk.note = dead, lambda *facts: counted.append(facts)
    found = asker(guarded(desk))("POST", "/v1/recommend", json={"history": [TITLES[4]], "k": 3})
    answer = found.json()
    assert (answer["degraded"], answer["ranker"]) == (True, "recommender")
    table = replace(ranker, by="recommender").recommend([TITLES[4]], k=3)
    assert [item["title"] for item in answer["items"]] == table["title"].tolist()
    ((side, reply),) = counted
    assert (side, reply.degraded) == ("model", True)
