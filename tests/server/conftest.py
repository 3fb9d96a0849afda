"""A server with small models on a port of this machine, for all tests of a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

from tests.support.waiting import comes_true
from tokenflow_sdk.server import Settings, create_app
from tokenflow_sdk.server.run import listen, server_config

Serve = Callable[..., AbstractContextManager[str]]


@contextmanager
def listening(app: ASGIApp, settings: Settings) -> Iterator[str]:
    """The address of an app that is served as `tokenflow serve` serves it."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app, settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The address of a server that is ready."""
    with listening(create_app(settings), settings) as url:
        assert comes_true(lambda: httpx.get(f"{url}/readyz").status_code == 200), "the server did not get ready"
        yield url


@pytest.fixture(scope="session")
def serve(mini_bundle: Path, mini_generator: Path, mini_understander: Path) -> Serve:
    """Starts a server with the small models and other settings."""

    def start(**settings: object) -> AbstractContextManager[str]:
        given = {
            "tokenizer": str(mini_bundle),
            "generator": str(mini_generator),
            "understander": str(mini_understander),
            "access_log": False,
            "threads": 1,
            "drain": 5,
        }
        return served(Settings(**(given | settings)))  # type: ignore[arg-type]

    return start


@pytest.fixture(scope="module")
def url(serve: Serve) -> Iterator[str]:
    """A server with the small models, whose threads end with a file's tests: others look for threads that were left."""
    with serve() as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as opened:
        yield opened


@pytest.fixture
def openais(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which would leave a socket behind if nobody closed it."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
