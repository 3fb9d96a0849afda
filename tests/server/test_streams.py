from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.types import Message

from tokenflow_sdk.errors import RequestTimeoutError
from tokenflow_sdk.server import streams
from tokenflow_sdk.server.guard import ClientGone
from tokenflow_sdk.server.streams import EventStream, event, pieces_of


async def texts(stream: EventStream) -> list[str]:
    return [str(each) async for each in stream.body_iterator]


def test_an_error_in_its_midst_is_the_last_event() -> None:
    async def events() -> AsyncGenerator[str, None]:
        yield event({"a": 1}, "first")
        raise RequestTimeoutError("It took too long.", "Ask again.")

    found = asyncio.run(texts(EventStream(events())))
    assert found[0] == 'event: first\ndata: {"a": 1}\n\n'
    assert found[1].startswith('data: {"error": {"message": ') and '"timeout"' in found[1]
    assert len(found) == 2


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_PING", 0.02)

    async def events() -> AsyncGenerator[str, None]:
        await asyncio.sleep(0.07)
        yield "data: 1\n\n"

    found = asyncio.run(texts(EventStream(events())))
    assert (found[-1], set(found[:-1])) == ("data: 1\n\n", {": ping\n\n"})


def test_a_stream_that_is_dropped_ends_what_makes_its_events() -> None:
    ended = []

    async def events() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "data: 1\n\n"
        finally:
            ended.append(True)

    async def main() -> None:
        body = EventStream(events()).body_iterator
        await anext(aiter(body))
        await body.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    assert ended == [True]


@pytest.mark.parametrize("sent", [1, 3])
def test_a_client_that_goes_while_an_event_is_sent_ends_the_request(sent: int) -> None:
    class Endless(Iterator[int]):
        closed = False

        def __next__(self) -> int:
            return 1

        def close(self) -> None:
            self.closed = True

    stream: Any = Endless()

    async def events() -> AsyncGenerator[str, None]:
        async for piece in pieces_of(stream, threads):
            yield event({"piece": piece})

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal sent
        sent -= 1
        if sent < 0:
            raise ClientGone

    async def main() -> None:
        answer = EventStream(events())
        with pytest.raises(ClientGone):
            await answer({"type": "http"}, receive, send)
        await asyncio.sleep(0.01)
        # Somebody may hold the answer, or it waits for the garbage collector; its request has ended all the same.
        assert stream.closed

    with ThreadPoolExecutor(1) as threads:
        asyncio.run(main())
