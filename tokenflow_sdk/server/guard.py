"""`Guard`, the ASGI layer around the app: keys, limits of bodies and of requests at once, request ids, the access log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import uuid
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenflow_sdk.server.errors import REQUEST_ID, ApiError, answer_of, api_error
from tokenflow_sdk.server.metrics import Metrics
from tokenflow_sdk.server.settings import Settings

__all__ = ["ClientGone", "Guard"]

_ACCESS = logging.getLogger("tokenflow_sdk.server.access")
_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""What supervisors ask: without keys, and by the address instead of a name."""
_GRACE = 1.0
"""Seconds after `timeout` in which a stream can say that it was given up."""
_WORK = ("/v1/images/", "/v1/embeddings", "/v1/chat/", "/v2/models/")


class ClientGone(Exception):  # noqa: N818 - it is no error, and nobody is there to be told
    """A client has gone, or has not read its answer for too long."""


class Guard:
    """Reads each body, within its limits, before the app sees the request, so that slow clients hold nothing but memory.

    Args:
        app: what answers.
        settings: the limits.
        metrics: told of every answer.
        keys: of which a request must bring one; none: it needs none.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, keys: Sequence[bytes]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [hashlib.sha256(key).digest() for key in keys]
        self._held = 0
        """Bytes of all bodies at the moment."""
        self._working = 0
        metrics.gauge("tokenflow_requests_under_way", "Requests that models work for.", lambda: self._working)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, send, self._settings.body_timeout)
        REQUEST_ID.set(request.id)
        try:
            await self._answer(scope, receive, request)
        except ApiError as error:
            await request.refuse(error)
        except ClientGone:
            request.status = None
        except asyncio.CancelledError:
            # The server ends, and has waited for as long as it may.
            if request.status is not None:
                raise
            await request.refuse(ApiError(503, "The server ends before the request was finished. Send it again in a moment."))
        except Exception as error:
            if request.status is not None:
                raise
            await request.refuse(api_error(error))
        finally:
            self._note(scope, request)

    async def _answer(self, scope: Scope, receive: Receive, request: _Request) -> None:
        path = _route_path(scope)
        if path not in _PROBES:
            # The page asks for a key itself.
            if self._keys and path != "/" and not path.startswith("/page/"):
                self._require_key(request.headers.get(b"authorization", b""))
            self._require_host(request.headers)
            self._require_same_origin(request.headers)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, request.send)
            return
        body = bytearray()
        try:
            await self._read(request.headers, receive, body)
            if not path.startswith(_WORK):
                await self._app(scope, _replayed(memoryview(body), receive), request.send)
                return
            if self._working >= self._settings.max_queue:
                self._metrics.refused.inc()
                raise ApiError(429, f"{self._working} requests are under way, which is the most. Try again in a moment.")
            self._working += 1
            try:
                # Models give up what they work for themselves; this is for all else, a moment later.
                with anyio.move_on_after(self._settings.timeout + _GRACE) as waiting:
                    await self._app(scope, _replayed(memoryview(body), receive), request.send)
            finally:
                self._working -= 1
            if waiting.cancelled_caught:
                raise ApiError(504, f"The request was not finished within {self._settings.timeout:g} s.")
        finally:
            self._held -= len(body)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, body: bytearray) -> None:
        """Add the body's parts to `body`, and what it adds to the bytes of all.

        Raises:
            ApiError: it is too large, too slow, there is no room for it, or the client has gone.
        """
        s = self._settings
        limit, room = int(s.max_body_mb * 1e6), int(s.max_bodies_mb * 1e6)
        too_large = ApiError(413, f"The body has more than {s.max_body_mb:g} MB, which is the most.", "body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        with self._metrics.stage("body"), anyio.move_on_after(s.body_timeout) as waiting:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                if self._held + len(part) > room:
                    self._metrics.refused.inc()
                    raise ApiError(429, "Requests under way fill the room for bodies. Try again in a moment.")
                body += part
                self._held += len(part)
                if len(body) > limit:
                    raise too_large
                more = message.get("more_body", False)
        if waiting.cancelled_caught:
            raise ApiError(408, f"The body took longer than {s.body_timeout:g} s.")

    def _require_key(self, authorization: bytes) -> None:
        kind, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # All are compared, each in constant time, so that the time tells nothing about any.
        if not sum(hmac.compare_digest(given, each) for each in self._keys) or kind.lower() != b"bearer":
            raise ApiError(401, "The request has no valid key. Send the header `Authorization: Bearer KEY`.")

    def _require_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse requests for other names: a page of a stranger's may let its own name point to this machine."""
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
        if not {"*", host} & set(self._settings.hosts):
            raise ApiError(403, f"This server is not {host[:200]!r}; `--allowed-hosts` names what it is.")

    def _require_same_origin(self, headers: dict[bytes, bytes]) -> None:
        """Refuse what pages of strangers send without asking: forms and simple requests, which CORS lets through."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1")
        own = origin.partition("://")[2] == host
        if origin and not own and origin not in self._settings.cors_origins and "*" not in self._settings.cors_origins:
            raise ApiError(403, f"Pages of {origin[:200]} may not call this server; `--cors-origins` names those that may.")

    def _note(self, scope: Scope, request: _Request) -> None:
        seconds = perf_counter() - request.began
        route = getattr(scope.get("route"), "path", "other")
        status = str(request.status or 499)
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if self._settings.access_log:
            client = scope.get("client") or ("",)
            line: dict[str, Any] = {
                "id": request.id,
                "client": client[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": int(status),
                "bytes": request.sent,
                "ms": round(seconds * 1000, 1),
            }
            _ACCESS.info("%s", json.dumps(line))


class _Request:
    """One request's answer on its way: its id, what was sent, and a limit on how long the client may take to read."""

    def __init__(self, scope: Scope, send: Send, patience: float) -> None:
        self.began = perf_counter()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        self.sent = 0
        self._scope, self._send, self._patience = scope, send, patience

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        self.sent += len(message.get("body", b""))
        with anyio.move_on_after(self._patience) as waiting:
            await self._send(message)
        if waiting.cancelled_caught:
            raise ClientGone

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, if nothing was answered yet."""
        if self.status is None:

            async def nothing() -> Message:
                return {"type": "http.disconnect"}

            await answer_of(error)(self._scope, nothing, self.send)


def _route_path(scope: Scope) -> str:
    """The path as the app's routes have it: without the root path, which what runs the app puts before it."""
    path, root = scope["path"], scope.get("root_path", "")
    return str(path[len(root) :] if path.startswith(f"{root}/") else path)


def _replayed(body: memoryview, receive: Receive) -> Receive:
    """A `receive` that gives the body first, which Starlette copies, and then what comes later: that the client has gone."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
