"""The route of answering: OpenAI's `POST /v1/chat/completions`, with pictures or their codes as parts of messages."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from functools import partial
from time import time
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from tokenflow_sdk.model.sampling import random_seed
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.request_runner import RequestStream
from tokenflow_sdk.server.bodies import CodesJson, picture_bytes, read_codes
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.routes import WorkRoute, gathered
from tokenflow_sdk.server.streams import EventStream, event, pieces_of
from tokenflow_sdk.understanding.answering import Answer
from tokenflow_sdk.understanding.params import AnswerParams

__all__ = ["ChatRequest", "router"]


class ImageUrl(BaseModel):
    """A picture as a data URL; `detail` is read and means nothing here."""

    model_config = ConfigDict(extra="ignore")
    url: str


class Part(BaseModel):
    """A part of a message: text, a picture, or the codes of one."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "image_url", "image_codes"]
    text: str | None = None
    image_url: ImageUrl | None = None
    image_codes: CodesJson | None = None


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[Part], Field(max_length=64, fail_fast=True)]


class StreamOptions(BaseModel):
    """What a stream has besides the answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """OpenAI's request; `top_k` and `repetition_penalty` are ours. What is not listed is read and means nothing here."""

    model_config = ConfigDict(extra="ignore")
    messages: Annotated[list[Message], Field(min_length=1, max_length=256, fail_fast=True)]
    model: str | None = None
    n: Annotated[int | None, Field(ge=1, le=1)] = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None


class _Conversation(NamedTuple):
    pictures: list[Part]
    turns: list[tuple[str, str]]
    question: str


def router(models: Models) -> APIRouter:
    """The route over some models."""
    routes = APIRouter(prefix="/v1", tags=["answering"], route_class=WorkRoute)

    @routes.post("/chat/completions", summary="An answer about pictures, in OpenAI's shape", response_model=None)
    async def completions(body: ChatRequest) -> Response:
        name = models.require(body.model, "chat")
        answering = _Answering(models, name, body, await _begun(models, body))
        if body.stream:
            return EventStream(answering.events())
        return JSONResponse(await answering.answer())

    return routes


async def _begun(models: Models, body: ChatRequest) -> RequestStream[str, Answer]:
    """The request on the model: read, checked and with its pictures encoded."""
    talk = _conversation(body.messages, models.settings.max_images, models.settings.max_prompt_chars)
    given: dict[str, Any] = {
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "repetition_penalty": body.repetition_penalty,
        "seed": random_seed() if body.seed is None else body.seed,
    }
    params = AnswerParams(**{name: value for name, value in given.items() if value is not None})
    codes = await gathered(_codes(models, part) for part in talk.pictures)
    understander = models.understander
    assert understander is not None

    def begin() -> RequestStream[str, Answer]:
        chat = understander.chat(codes, turns=talk.turns)
        return chat.stream(talk.question, params=params, timeout=models.settings.timeout)

    return await models.in_thread(begin)


async def _codes(models: Models, part: Part) -> Codes:
    """Codes of a picture, prepared as the understander was trained; given ones are its tokenizer's."""
    assert models.understander is not None
    if part.image_codes is not None:
        return await models.in_thread(partial(read_codes, part.image_codes, models))
    assert part.image_url is not None
    read = partial(picture_bytes, part.image_url.url, "image_url")
    return await models.picture(read, models.understander.config.preprocess)


def _conversation(messages: list[Message], most_pictures: int, most_characters: int) -> _Conversation:
    """Pictures, earlier turns and the question of a list of messages.

    Raises:
        ApiError: it is no conversation that this model can read.
    """
    pictures: list[Part] = []
    texts: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role in ("system", "developer"):
            raise ApiError(422, "This model has a system prompt of its own; leave system messages out.", param=where)
        if message.role != ("user", "assistant")[number % 2]:
            raise ApiError(422, "Messages must be of the user and of the assistant in turns, the user's first.", param=where)
        text, found = _parts(message, where)
        if found and number:
            raise ApiError(422, "This model reads pictures in the first message only.", param=where)
        pictures += found
        texts.append(text)
    if len(messages) % 2 == 0:
        raise ApiError(422, "The last message must be the user's.", param="messages")
    if not 1 <= len(pictures) <= most_pictures:
        raise ApiError(422, f"The first message must have 1 to {most_pictures} pictures.", param="messages[0]")
    if sum(map(len, texts)) > most_characters:
        raise ApiError(422, f"The conversation has more than {most_characters} characters.", param="messages")
    return _Conversation(pictures, list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1])


def _parts(message: Message, where: str) -> tuple[str, list[Part]]:
    if isinstance(message.content, str):
        return message.content, []
    texts, pictures = [], []
    for part in message.content:
        value = getattr(part, part.type)
        if value is None:
            raise ApiError(422, f"A part of type {part.type!r} has no {part.type!r}.", param=where)
        if part.type == "text":
            texts.append(value)
        else:
            pictures.append(part)
    return "\n".join(texts), pictures


class _Answering:
    """One answer on its way; `answer` or `events` runs it."""

    def __init__(self, models: Models, name: str, body: ChatRequest, stream: RequestStream[str, Answer]) -> None:
        self._models, self._stream = models, stream
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time()), "model": name}

    async def answer(self) -> dict[str, Any]:
        """The answer, when it is finished."""
        async for _ in pieces_of(self._stream, self._models.stream_threads):
            pass
        found = self._result()
        message = {"role": "assistant", "content": found.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": found.finish, "logprobs": None}
        return self._common | {"object": "chat.completion", "choices": [choice], "usage": _usage(found)}

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer in pieces."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for piece in pieces_of(self._stream, self._models.stream_threads):
            yield self._chunk({"content": piece})
        found = self._result()
        yield self._chunk({}, found.finish)
        if self._with_usage:
            yield event(self._common | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(found)})
        yield "data: [DONE]\n\n"

    def _result(self) -> Answer:
        found = self._stream.result()
        self._models.metrics.observe_steps("token", found.timings)
        return found

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event(self._common | {"object": "chat.completion.chunk", "choices": [choice]})


def _usage(found: Answer) -> dict[str, Any]:
    completion = len(found.token_ids)
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": found.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
    }
