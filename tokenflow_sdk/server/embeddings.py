"""The route of embeddings: OpenAI's `POST /v1/embeddings`, with pictures in place of texts."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from tokenflow_sdk.server.answers import JsonAnswer
from tokenflow_sdk.server.bodies import picture_bytes
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.images import base64_text
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.routes import WorkRoute, gathered

__all__ = ["router"]


class Embeddings(BaseModel):
    """OpenAI's request, with pictures in place of texts."""

    model_config = ConfigDict(extra="ignore")

    input: Annotated[str | Annotated[list[str], Field(fail_fast=True)], Field(description="pictures as data URLs or base64")]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


def router(models: Models) -> APIRouter:
    """The route over some models."""
    routes = APIRouter(prefix="/v1", tags=["pictures and codes"], route_class=WorkRoute)

    @routes.post("/embeddings", summary="One vector a picture, in OpenAI's shape")
    async def embeddings(body: Embeddings) -> Response:
        name = models.require(body.model, "embeddings")
        pictures = [body.input] if isinstance(body.input, str) else body.input
        most = models.settings.max_images
        if not 1 <= len(pictures) <= most:
            raise ApiError(422, f"Give 1 to {most} pictures.", "too_many_images" if pictures else None, "input")
        width = models.tokenizer.config.semantic_width
        if body.dimensions not in (None, width):
            raise ApiError(422, f"This model's vectors have {width} dimensions.", param="dimensions")
        codes = await gathered(models.picture(partial(picture_bytes, text, "input")) for text in pictures)
        vectors = await gathered(map(models.embedding, codes))
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        count = sum(map(len, codes))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JsonAnswer({"object": "list", "model": name, "data": data, "usage": usage})

    return routes


def _vector(vector: NDArray[np.float32], encoding: str) -> list[float] | str:
    return vector.tolist() if encoding == "float" else base64_text(vector.astype("<f4").tobytes())
