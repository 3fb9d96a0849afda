from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tokenflow_sdk.errors import RequestTimeoutError
from tokenflow_sdk.server import streams
from tokenflow_sdk.server.streams import EventStream, event


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
