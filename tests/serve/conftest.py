"""Fixtures of the endpoint: a store with models, and the app with nothing of Ray between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from recommend.small_store import make_store

from rsllm.recommend.load import open_ranker
from rsllm.recommend.ranker import Ranker
from rsllm.serve import LOOPBACK
from rsllm.serve.app import Desk, application
from rsllm.serve.arms import Arm
from rsllm.serve.guard import Guard, Limit
from rsllm.store.artifacts import Store

TOKEN = "a-token-that-is-long-enough"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def made(
    random_llm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, dict[str, str]]:
    """A store, and the names of its recommender, history and choice model."""
    return make_store(tmp_path_factory.mktemp("store"), random_llm)


@pytest.fixture(scope="session")
def ranker(made: tuple[Store, dict[str, str]]) -> Ranker:
    """A tuned model that ranks by its catalogue scorer."""
    store, names = made
    return replace(open_ranker(names["history"], store.location, "fp32")[0], by="catalogue")


@pytest.fixture(scope="session")
def choice(made: tuple[Store, dict[str, str]]) -> Ranker:
    """A tuned model that ranks what its prompts list, by the pointer."""
    store, names = made
    return replace(open_ranker(names["choice"], store.location, "fp32")[0], by="pointer")


def guarded(desk: Desk, most: int = 8) -> Any:
    """The whole app, as a replica of Ray Serve has it."""
    app = application(desk)
    app.add_middleware(Limit, most=most)
    app.add_middleware(Guard, token=TOKEN, hosts=LOOPBACK)
    return app


def plain_desk(ranker: Ranker) -> Desk:
    """One model, which answers where it is asked."""
    return Desk({"model": Arm(ranker)}, 1.0, facts={"manifest": {}, "validation": {}})


def asker(app: Any) -> Ask:
    """Asks an app as a client with the token does."""

    def ask(method: str, path: str, headers: Any = AUTHORIZED, **how: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with client(app) as own:
                return await own.request(method, path, headers=headers, **how)

        return asyncio.run(once())

    return ask


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="session")
def ask(ranker: Ranker) -> Ask:
    """Asks a server of the catalogue scorer."""
    return asker(guarded(plain_desk(ranker)))
