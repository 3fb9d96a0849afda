"""What routes that work share: JSON of a bounded number of values, and work that ends with its client or its first error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from inspect import signature
from typing import Any, TypeVar

import numpy as np
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.streams import unless_gone

__all__ = ["WorkRoute", "gathered", "read_json", "require_few_values", "unless_small"]

T = TypeVar("T")
_SMALL = 64 * 1024
"""Bytes of JSON that the event loop reads itself: a thread takes longer to begin."""


class WorkRoute(APIRoute):
    """A POST route that `read_json` reads for when the models are ready. Its work is cancelled once its client has gone."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, in that; of a function that takes the request alone, the function itself."""
        answer = super().get_route_handler()
        if self.methods != {"POST"}:
            return answer
        if list(signature(self.endpoint).parameters) == ["request"]:
            answer = self.endpoint

        async def handler(request: Request) -> Response:
            models: Models = request.app.state.models
            models.require_ready()
            # All of it is read before anything else waits for what the client sends.
            body = await request.body()
            if body and self.body_field is not None:
                # Where Starlette keeps what it has parsed, so that FastAPI does not parse it again on the event loop.
                request._json = await read_json(body, models)
            return await unless_gone(request, answer(request))

        return handler


async def read_json(body: bytes, models: Models) -> Any:
    """The value of a JSON body.

    Raises:
        ApiError: it is none, or has more values than any request needs.
    """
    s = models.settings
    most = 2**16 + s.max_images * models.tokenizer_config.n_codes + 2 * s.max_prompt_chars

    def read() -> Any:
        require_few_values(body, most)
        try:
            return from_json(body)
        except ValueError as error:
            raise ApiError(400, f"The body is no JSON: {error}.") from None

    return await unless_small(models, len(body), read)


def require_few_values(body: bytes, most: int) -> None:
    """Refuse JSON that has more values than `most`: they would take a hundred times its memory, and the parser holds up all.

    Raises:
        ApiError: it has.
    """
    text = np.frombuffer(body, np.uint8)
    # Whatever is in JSON follows one of these. NumPy lets other threads go on while it counts.
    if sum(int(np.count_nonzero(text == mark)) for mark in b",[{") > most:
        raise ApiError(413, f"The body has more than {most} JSON values, which is the most.")


async def unless_small(models: Models, size: int, function: Callable[[], T]) -> T:
    """The result of a function that reads so many bytes of JSON: in a thread, unless they are few."""
    return function() if size <= _SMALL else await models.in_thread(function)


async def gathered(works: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, in order. The first error cancels the others, whose results nobody gets."""
    works = list(works)
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
