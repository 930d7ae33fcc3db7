"""Models that answer: the language model in time, the recommender where that would be late."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from rsllm.data.sequences import Ints
from rsllm.errors import RsllmError
from rsllm.recommend.ranker import Ranked, Ranker

MEMORY = 0.2
"""What the newest pass counts in the mean time of a question."""
CAUTION = 0.8
"""The part of the deadline that is promised, since passes differ."""
Side = Literal["model", "against"]


class Late(RsllmError):
    """The language model cannot answer in time, or at all, and nobody can stand in."""


class Question(NamedTuple):
    """The k best of some items after a past."""

    past: Ints
    items: Ints
    k: int


class Reply(NamedTuple):
    """What was ranked, by what, and where the time went."""

    ranked: Ranked
    ranker: str
    degraded: bool = False
    queue_seconds: float = 0.0
    pass_seconds: float = 0.0


class Passed(NamedTuple):
    """What a language model ranked, in a pass of so many seconds and questions."""

    ranked: Ranked
    seconds: float
    questions: int


def answers(ranker: Ranker, questions: Sequence[Question]) -> list[Ranked]:
    """What a ranker says to each question, whatever else is asked with it."""
    past_Q, items_Q, k_Q = zip(*questions, strict=True)
    found = ranker.best(past_Q, items_Q, max(k_Q))
    return [Ranked._make(part[:k] for part in own) for own, k in zip(found, k_Q, strict=True)]


@dataclass(eq=False)
class Arm:
    """One side of the comparison, or all there is."""

    ranker: Ranker
    ask: Callable[[Question], Awaitable[Passed]] | None = None
    """A language model elsewhere. Without one the ranker answers here."""
    replicas: int = 1
    """Of the language model."""
    waiting: int = 0
    question_seconds: float = 0.0
    """What a question adds to a pass, the mean of late: the more that share one, the less."""

    @cached_property
    def fallback(self) -> Ranker | None:
        """The recommender alone."""
        return replace(self.ranker, by="recommender") if self.ranker.recommender else None

    async def answer(self, question: Question, deadline: float) -> Reply:
        """Rank by the language model within `deadline` seconds, or else by the recommender.

        Raises:
            Late: neither can.
        """
        if self.ask is None:
            return await self._here(self.ranker, question)
        before = self.waiting / self.replicas
        if before and self.question_seconds * (before + 1) > CAUTION * deadline:
            return await self._stand_in(question)
        start = time.monotonic()
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline):
                passed = await self.ask(question)
        except TimeoutError:
            self._learn(max(self.question_seconds, deadline / (before + 1)))
            return await self._stand_in(question, time.monotonic() - start)
        except Late:
            return await self._stand_in(question, time.monotonic() - start)
        finally:
            self.waiting -= 1
        queue = max(0.0, time.monotonic() - start - passed.seconds)
        self._learn(passed.seconds / passed.questions)
        return Reply(passed.ranked, self.ranker.by, False, queue, passed.seconds)

    def _learn(self, seconds: float) -> None:
        """Take a question's share of a pass into the mean."""
        newest = MEMORY if self.question_seconds else 1.0
        self.question_seconds += newest * (seconds - self.question_seconds)

    async def _stand_in(self, question: Question, waited: float = 0.0) -> Reply:
        if self.fallback is None:
            raise Late(f"{self.ranker.name} cannot answer in time, and has no recommender")
        reply = await self._here(self.fallback, question)
        return reply._replace(degraded=True, queue_seconds=waited)

    async def _here(self, ranker: Ranker, question: Question) -> Reply:
        start = time.monotonic()
        (ranked,) = await asyncio.to_thread(answers, ranker, [question])
        return Reply(ranked, ranker.by, pass_seconds=time.monotonic() - start)


def side_of(user: str, names: tuple[str, str], share: float) -> Side:
    """Which side serves a user; always the same one as long as the two models stay."""
    digest = hashlib.sha256("\0".join((*names, user)).encode()).digest()
    return "against" if int.from_bytes(digest[:8]) < share * 2**64 else "model"
