"""Routes of pictures and codes: tokens, decode, features, semantic features."""

from __future__ import annotations

import base64
import io
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from tokenflow_sdk.generation.results import png
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.server.answers import JsonAnswer
from tokenflow_sdk.server.bodies import TFC, CodesJson, Inputs, Options, Read, read_codes, read_inputs
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.routes import WorkRoute, gathered

__all__ = ["PictureFormat", "base64_text", "codes_json", "picture_file", "router"]

PictureFormat = Literal["png", "jpeg", "webp"]
_NPY = "application/x-npy"
_BINARY = ("application/octet-stream",)
_PICTURE_BODY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_BODIES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "description": "a picture file as base64 or as a data URL"},
                        "images": {"type": "array", "items": {"type": "string"}, "description": "several"},
                        "data": {"type": "array", "items": CodesJson.model_json_schema(), "description": "codes of several"},
                        "tfc": {"type": "string", "description": "a .tfc file as base64"},
                        "indices": {"type": "array", "items": {"type": "integer"}, "description": "code indices"},
                        **Options.model_json_schema()["properties"],
                    },
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "image/*": _PICTURE_BODY,
            TFC: _PICTURE_BODY,
            "application/octet-stream": _PICTURE_BODY,
        },
    }
}


class TokensOptions(Options):
    """What is answered besides the codes."""

    prepared: Annotated[bool, Field(description="with each picture as it was encoded, as a PNG in base64")] = False


class DecodeOptions(Options):
    """How pictures are written."""

    format: Annotated[PictureFormat, Field(description="of the picture files")] = "png"
    quality: Annotated[int, Field(ge=1, le=100, description="of JPEG and WebP")] = 90


def router(models: Models) -> APIRouter:
    """The routes over some models."""
    routes = APIRouter(prefix="/v1", tags=["pictures and codes"], route_class=WorkRoute)

    async def inputs(request: Request, kind: type[Options]) -> tuple[Inputs, Any]:
        found = await read_inputs(request, models)
        options = kind.model_validate(found.options)
        models.require(options.model, "tokens")
        return found, options

    async def codes_of(found: Inputs, options: Options) -> list[Codes]:
        """Codes given, then those of pictures."""
        given: list[Codes] = []
        if found.codes:
            given = await models.in_thread(lambda: [read_codes(each, models, options.scales) for each in found.codes])
        made = await gathered(models.picture(read, options.preprocess, options.color) for read in found.pictures)
        return given + [_truncated(each, options.scales) for each in made]

    @routes.post("/images/tokens", openapi_extra=_BODIES, summary="Pictures to codes")
    async def tokens(request: Request) -> Response:
        found, options = await inputs(request, TokensOptions)
        if found.codes:
            raise ApiError(422, "The body has codes already; this takes pictures.", param="image")
        as_file = _accepts(request, TFC, *_BINARY)
        if as_file and len(found.pictures) > 1:
            several = f"{TFC} holds one picture, and {len(found.pictures)} were sent."
            raise ApiError(406, f"{several} Accept application/json for several.")

        async def one(read: Read) -> tuple[NDArray[np.uint8], Codes]:
            pixels, codes = await models.prepared_picture(read, options.preprocess, options.color)
            return pixels, _truncated(codes, options.scales)

        pixels, codes = zip(*await gathered(map(one, found.pictures)), strict=True)
        if as_file:
            return Response(codes[0].to_bytes(), media_type=TFC)
        data = [codes_json(each, i) for i, each in enumerate(codes)]
        if options.prepared:
            for each, prepared in zip(data, pixels, strict=True):
                each["prepared"] = base64_text(await models.in_thread(partial(png, Image.fromarray(prepared))))
        usage = {"prompt_tokens": 0, "total_tokens": sum(map(len, codes))}
        return JsonAnswer({"object": "list", "model": models.require(None, "tokens"), "data": data, "usage": usage})

    @routes.post("/images/decode", openapi_extra=_BODIES, summary="Codes to pictures")
    async def decode(request: Request) -> Response:
        found, options = await inputs(request, DecodeOptions)
        if found.pictures:
            raise ApiError(422, "The body is a picture already; this takes codes.", param="tfc")
        codes = await codes_of(found, options)
        images = await gathered(map(models.decoded, codes))
        files = [await models.in_thread(partial(picture_file, image, options.format, options.quality)) for image in images]
        if len(files) == 1 and not _accepts(request, "application/json"):
            return Response(files[0], media_type=f"image/{options.format}")
        data = [{"index": i, "b64_json": base64_text(file)} for i, file in enumerate(files)]
        return JsonAnswer({"object": "list", "data": data, "output_format": options.format})

    @routes.post("/images/features", openapi_extra=_BODIES, summary="Quantized features of pictures or codes")
    async def features(request: Request) -> Response:
        return await arrays(request, models.features)

    @routes.post("/images/semantic", openapi_extra=_BODIES, summary="Semantic features of pictures or codes")
    async def semantic(request: Request) -> Response:
        return await arrays(request, models.semantic)

    async def arrays(request: Request, of: Callable[[Codes], Awaitable[NDArray[np.float32]]]) -> Response:
        found, options = await inputs(request, Options)
        rows = await gathered(map(of, await codes_of(found, options)))
        return await models.in_thread(partial(_arrays, rows, _accepts(request, _NPY, *_BINARY)))

    return routes


def codes_json(codes: Codes, index: int) -> dict[str, Any]:
    """Codes as JSON: all that `Codes` holds, and how many bytes the `.tfc` file has up to each scale."""
    return {
        "object": "image.tokens",
        "index": index,
        "indices": codes.indices.tolist(),
        "n_scales": codes.n_scales,
        "patch_nums": list(codes.patch_nums),
        "codebook_size": codes.codebook_size,
        "codebook": codes.codebook_id,
        "variant": codes.variant,
        "scale_ends": codes.scale_ends,
        "tfc": base64_text(codes.to_bytes()),
    }


def base64_text(data: bytes) -> str:
    """Bytes as JSON holds them."""
    return base64.b64encode(data).decode()


def picture_file(
    image: Image.Image, format: PictureFormat, quality: int = 90, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """A picture as a file of some format; a PNG has the metadata."""
    if format == "png":
        return png(image, metadata)
    buffer = io.BytesIO()
    image.save(buffer, format.upper(), quality=quality)
    return buffer.getvalue()


def _arrays(rows: list[NDArray[np.float32]], npy: bool) -> Response:
    """The answer of one array a picture: a .npy file of all, or JSON."""
    if npy:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(rows))
        return Response(buffer.getvalue(), media_type=_NPY)
    data = [{"index": i, "shape": list(each.shape), "values": each.tolist()} for i, each in enumerate(rows)]
    return JsonAnswer({"object": "list", "data": data})


def _truncated(codes: Codes, scales: int | None) -> Codes:
    if scales is None:
        return codes
    if scales > codes.n_scales:
        raise ApiError(422, f"This tokenizer has {codes.n_scales} scales.", param="scales")
    return codes.truncate(scales)


def _accepts(request: Request, *kinds: str) -> bool:
    """Whether the client asks for one of these media types by name."""
    named = {part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")}
    return not named.isdisjoint(kinds)
