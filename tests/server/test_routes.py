from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.requests import Request

from tokenflow_sdk.server import chat, embeddings, generations, images, inference
from tokenflow_sdk.server.errors import ApiError, handlers
from tokenflow_sdk.server.guard import ClientGone
from tokenflow_sdk.server.routes import WorkRoute, gathered, require_few_values


class Asked(BaseModel):
    text: str


async def in_thread(function: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function)


@pytest.fixture
def app() -> FastAPI:
    app, routes = FastAPI(exception_handlers=handlers()), APIRouter(route_class=WorkRoute)
    settings = SimpleNamespace(max_images=2, max_prompt_chars=100)
    config = SimpleNamespace(n_codes=5)
    app.state.models = SimpleNamespace(
        settings=settings, tokenizer_config=config, in_thread=in_thread, require_ready=lambda: None
    )

    @routes.post("/length")
    async def length(body: Asked) -> int:
        return len(body.text)

    @routes.post("/slow")
    async def slow(request: Request) -> None:
        app.state.began.set()
        try:
            await asyncio.sleep(60)
        finally:
            app.state.ended.append(await request.body())

    app.include_router(routes)
    return app


def post(app: FastAPI, content: bytes) -> httpx.Response:
    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/length", content=content, headers={"Content-Type": "application/json"})

    return asyncio.run(answer())


@pytest.mark.parametrize("length", [3, 100_000])
def test_bodies_of_any_length_are_read(app: FastAPI, length: int) -> None:
    assert post(app, b'{"text": "' + b"a" * length + b'"}').json() == length


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b"[[]]", b'{"a":[]}'])
def test_json_of_too_many_values_is_refused_before_it_is_parsed(
    app: FastAPI, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenflow_sdk.server.routes.from_json", None)
    answer = post(app, b'{"text": [' + b",".join([value] * 70_000) + b"]}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_what_is_no_json_is_named(app: FastAPI) -> None:
    for wrong in (b"{", b"[" * 1000, b'{"text": "\\ud800"}'):
        answer = post(app, wrong)
        assert (answer.status_code, answer.json()["error"]["message"][:21]) == (400, "The body is no JSON: ")
    assert post(app, b"").status_code == post(app, b"null").status_code == post(app, b"[]").status_code == 422


def test_large_json_is_counted_and_parsed_by_a_thread(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def counted(body: bytes, most: int) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        require_few_values(body, most)

    monkeypatch.setattr("tokenflow_sdk.server.routes.require_few_values", counted)
    for length in (10, 100_000):
        post(app, b'{"text": "' + b"a" * length + b'"}')
    assert threads == [True, False]


def test_values_are_counted() -> None:
    require_few_values(b'{"a": [1, 2, {"b": 3}]}', 5)
    with pytest.raises(ApiError, match="more than 4 JSON values"):
        require_few_values(b'{"a": [1, 2, {"b": 3}]}', 4)


def test_work_ends_with_its_client(app: FastAPI) -> None:
    async def ask() -> None:
        app.state.began, app.state.ended = asyncio.Event(), []
        body = iter([b"all ", b"of it"])

        async def receive() -> dict[str, object]:
            for part in body:
                return {"type": "http.request", "body": part, "more_body": part == b"all "}
            await app.state.began.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """Nobody is there: in the server `Guard` sends nothing."""

        scope = {"type": "http", "method": "POST", "path": "/slow", "headers": [], "query_string": b"", "root_path": ""}
        await app(scope, receive, send)

    with pytest.raises(ClientGone):
        asyncio.run(asyncio.wait_for(ask(), 10))
    assert app.state.ended == [b"all of it"]


def test_the_first_error_cancels_what_is_gathered_with_it() -> None:
    ended = []

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(60 if number > 1 else 0)
        finally:
            ended.append(number)
        if number == 1:
            raise ValueError("one")
        return number

    async def main() -> None:
        assert await gathered(work(0) for _ in range(3)) == [0, 0, 0]
        ended.clear()
        with pytest.raises(ValueError, match="one"):
            await gathered(map(work, range(5)))
        await asyncio.sleep(0)
        assert sorted(ended) == [0, 1, 2, 3, 4]

    asyncio.run(main())


def test_all_routes_that_work_end_with_their_client() -> None:
    modules: tuple[Any, ...] = (images, embeddings, generations, chat, inference)
    posts = [each for module in modules for each in module.router(None).routes if "POST" in each.methods]
    assert len(posts) >= 8
    assert all(isinstance(each, WorkRoute) for each in posts)


CODES = {"type": "image_codes", "image_codes": {"tfc": "AAAA"}}
WORK: list[tuple[Any, str, str, dict[str, object]]] = [
    (images, "read_codes", "/v1/images/decode", {"tfc": "AAAA"}),
    (images, "_arrays", "/v1/images/features", {"indices": [0] * 30}),
    (chat, "read_codes", "/v1/chat/completions", {"messages": [{"role": "user", "content": [CODES]}]}),
    (generations, "_Drawing", "/v1/images/generations", {"prompt": ""}),
    (inference, "_read", "/v2/models/encode/infer", {"inputs": [], "any": "x" * 100_000}),
]


@pytest.mark.parametrize("module, name, path, body", WORK, ids=[f"{each[2]} {each[1]}" for each in WORK])
def test_what_takes_long_runs_in_threads(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path: str, body: dict[str, object]
) -> None:
    function, threads = getattr(module, name), []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return function(*arguments)

    monkeypatch.setattr(module, name, noted)
    assert client.post(path, json=body).status_code in (200, 422)
    assert [each.startswith("tokenflow-work") for each in threads] == [True]
