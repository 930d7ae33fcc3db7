"""Who is let in: tokens, hosts, sizes and numbers, asked as a stranger would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray._common.utils import import_attr
from ray.serve._private.http_util import validate_http_proxy_callback_return
from serve.conftest import AUTHORIZED, TOKEN, client
from starlette.responses import PlainTextResponse

from rsllm.errors import ConfigError
from rsllm.serve import LOOPBACK, guard
from rsllm.serve.guard import MOST_BYTES, Guard, Limit, at_the_door
from rsllm.serve.serve import AT_START
from rsllm.serve.tokens import make_token, read_token

PATH = "/v1/recommend"


class Echo:
    """An app that answers with the length of the body, once it is told to."""

    def __init__(self) -> None:
        self.read, self.go = 0, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.read += 1
        await self.go.wait()
        body = (await receive())["body"]
        await PlainTextResponse(str(len(body)))(scope, receive, send)


def with_echo(
    run: Callable[[Echo, Any], Awaitable[None]], most: int = 8, hosts: Any = LOOPBACK
) -> None:
    async def whole() -> None:
        echo = Echo()
        async with client(Guard(Limit(echo, most), TOKEN, hosts)) as own:
            await run(echo, own)

    asyncio.run(whole())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer "},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_without_the_token_no_body_is_read(given: Any) -> None:
    async def run(echo: Echo, own: Any) -> None:
        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("it was read")
            yield b""

        answer = await own.post(PATH, content=body(), headers=given)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert echo.read == 0

    with_echo(run)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 200),
        ({"Host": "127.0.0.1@evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_from_elsewhere_are_kept_out(given: Any, status: int) -> None:
    async def run(echo: Echo, own: Any) -> None:
        echo.go.set()
        for path in (PATH, "/healthz"):
            assert (await own.get(path, headers=AUTHORIZED | given)).status_code == status

    with_echo(run)


@pytest.mark.parametrize("path", [PATH, "/healthz", "/readyz", "/docs"])
def test_a_request_whose_replica_died_is_told_to_come_again(path: str) -> None:
    """Ray's proxy returns without an answer there, of which its server would make a bare 500."""

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def run() -> None:
        limit = Limit(silent)
        async with client(limit) as own:
            answer = await own.post(path, content=b"{}")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["error"]["code"] == "lost"
        assert limit.inside == 0

    asyncio.run(run())


def test_who_watches_is_answered_where_others_are_too_many() -> None:
    async def run() -> None:
        echo = Echo()
        limit = Limit(echo, most=1)
        async with client(limit) as own:
            first = asyncio.create_task(own.post(PATH, content=b"{}"))
            while not echo.read:
                await asyncio.sleep(0)
            assert (await own.post(PATH, content=b"{}")).status_code == 429
            probe = asyncio.create_task(own.get("/healthz"))
            echo.go.set()
            assert [(await each).status_code for each in (first, probe)] == [200, 200]
        assert limit.inside == 0

    asyncio.run(run())


def test_behind_a_proxy_any_name_is_taken() -> None:
    async def run(echo: Echo, own: Any) -> None:
        echo.go.set()
        given = {"Host": "rank.example", "Origin": "https://shop.example"}
        assert (await own.get(PATH, headers=AUTHORIZED | given)).status_code == 200

    with_echo(run, hosts=())


def test_a_body_passes_whole_or_not_at_all() -> None:
    async def run(echo: Echo, own: Any) -> None:
        echo.go.set()
        for size, status in ((0, 200), (MOST_BYTES, 200), (MOST_BYTES + 1, 413)):
            answer = await own.post(PATH, content=b"x" * size, headers=AUTHORIZED)
            assert answer.status_code == status
            assert status == 413 or answer.text == str(size)

    with_echo(run)


def test_what_comes_in_chunks_is_counted_and_then_not_read_on() -> None:
    async def run(echo: Echo, own: Any) -> None:
        sent = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(1000):
                sent += 1
                yield b"x" * 1024

        answer = await own.post(PATH, content=body(), headers=AUTHORIZED)
        assert answer.status_code == 413
        assert sent == 65
        assert echo.read == 0

    with_echo(run)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)

    async def run(echo: Echo, own: Any) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.Event().wait()

        answer = await own.post(PATH, content=body(), headers=AUTHORIZED)
        assert answer.status_code == 408
        assert echo.read == 0

    with_echo(run)


def test_one_too_many_is_refused_until_there_is_room() -> None:
    async def run(echo: Echo, own: Any) -> None:
        inside = [asyncio.create_task(own.post(PATH, headers=AUTHORIZED)) for _ in range(2)]
        while echo.read < 2:
            await asyncio.sleep(0)
        refused = await own.post(PATH, headers=AUTHORIZED)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["code"] == "busy"
        echo.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*inside)] == [200, 200]
        assert (await own.post(PATH, headers=AUTHORIZED)).status_code == 200

    with_echo(run, most=2)


def test_ray_puts_the_same_limit_before_its_proxy() -> None:
    """By the name that its processes are given."""
    path = AT_START["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    assert import_attr(path) is at_the_door
    (middleware,) = validate_http_proxy_callback_return(at_the_door())
    assert middleware.cls is Limit


def test_a_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "token"
    token = make_token(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_token(file) == token
    assert token != make_token(tmp_path / "other")
    with pytest.raises(FileExistsError):
        make_token(file)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="others can read the token"):
        read_token(file)
    with pytest.raises(ConfigError, match="no token file"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["", "short", "a" * 19, "a token with\na second line", "t" * 20 + "\u00e9"]
)
def test_a_token_that_is_no_secret_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(text)
    with pytest.raises(ConfigError, match="20 ASCII characters or more"):
        read_token(file)
