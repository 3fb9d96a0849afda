"""Streams of requests as server-sent events: read by a thread, sent by the event loop, cancelled when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tokenflow_sdk.request_runner import RequestStream
from tokenflow_sdk.server.errors import api_error, envelope
from tokenflow_sdk.server.guard import ClientGone

__all__ = ["EventStream", "event", "pieces_of", "unless_gone"]

Piece = TypeVar("Piece")
T = TypeVar("T")
_PING = 15.0
"""Seconds of silence after which a comment is sent, so that nothing between takes the connection for dead."""
_END = object()


async def pieces_of(stream: RequestStream[Piece, Any], threads: Executor) -> AsyncGenerator[Piece, None]:
    """The pieces of a stream, each asked for when the one before was taken. Closing the generator cancels the request.

    Args:
        stream: is read in one of the threads.
        threads: each stream that is being read takes one.
    """
    loop = asyncio.get_running_loop()
    try:
        while (piece := await loop.run_in_executor(threads, next, stream, _END)) is not _END:
            yield piece  # type: ignore[misc]
    finally:
        stream.close()


class EventStream(StreamingResponse):
    """An answer of server-sent events. An error in its midst is its last event."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._events = _with_pings(_with_errors(events))
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. However it ends, what makes them ends with it, and nothing is left for the garbage collector."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled as soon as the client has gone.

    Raises:
        ClientGone: it has.
    """

    async def gone(scope: anyio.CancelScope) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    with anyio.CancelScope() as scope:
        waiting = asyncio.ensure_future(gone(scope))
        try:
            return await work
        finally:
            waiting.cancel()
    raise ClientGone


async def _with_errors(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(events):
            async for each in events:
                yield each
    except Exception as error:
        yield event(envelope(api_error(error)))


async def _with_pings(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The events, with comments where there are none for long."""
    pending: asyncio.Future[str] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({pending}, timeout=_PING))[0]:
                yield ": ping\n\n"
            try:
                yield pending.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await pending
        await events.aclose()
