"""`create_app`: the server as an ASGI app, for uvicorn, gunicorn, hypercorn or Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from tokenflow_sdk import Generator, TokenFlowError, Tokenizer, Understander, __version__
from tokenflow_sdk.server import chat, embeddings, generations, images, inference, operations, page
from tokenflow_sdk.server.errors import handlers
from tokenflow_sdk.server.guard import Guard
from tokenflow_sdk.server.metrics import Metrics
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.settings import Settings, read_keys, settings_from

__all__ = ["create_app"]

_LOG = logging.getLogger("tokenflow_sdk.server")


def create_app(settings: Settings | None = None, failed: Callable[[BaseException], None] | None = None) -> FastAPI:
    """Make the app. Its models are opened when it starts, beside it: `/readyz` says when they are warm.

    Args:
        settings: None: those of the environment.
        failed: told of the error when the models cannot be opened; without it, the error is logged and nothing gets ready.

    Raises:
        TokenFlowError: a bundle, the key file or a setting cannot be used.
    """
    settings = settings_from({}) if settings is None else settings
    metrics = Metrics()
    models = Models(settings, metrics)
    keys = read_keys(settings.api_key_file)

    async def opened() -> None:
        try:
            await asyncio.to_thread(models.open)
        except Exception as error:
            _LOG.error("the models cannot be opened: %s", error)
            if failed is not None:
                failed(error)
        if models.ready:
            _watch(models)
            _LOG.info("ready: %s", ", ".join(models.names))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(opened())
        try:
            yield
        finally:
            models.ending = True
            await opening
            await asyncio.to_thread(models.close)

    middleware = [Middleware(Guard, settings=settings, metrics=metrics, keys=keys)]
    if settings.cors_origins:
        named = Middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, named)
    app = FastAPI(
        title="TokenFlow",
        version=__version__,
        description="Pictures to codes and back, pictures from text, and answers about pictures.",
        lifespan=lifespan,
        middleware=middleware,
        exception_handlers=handlers(),
        docs_url=None,  # it would load Swagger UI from another host, beside the page's key
        redoc_url=None,
    )
    app.state.models = models
    routers = [each.router(models) for each in (images, embeddings, inference, generations, chat, operations)]
    for each in (*routers, page.router()):
        app.router.routes += each.routes  # `include_router` looks for the route of each request twice
    return app


def _watch(models: Models) -> None:
    """Let the metrics ask the models for their pages, and whether their engines are built."""
    engines = "Whether a model runs on what it was asked to; 0 while its engines are being built."
    total, free = "Key/value pages.", "Key/value pages that no request holds."
    for name, model in models.opened().items():
        models.metrics.gauge("tokenflow_engines_ready", engines, partial(_engines_ready, model), model=name)
        if not isinstance(model, Tokenizer):
            models.metrics.gauge("tokenflow_pages", total, partial(getattr, model, "total_pages"), model=name)
            models.metrics.gauge("tokenflow_pages_free", free, partial(getattr, model, "free_pages"), model=name)


def _engines_ready(model: Tokenizer | Generator | Understander) -> float:
    try:
        return float(model.wait_for_engines(0))
    except TokenFlowError:
        return 0.0  # they cannot be built, and the model goes on without; the log says why
