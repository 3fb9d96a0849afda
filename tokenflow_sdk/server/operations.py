"""Routes of operation: health, metrics, the list of models."""

from __future__ import annotations

from time import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from tokenflow_sdk import __version__
from tokenflow_sdk.server.errors import ApiError, answer_of
from tokenflow_sdk.server.models import Models

__all__ = ["router"]


def router(models: Models) -> APIRouter:
    """The routes over some models."""
    routes, began = APIRouter(tags=["operation"]), int(time())

    @routes.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @routes.get("/readyz", summary="Whether the models are open and warm")
    async def readyz() -> Response:
        if not models.ready:
            return answer_of(ApiError(503, "The models are being opened."))
        return JSONResponse({"status": "ready"})

    @routes.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models", summary="Names of the models, and what each can do")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, abilities, began) for name, abilities in models.names().items()]}

    @routes.get("/v1/models/{name:path}", summary="One model")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in models.names():
            raise ApiError(404, f"There is no model {name[:200]!r} here.", "model_not_found", "model")
        return _model(name, models.names()[name], began)

    return routes


def _model(name: str, abilities: list[str], began: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": began, "owned_by": "tokenflow-sdk", "abilities": abilities}
