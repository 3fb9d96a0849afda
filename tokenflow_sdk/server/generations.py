"""The route of drawing: OpenAI's `POST /v1/images/generations`, streamed where asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from time import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.generation.results import GeneratedScale, Generation
from tokenflow_sdk.model.sampling import Preset
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.request_runner import RequestStream
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.images import PictureFormat, base64_text, picture_file
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.routes import WorkRoute, gathered
from tokenflow_sdk.server.streams import EventStream, event, pieces_of

__all__ = ["GenerationRequest", "router"]

_PRESETS = {"low": "fast", "medium": "balanced", "high": "paper", "hd": "paper"}
"""Presets by OpenAI's names of quality; `auto` and `standard` take the model's own."""


class GenerationRequest(BaseModel):
    """OpenAI's request; `preset`, `seed`, `cfg_scale`, `negative_prompt` and `partial_scales` are ours.

    `style`, `moderation` and `user` are read and mean nothing here.
    """

    model_config = ConfigDict(extra="ignore")

    prompt: str
    model: str | None = None
    n: Annotated[int | None, Field(ge=1, le=10)] = 1
    size: Annotated[str | None, Field(description="`auto`, or the size that the model draws")] = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    output_format: PictureFormat | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="quality of JPEG and WebP")] = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = False
    partial_images: Annotated[int | None, Field(ge=0, le=3, description="previews in a stream")] = None
    partial_scales: Annotated[
        list[Annotated[int, Field(ge=1)]] | None, Field(max_length=64, description="scales of which a stream has previews")
    ] = None
    negative_prompt: Annotated[str | None, Field(description="what guidance leads away from")] = None
    preset: Preset | None = None
    cfg_scale: float | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None


def router(models: Models) -> APIRouter:
    """The route over some models."""
    routes = APIRouter(prefix="/v1", tags=["drawing"], route_class=WorkRoute)

    @routes.post("/images/generations", summary="A prompt to pictures, in OpenAI's shape", response_model=None)
    async def generations(body: GenerationRequest) -> Response:
        models.require(body.model, "generations")
        generator = models.generator
        assert generator is not None
        drawing = await models.in_thread(partial(_Drawing, models, generator, body))  # it tokenizes
        if body.stream:
            return EventStream(drawing.events())
        return JSONResponse(await drawing.answer())

    return routes


class _Drawing:
    """One request: checked and begun by `__init__`; `answer` or `events` runs it."""

    def __init__(self, models: Models, generator: Generator, body: GenerationRequest) -> None:
        size = generator.tokenizer.config.image_size
        self._models, self._body = models, body
        self._size = f"{size}x{size}"
        self._format: PictureFormat = body.output_format or "png"
        self._created = int(time())
        if body.size not in (None, "auto", self._size):
            raise ApiError(422, f"This model draws {self._size}. Ask for that, or for size='auto'.", param="size")
        if body.background == "transparent":
            raise ApiError(422, "Pictures are drawn without transparency.", param="background")
        for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt or "")):
            if len(text) > models.settings.max_prompt_chars:
                raise ApiError(422, f"{name} has more than {models.settings.max_prompt_chars} characters.", param=name)
        self._previews = _preview_scales(body, len(generator.config.scales))
        self._stream: RequestStream[GeneratedScale, Generation] = generator.stream(
            body.prompt,
            n=body.n or 1,
            negative_prompt=body.negative_prompt,
            preset=body.preset or _PRESETS.get(body.quality or "auto"),
            cfg_scale=body.cfg_scale,
            seed=body.seed,
            strict=True,
            timeout=models.settings.timeout,
        )

    async def answer(self) -> dict[str, Any]:
        """The pictures, when all are drawn."""
        async for _ in pieces_of(self._stream, self._models.stream_threads):
            pass
        drawn = self._result()
        files = await gathered(self._file(codes, drawn, i) for i, codes in enumerate(drawn.codes))
        field = "url" if self._body.response_format == "url" else "b64_json"
        data = [
            {field: self._text(file), "tfc": base64_text(codes.to_bytes())}
            for file, codes in zip(files, drawn.codes, strict=True)
        ]
        return self._common() | {"created": self._created, "data": data, "usage": _usage(drawn), "seed": drawn.seed}

    async def events(self) -> AsyncGenerator[str, None]:
        """Previews of the asked scales, then the pictures."""
        index = 0
        async for scale in pieces_of(self._stream, self._models.stream_threads):
            if scale.scale in self._previews:
                for i, codes in enumerate(scale.codes):
                    name = "image_generation.partial_image"
                    found = {"type": name, "partial_image_index": index, "image_index": i, "scale": scale.scale}
                    yield event(found | self._common(True) | {"b64_json": self._text(await self._file(codes))}, name)
                index += 1
        drawn = self._result()
        for i, codes in enumerate(drawn.codes):
            name = "image_generation.completed"
            found = {"type": name, "image_index": i, "seed": drawn.seed, "usage": _usage(drawn)}
            own = {"tfc": base64_text(codes.to_bytes())}
            yield event(found | own | self._common(True) | {"b64_json": self._text(await self._file(codes, drawn, i))}, name)

    def _result(self) -> Generation:
        drawn = self._stream.result()
        self._models.metrics.observe_steps("scale", drawn.timings)
        return drawn

    async def _file(self, codes: Codes, drawn: Generation | None = None, image: int = 0) -> bytes:
        """The picture of codes; a PNG of a finished request says how it was drawn."""
        picture = await self._models.decoded(codes)
        metadata = None if drawn is None else {**drawn.metadata, "image": image}
        quality = 90 if self._body.output_compression is None else max(1, self._body.output_compression)
        return await self._models.in_thread(partial(picture_file, picture, self._format, quality, metadata))

    def _text(self, file: bytes) -> str:
        text = base64_text(file)
        return f"data:image/{self._format};base64,{text}" if self._body.response_format == "url" else text

    def _common(self, created: bool = False) -> dict[str, Any]:
        found = {"size": self._size, "quality": self._body.quality or "auto", "background": "opaque"}
        return found | {"output_format": self._format} | ({"created_at": self._created} if created else {})


def _preview_scales(body: GenerationRequest, scales: int) -> set[int]:
    """Scales of which previews are asked: by number, or so many, evenly up to the last but one."""
    if body.partial_scales is not None:
        if max(body.partial_scales, default=0) > scales:
            raise ApiError(422, f"This model draws {scales} scales.", param="partial_scales")
        return set(body.partial_scales)
    count = min(body.partial_images or 0, scales - 1)
    return {round((i + 1) * scales / (count + 1)) for i in range(count)}


def _usage(drawn: Generation) -> dict[str, Any]:
    output, prompt = sum(map(len, drawn.codes)), drawn.prompt_tokens
    details = {"image_tokens": 0, "text_tokens": prompt}
    return {"input_tokens": prompt, "input_tokens_details": details, "output_tokens": output, "total_tokens": prompt + output}
