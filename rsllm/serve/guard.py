"""Who may ask, how much, and how many at once: the first that sees a request.

Ray's own token does not cover what Ray Serve listens to, and FastAPI bounds no body.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from ray.util.metrics import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rsllm.serve.bodies import problem

MOST_BYTES = 64 << 10
MOST_AT_ONCE = 64
BODY_SECONDS = 10.0
"""What a body may take to come; who sends a byte a minute holds no place."""
OPEN, ASSETS = ("/healthz", "/readyz", "/docs", "/openapi.json"), "/static-offline-docs/"
"""What probes and browsers see without a token; it says nothing of data or models."""


class Guard:
    """Refuses strangers, foreign pages and large bodies; lets the others through."""

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str]) -> None:
        """Stand before an app.

        Args:
            app: what is guarded.
            token: what `Authorization: Bearer` has to name.
            hosts: names under which the endpoint may be asked; none: all.
        """
        self.app, self.hosts = app, hosts
        self.digest = hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal, body = self._stranger(scope, headers), b""
        if refusal is None:
            try:
                body = await _body(headers, receive)
            except ClientDisconnect:
                return
            except TimeoutError:
                refusal = problem(408, "slow_body", f"no body in {BODY_SECONDS:.0f} seconds")
            except OverflowError:
                refusal = problem(413, "too_large", f"a body may have {MOST_BYTES} bytes")
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        # Every body is JSON, whatever curl -d calls it; what pages send is out already.
        MutableHeaders(scope=scope)["content-type"] = "application/json"
        await self._answer(body, scope, receive, send)

    def _stranger(self, scope: Scope, headers: Headers) -> Response | None:
        if self.hosts:  # a page that was made to mean loopback by its own name server, or any page
            named = [f"//{headers.get('host', '')}", *headers.getlist("origin")]
            if any(_host(url) not in self.hosts for url in named):
                return problem(403, "foreign_host", "Host or Origin is not of this machine")
        if scope["path"] in OPEN or scope["path"].startswith(ASSETS):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        if scheme.lower() == "bearer" and hmac.compare_digest(digest, self.digest):
            return None
        return problem(401, "no_token", "say Authorization: Bearer TOKEN, as in the token file")

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        unread, watched = [body], Watched(send)

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        try:
            await self.app(scope, replay, watched)
        except Exception:
            logging.getLogger("ray.serve").exception("%s failed", scope["path"])
            if watched.started:
                raise
            await problem(500, "failed", "our fault; the log says more")(scope, receive, send)


class Watched:
    """Sends an answer, and knows whether it has begun to."""

    def __init__(self, send: Send) -> None:
        self.send, self.started = send, False

    async def __call__(self, message: Message) -> None:
        self.started = True
        await self.send(message)


class Limit:
    """Refuses what comes while so many requests are answered; answers where Ray cannot."""

    def __init__(
        self, app: ASGIApp, most: int = MOST_AT_ONCE, note: Callable[[], None] = lambda: None
    ) -> None:
        """Stand before an app; `note` counts what is refused."""
        self.app, self.most, self.note, self.inside = app, most, note, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it; what watches the endpoint is never refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counts = scope["path"] not in OPEN
        if counts and self.inside >= self.most:
            self.note()
            busy = problem(429, "busy", "too many requests at once; try again", retry=1)
            await busy(scope, receive, send)
            return
        self.inside, watched = self.inside + counts, Watched(send)
        try:
            await self.app(scope, receive, watched)
        finally:
            self.inside -= counts
        if not watched.started:  # Ray's proxy is silent where the replica died under a request
            lost = problem(503, "lost", "no answer came; try again", retry=1)
            await lost(scope, receive, send)


def at_the_door() -> list[Middleware]:
    """The same limit in Ray's proxy, where a refusal costs no way to the replica and back."""
    about = "Requests that were one too many."
    return [Middleware(Limit, note=Counter("rsllm_refused", about).inc)]


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _body(headers: Headers, receive: Receive) -> bytes:
    """The whole body.

    Raises:
        OverflowError: it is too large.
        TimeoutError: it does not come.
        ClientDisconnect: whoever sent it is gone.
    """
    told = headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > MOST_BYTES:
        raise OverflowError
    body, more = b"", True
    async with asyncio.timeout(BODY_SECONDS):
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                raise OverflowError
            more = message.get("more_body", False)
    return body
