"""The endpoint as an application of Ray Serve: `Api` takes requests, `Model` ranks in batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram
from starlette.types import ASGIApp

from rsllm.config import Precision
from rsllm.config.checks import Share, settings
from rsllm.config.plain import from_dict
from rsllm.errors import EvaluationError, RsllmError, require
from rsllm.recommend.choose import validated
from rsllm.recommend.load import load, locate
from rsllm.recommend.ranker import Ranker
from rsllm.serve import LOOPBACK
from rsllm.serve.app import Desk, application
from rsllm.serve.arms import Arm, Late, Passed, Question, Reply, Side, answers
from rsllm.serve.guard import MOST_AT_ONCE, Guard, Limit
from rsllm.serve.tokens import read_token
from rsllm.store.artifacts import Store, manifest, read_json, write_json
from rsllm.terminal import say

BATCH = 8
"""Questions that a pass answers."""
BATCH_SECONDS = 0.005
"""How long a pass waits for others to come along; while one runs, they gather anyway."""
READY_SECONDS = 5.0
CHECK_SECONDS = 60.0
"""How often the files on disk are read again to see whether they are whole."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Of scores against the stored answer, which another machine or version may have computed."""
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
Positive = Annotated[int, Field(gt=0)]


@settings
class Endpoint:
    """What is served, and how: the `args` of `rsllm.serve.deploy:build` in a Serve config file."""

    model: str
    """The artifact, KIND/KEY."""
    ranker: str
    """What ranks, such as `catalogue`; the verb `rsllm serve` also knows `auto`."""
    why: str = "as asked"
    """How it was chosen."""
    storage: str
    """The store, as every node sees it."""
    token_file: str
    """A file with the token, on every node that takes requests."""
    against: str = ""
    """Another artifact on the same data, which serves a share of the users."""
    against_ranker: str = "recommender"
    share: Share = 0.1
    """Of the users that `against` serves."""
    precision: Precision = "auto"
    deadline_ms: Positive = 1000
    """After so long the recommender stands in for a language model."""
    queue: Positive = MOST_AT_ONCE
    """Requests at once; the next one is refused."""
    replicas: Positive = 1
    """Of each language model."""
    cpus: Positive = 1
    """Cores of each replica."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Of each replica."""
    hosts: tuple[str, ...] = LOOPBACK
    """Names under which it may be asked; none: all, as behind a proxy that looks at them."""

    @property
    def sides(self) -> dict[Side, tuple[str, str]]:
        """The artifact and the ranker of each side."""
        own: dict[Side, tuple[str, str]] = {"model": (self.model, self.ranker)}
        return own | ({"against": (self.against, self.against_ranker)} if self.against else {})

    def load(self, side: Side) -> Ranker:
        """The ranker of a side."""
        name, by = self.sides[side]
        return load(name, storage=self.storage, ranker=by, precision=self.precision)


class Model:
    """One language model in a process of its own."""

    def __init__(self, endpoint: Endpoint, side: Side) -> None:
        """Load it, and have it pass its self-test."""
        self.ranker = endpoint.load(side)
        self.idle = asyncio.Event()
        self.idle.set()
        self_test(self.ranker, Store.at(endpoint.storage), endpoint.precision)

    async def rank(self, question: Question) -> Passed:
        """Answer one question in a pass with others."""
        # Ray would make batches of one out of what comes while a pass runs.
        await self.idle.wait()
        found: Passed = await self.rank_batch(question)
        return found

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_SECONDS)  # type: ignore[untyped-decorator]
    async def rank_batch(self, questions: list[Question]) -> list[Passed]:
        """Answer several at once, beside the event loop."""
        self.idle.clear()
        start = time.monotonic()
        try:
            found = await asyncio.to_thread(answers, self.ranker, questions)
        finally:
            self.idle.set()
        seconds = time.monotonic() - start
        return [Passed(ranked, seconds, len(found)) for ranked in found]

    async def check(self) -> bool:
        """Answer at all."""
        return True


def self_test(ranker: Ranker, store: Store, precision: str) -> None:
    """Compare a ranker's answer with the one that is stored, or store its first.

    Raises:
        EvaluationError: it differs.
    """
    past = ranker.data.catalogue.representatives[: ranker.window]
    (now,) = ranker.lists([past], 10)

    def write(folder: Path) -> None:
        answer = {"items": now.items.tolist(), "scores": now.scores.tolist()}
        write_json(folder / "answer.json", answer)

    inputs = {"model": ranker.name, "ranker": ranker.by, "precision": precision}
    try:
        then = read_json(store.get("answer", inputs, write) / "answer.json")
    except OSError as error:
        say(f"rsllm: no stored answer to compare with, and none can be stored ({error.strerror})")
        return
    known = dict(zip(now.items.tolist(), now.scores.tolist(), strict=True))
    scores = np.array([known.get(item, now.scores[-1]) for item in then["items"]])
    allowed = TOLERANCE["fp32" if precision == "fp32" else "bf16"]
    if not np.allclose(scores, then["scores"], rtol=allowed, atol=allowed):
        raise EvaluationError(
            f"{ranker.name} by {ranker.by} answers otherwise than it did before: {scores.round(3)}"
            f" instead of {np.round(then['scores'], 3)}; look at its files and versions, or remove"
            f" {store.below('answer')} to accept it"
        )


