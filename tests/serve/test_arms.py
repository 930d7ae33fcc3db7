"""When the recommender stands in for a language model, and what is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from serve.conftest import asker, guarded, plain_desk
from small_data import TITLES

from rsllm.recommend.ranker import Ranker
from rsllm.serve.arms import Arm, Late, Passed, Question, answers

PAST = np.array([4, 9], np.int32)


def question(ranker: Ranker) -> Question:
    return Question(PAST, ranker.open_items(PAST), 5)


def recommended(ranker: Ranker) -> list[int]:
    return replace(ranker, by="recommender").lists([PAST], 5)[0].items.tolist()


def arm_of(ranker: Ranker, seconds: float, questions: int = 1) -> Arm:
    """Two language models elsewhere that answer, and say how long a pass took of how many."""

    async def ask(asked: Question) -> Passed:
        return Passed(answers(ranker, [asked])[0], seconds, questions)

    return Arm(ranker, ask, replicas=2)


async def never(_: Question) -> Passed:
    await asyncio.Event().wait()
    raise AssertionError


async def dead(_: Question) -> Passed:
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
    [(0, 0.1, True), (2, 4.9, False), (2, 5.1, True), (6, 9.9, False), (6, 10.1, True)],
)
def test_it_is_not_asked_where_the_queue_is_too_long(
    ranker: Ranker, waiting: int, deadline: float, asked: bool
) -> None:
    """Two seconds a question: after six, three to each model, eight, of which ten are promised."""
    arm = arm_of(ranker, 2.0)
    arm.waiting, arm.question_seconds = waiting, 2.0
    reply = asyncio.run(arm.answer(question(ranker), deadline))
    assert reply.degraded != asked
    assert arm.waiting == waiting


def test_it_learns_what_a_question_takes(ranker: Ranker) -> None:
    """From passes that several share, the newest most, and from those that came too late."""
    arm = arm_of(ranker, 4.0, questions=4)
    asyncio.run(arm.answer(question(ranker), 60.0))
    assert arm.question_seconds == 1.0
    arm.ask = arm_of(ranker, 4.0, questions=2).ask
    for _ in range(3):
        asyncio.run(arm.answer(question(ranker), 60.0))
    assert arm.question_seconds == pytest.approx(2.0 - 0.8**3)
    arm.ask, arm.question_seconds, arm.waiting = never, 0.001, 6
    asyncio.run(arm.answer(question(ranker), 0.04))
    assert arm.question_seconds == pytest.approx(0.8 * 0.001 + 0.2 * 0.04 / 4)


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
