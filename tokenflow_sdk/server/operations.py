"""Routes of operation: health, metrics, the list of models."""

from __future__ import annotations

from time import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from tokenflow_sdk import __version__
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.models import Models

__all__ = ["router"]


def router(models: Models) -> APIRouter:
    """The routes over some models."""
    routes, began = APIRouter(tags=["operation"]), int(time())

    @routes.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @routes.get("/readyz", summary="Whether the models are open and warm")
    async def readyz() -> dict[str, str]:
        models.require_ready()
        return {"status": "ready"}

    @routes.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models", summary="Names of the models, and what each can do")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in models.names]}

    @routes.get("/v1/models/{name:path}", summary="One model")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in models.names:
            raise ApiError(404, f"There is no model {name[:200]!r} here.", "model_not_found", "model")
        return model(name)

    def model(name: str) -> dict[str, Any]:
        """One model; all of a server read or write the same codes, so its pictures' size and scales are those of all."""
        common = {"object": "model", "created": began, "owned_by": "tokenflow-sdk"}
        config = models.tokenizer_config
        sizes = {"image_size": config.image_size, "patch_nums": list(config.patch_nums)}
        return {"id": name, **common, "abilities": models.names[name], **sizes}

    return routes