@serve.ingress()
class Api:
    """Takes requests, answers by the recommenders and asks the language models."""

    def __init__(self, endpoint: Endpoint, models: Mapping[Side, DeploymentHandle]) -> None:
        """Open what is served, without reading a language model."""
        self.endpoint, self.models = endpoint, models
        self.looked, self.whole = float("-inf"), True
        tags = ("arm", "ranker", "degraded")
        self.answered = Counter("rsllm_answers", "Questions that were answered.", tags)
        about = "Seconds of an answer before and in its pass."
        self.took = Histogram("rsllm_answer_seconds", about, SECONDS, ("arm", "part"))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        endpoint = self.endpoint
        store, folder = locate(endpoint.model, endpoint.storage)
        arms = {side: Arm(endpoint.load(side)) for side in endpoint.sides}
        for side, model in self.models.items():
            arms[side].ask = partial(_ask, model)
            arms[side].replicas = endpoint.replicas
        main = arms["model"].ranker
        main.why = endpoint.why
        for arm in arms.values():
            same = arm.ranker.data.path == main.data.path
            require(same, f"{arm.ranker.name} is of other data than {main.name}; compare like ones")
        app = application(
            Desk(
                arms,
                deadline=endpoint.deadline_ms / 1000,
                share=endpoint.share,
                facts={"manifest": manifest(folder), "validation": validated(main, store)},
                is_ready=self.is_ready,
                is_whole=self.is_whole,
                note=self.note,
            )
        )
        app.add_middleware(Limit, most=endpoint.queue)
        app.add_middleware(Guard, token=read_token(Path(endpoint.token_file)), hosts=endpoint.hosts)
        return app

    async def is_ready(self) -> bool:
        """Whether a replica of every language model answers."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return all([await model.check.remote() for model in self.models.values()])
        except (TimeoutError, RayError, RayServeException):
            return False

    async def is_whole(self) -> bool:
        """Whether the artifacts on disk are as they were made."""
        if time.monotonic() - self.looked > CHECK_SECONDS:
            self.looked = time.monotonic()
            self.whole = await asyncio.to_thread(_are_whole, self.endpoint)
        return self.whole

    def note(self, side: Side, reply: Reply) -> None:
        """Count an answer; Ray's own metrics count requests, refusals and batches."""
        degraded = str(reply.degraded).lower()
        self.answered.inc(tags={"arm": side, "ranker": reply.ranker, "degraded": degraded})
        for part, seconds in (("queue", reply.queue_seconds), ("pass", reply.pass_seconds)):
            self.took.observe(seconds, tags={"arm": side, "part": part})


async def _ask(model: DeploymentHandle, question: Question) -> Passed:
    response = model.rank.remote(question)
    try:
        found: Passed = await response
    except asyncio.CancelledError:
        response.cancel()  # who does not wait any longer takes no place in a batch
        raise
    except (RayError, RayServeException) as error:
        raise Late("the language model does not answer; try again") from error
    return found


def _are_whole(endpoint: Endpoint) -> bool:
    try:
        for name, _ in endpoint.sides.values():
            manifest(locate(name, endpoint.storage)[1], verify=True)
    except RsllmError as error:
        say(f"rsllm: {error}")
        return False
    return True


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application of an `Endpoint`; Ray Serve calls it on a cluster.

    Raises:
        ConfigError: an unknown setting, or a value that cannot be.
    """
    endpoint = from_dict(Endpoint, arguments)
    rankers = {by for _, by in endpoint.sides.values()}
    require("auto" not in rankers, "name the ranker; `rsllm serve` says which one is best")
    models = {
        side: serve.deployment(
            Model,
            name="Model" if side == "model" else "Against",
            num_replicas=endpoint.replicas,
            # All of them: what waits is seen by the next pass, and can be cancelled.
            max_ongoing_requests=max(endpoint.queue, 2 * BATCH),
            ray_actor_options={"num_cpus": endpoint.cpus, "num_gpus": endpoint.gpus},
        ).bind(endpoint, side)
        for side, (_, by) in endpoint.sides.items()
        if by != "recommender"
    }
    api = serve.deployment(
        Api,
        # Far above `queue`, since what Ray refuses has no shape of ours.
        max_ongoing_requests=16 * endpoint.queue,
        max_queued_requests=16 * endpoint.queue,
        ray_actor_options={"num_cpus": 0},
    )
    return api.bind(endpoint, models)
