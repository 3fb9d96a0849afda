from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.conftest import ROOT
from tests.server.conftest import Serve, listening
from tests.support.waiting import comes_true
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.server import guard
from tokenflow_sdk.server.guard import Guard
from tokenflow_sdk.server.metrics import Metrics
from tokenflow_sdk.server.settings import Settings

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def strict(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with keys and low limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# of the tests\nfirst-key\n\nsecond-key\n")
    limits = {"max_body_mb": 0.2, "max_bodies_mb": 0.3, "body_timeout": 1.0, "max_queue": 2, "max_pixels": 10_000}
    with serve(generator="none", understander=None, api_key_file=keys, **limits) as url:
        yield url


@pytest.fixture
def keyed(strict: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=strict, headers={"Authorization": "Bearer second-key"}) as client:
        yield client


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("key", [None, "Bearer", "Bearer third-key", "Bearer first-keys", "Basic first-key", "first-key"])
def test_requests_without_a_valid_key_are_refused(strict: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": key}
    for path in ("/v1/models", "/metrics", "/v2/models/encode", "/openapi.json", "/nothing"):
        answer = httpx.get(f"{strict}{path}", headers=headers)
        assert code(answer) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert code(httpx.post(f"{strict}/v1/images/tokens", content=PHOTO, headers=headers | JPEG)) == (401, "invalid_api_key")


def test_supervisors_need_no_key(strict: str, keyed: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert httpx.get(f"{strict}{path}").status_code == 200
    for key in ("first-key", "second-key"):
        assert httpx.get(f"{strict}/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_large_bodies_are_refused(keyed: httpx.Client) -> None:
    assert code(keyed.post("/v1/images/tokens", content=b"x" * 200_001, headers=JPEG)) == (413, "body_too_large")

    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 10_000

    # Nobody said how long it is: it is refused while it arrives.
    assert code(keyed.post("/v1/images/tokens", content=parts(), headers=JPEG)) == (413, "body_too_large")


def test_pictures_of_too_many_pixels_are_refused(keyed: httpx.Client) -> None:
    assert code(keyed.post("/v1/images/tokens", content=PHOTO, headers=JPEG)) == (413, "image_too_large")


def slowly(url: str, length: int, sent: bytes) -> socket.socket:
    """A client that stops in the midst of its body."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/images/tokens HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer first-key\r\nContent-Type: image/jpeg\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + sent)
    return connection


def test_slow_bodies_are_given_up_and_hold_no_place(strict: str, keyed: httpx.Client) -> None:
    slow = [slowly(strict, 1000, b"x") for _ in range(10)]
    try:
        # Ten are waiting, of two that may be under way; others are answered nevertheless.
        assert keyed.post("/v1/images/decode", json={"indices": [0]}).status_code == 200
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
    finally:
        for connection in slow:
            connection.close()


def test_bodies_together_have_a_limit(strict: str, keyed: httpx.Client) -> None:
    slow = [slowly(strict, 190_001, b"x" * 140_000) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while (answer := keyed.post("/v1/images/tokens", content=b"x" * 100_000, headers=JPEG)).status_code != 429:
            assert time.monotonic() < deadline, "two bodies do not fill the room"
        assert answer.headers["retry-after"] == "1"
    finally:
        for connection in slow:
            connection.close()
    deadline = time.monotonic() + 60
    while keyed.post("/v1/images/tokens", content=b"x" * 100_000, headers=JPEG).status_code == 429:
        assert time.monotonic() < deadline, "bodies of clients that have gone still take room"


def test_requests_under_way_have_a_limit(serve: Serve) -> None:
    with serve(generator="none", understander=None, max_queue=1) as url:
        found = set()

        def ask() -> None:
            with httpx.Client(base_url=url) as client:
                for _ in range(8):
                    found.add(client.post("/v1/images/tokens", content=PHOTO, headers=JPEG).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {200, 429}
        # A request is under way until its answer was sent, which is a moment after it is here.
        assert comes_true(lambda: httpx.post(f"{url}/v1/images/tokens", content=PHOTO, headers=JPEG).status_code == 200)


def test_pages_of_strangers_may_not_call(url: str, serve: Serve) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"Origin": url}).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        assert code(httpx.get(f"{url}/v1/models", headers=headers)) == (403, "forbidden")
    with serve(generator="none", understander=None, cors_origins=("https://a.example",), allowed_hosts=("box.local",)) as named:
        own = {"Host": "box.local:8080"}
        answer = httpx.get(f"{named}/v1/models", headers=own | {"Origin": "https://a.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
        asked = own | {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{named}/v1/images/tokens", headers=asked).status_code == 200
        assert httpx.get(f"{named}/v1/models", headers=own | {"Origin": "https://b.example"}).status_code == 403
        assert httpx.get(f"{named}/v1/models").status_code == 403


def test_every_answer_has_an_id_and_a_line_in_the_access_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    # A line is written after its answer, so that the last one is sure only when the server has ended.
    with (
        caplog.at_level(logging.INFO, "tokenflow_sdk.server.access"),
        serve(generator="none", understander=None, access_log=True) as url,
    ):
        given = httpx.get(f"{url}/healthz", headers={"X-Request-ID": "mine-1"})
        made = httpx.post(f"{url}/v1/images/tokens?x=secret", content=b"", headers=JPEG | {"X-Request-ID": "bad id"})
    assert given.headers["x-request-id"] == "mine-1"
    lines = [json.loads(record.message) for record in caplog.records if record.name == "tokenflow_sdk.server.access"]
    lines = [line for line in lines if line["path"] != "/readyz"]
    assert [line["id"] for line in lines] == ["mine-1", made.headers["x-request-id"]]
    assert len(lines[1]["id"]) == 32
    assert {key: lines[1][key] for key in ("method", "path", "status")} == {
        "method": "POST",
        "path": "/v1/images/tokens",
        "status": 422,
    }
    assert lines[1]["bytes"] == len(made.content)


def test_a_failure_here_is_told_without_its_details(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(generator="none", understander=None) as url:

        def fail(*_: object) -> None:
            raise RuntimeError(f"secret {Path(__file__)}")

        monkeypatch.setattr(Tokenizer, "encode_array", fail)
        answer = httpx.post(f"{url}/v1/images/tokens", content=PHOTO, headers=JPEG)
        assert code(answer) == (500, "internal_error")
        assert "secret" not in answer.text and "Traceback" not in answer.text
        monkeypatch.undo()
        assert httpx.post(f"{url}/v1/images/tokens", content=PHOTO, headers=JPEG).status_code == 200


def test_the_log_says_which_request_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("why")

    found = asked(
        Guard(app, Settings(access_log=False), Metrics(), []), "POST", "/v1/images/tokens", headers={"X-Request-ID": "a-1"}
    )
    assert (found.status_code, found.headers["x-request-id"]) == (500, "a-1")
    assert [record.getMessage() for record in caplog.records] == ["request a-1 failed"]


def asked(app: ASGIApp, method: str, path: str, root: str = "", **more: Any) -> httpx.Response:
    """What an app answers without a server."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


def test_rules_for_paths_hold_behind_a_root_path(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep(5)

    monkeypatch.setattr(guard, "_GRACE", 0.0)
    settings = Settings(access_log=False, timeout=0.01)
    for root in ("", "/api"):
        open_, keyed = (Guard(Response(b"here"), settings, Metrics(), keys) for keys in ([], [b"key"]))
        paths = {
            path: asked(keyed, "GET", root + path, root).status_code
            for path in ("/", "/page/page.js", "/healthz", "/v1/models")
        }
        assert paths == {"/": 200, "/page/page.js": 200, "/healthz": 200, "/v1/models": 401}
        assert asked(keyed, "GET", root + "/healthz", root, headers={"Host": "10.0.0.1"}).status_code == 200
        assert asked(open_, "GET", root + "/v1/models", root, headers={"Host": "10.0.0.1"}).status_code == 403
        slow = Guard(app, settings, Metrics(), [])
        assert asked(slow, "POST", root + "/v1/images/tokens", root).status_code == 504
    assert asked(keyed, "GET", "/apis/healthz", "/api").status_code == 401


def test_requests_that_are_cut_off_by_the_servers_end_are_told() -> None:
    begun = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # it has no lifespan
        begun.set()
        await anyio.sleep_forever()

    settings = Settings(access_log=False, drain=0)
    found: list[httpx.Response] = []
    with listening(Guard(app, settings, Metrics(), []), settings) as url:
        thread = threading.Thread(target=lambda: found.append(httpx.post(f"{url}/v1/images/tokens", timeout=30)))
        thread.start()
        assert begun.wait(30)
    thread.join()
    assert code(found[0]) == (503, "unavailable")
    assert found[0].headers["retry-after"] == "1"


def test_work_that_takes_too_long_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_GRACE", 0.0)
    with serve(generator="none", understander=None, timeout=0.5) as url:
        stuck = threading.Event()
        monkeypatch.setattr(Tokenizer, "encode_array", lambda *_: stuck.wait(30))
        answer = httpx.post(f"{url}/v1/images/tokens", content=PHOTO, headers=JPEG, timeout=30)
        stuck.set()
        assert code(answer) == (504, "timeout")


def test_a_client_that_never_reads_is_given_up() -> None:
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"x" * 10**6})
        sent.append("all")

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()  # as when the client's window is full

    async def main() -> None:
        settings = Settings(body_timeout=0.1, access_log=False)
        metrics = Metrics()
        layer = Guard(app, settings, metrics, [])
        scope = {"type": "http", "method": "POST", "path": "/v1/images/tokens", "headers": [(b"host", b"localhost")]}
        with anyio.fail_after(60):
            await layer(scope, receive, send)
        assert b"tokenflow_requests_under_way 0.0" in metrics.text()
        assert b'status="499"' in metrics.text()

    anyio.run(main)
    assert sent == []
