from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.conftest import ROOT
from tests.server.conftest import Serve, listening
from tests.support.served import COMMAND, running
from tests.support.waiting import comes_true
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.server.app import create_app
from tokenflow_sdk.server.guard import Guard
from tokenflow_sdk.server.metrics import Metrics
from tokenflow_sdk.server.models import Models
from tokenflow_sdk.server.settings import Settings

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()
LARGE = bytes(4_000_000)
"""An answer that is larger than what systems keep between two sockets of which one is small."""


def failure(*options: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_one_command_serves_the_bundled_models_and_sigterm_ends_it_after_what_was_accepted() -> None:
    with running() as served:
        process, url = served.process, served.url
        assert httpx.get(f"{url}/readyz").status_code == 200
        codes = httpx.post(f"{url}/v1/images/tokens", content=PHOTO, headers={"Content-Type": "image/jpeg"}).json()
        assert codes["model"] == "tiny"
        asked = [{"type": "image_codes", "image_codes": {"indices": codes["data"][0]["indices"]}}]
        messages = [{"role": "user", "content": [*asked, {"type": "text", "text": "What style is it?"}]}]
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": messages}, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "A photograph."
        found: list[httpx.Response] = []
        body = {"prompt": "a red apple", "preset": "balanced", "stream": True, "partial_scales": [1]}
        first = threading.Event()

        def draw() -> None:
            with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                first.set()
                events = [line for line in lines if line.startswith("event")]
                assert events == ["event: image_generation.completed"]
                found.append(answer)

        thread = threading.Thread(target=draw)
        thread.start()
        assert first.wait(60)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert found[0].status_code == 200
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_mistakes_at_the_start_are_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, said = failure("--port", str(taken.getsockname()[1]))
        assert status == 2 and "address already in use" in said and "--port" in said
    (tmp_path / "empty").write_text("")
    for options, wanted in (
        (("--tokenizer", str(tmp_path)), "no bundle"),
        (("--api-key-file", str(tmp_path / "none")), "cannot be read"),
        (("--api-key-file", str(tmp_path / "empty")), "no key"),
        (("--config", str(tmp_path / "none")), "no file"),
        (("--port", "many"), "port"),
        (("--host", "no.such.host.invalid"), "Nothing can listen"),
    ):
        status, said = failure("--port", "0", *options)
        assert (status, said.lower().count(wanted.lower()) > 0) == (2, True), said
    status, said = failure(TOKENFLOW_SERVE_TIMEOUT="soon")
    assert status == 2 and "timeout" in said


def test_beside_a_tokenizer_on_openvino_language_models_run_on_onnxruntime(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tokenflow-sdk[openvino]'")
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path))
    with serve(backend="openvino") as url:
        drawn = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a red apple"}, timeout=60)
    assert drawn.status_code == 200
    assert EngineCache().entries() != []


def test_a_model_that_cannot_be_opened_ends_the_server(mini_understander: Path) -> None:
    # Found when it is opened: it reads another tokenizer's codes than the one that is served.
    status, said = failure("--port", "0", "--understander", str(mini_understander))
    assert status == 2
    assert "codebook" in said


def test_an_end_while_models_open_waits_for_the_one_that_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(access_log=False, threads=1, drain=1)
    app, begun, opened = create_app(settings), threading.Event(), Tokenizer.open
    models: Models = app.state.models

    def slowly(*given: Any) -> Tokenizer:
        begun.set()
        assert comes_true(lambda: models.ending)
        return opened(*given)

    monkeypatch.setattr(Tokenizer, "open", slowly)
    with listening(app, settings):
        assert begun.wait(60)
    assert (models.generator, models.ready) == (None, False)


@pytest.mark.parametrize("without", [("--tokenizer", "{bundle}"), ("--generator", "none", "--understander", "none")])
def test_a_server_without_a_model_says_so(mini_bundle: Path, without: tuple[str, ...]) -> None:
    with running(*(word.format(bundle=mini_bundle) for word in without)) as served:
        url = served.url
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cat"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "?"}]})
        assert answer.status_code == 404


def test_a_head_without_end_is_refused_and_a_pictures_odd_profile_is_not_logged() -> None:
    with running("--generator", "none") as served:
        odd = io.BytesIO()
        Image.new("RGB", (8, 8)).save(odd, "PNG", icc_profile=b"no profile")
        assert (
            httpx.post(
                f"{served.url}/v1/images/tokens", content=odd.getvalue(), headers={"Content-Type": "image/png"}
            ).status_code
            == 200
        )
        with socket.create_connection(("127.0.0.1", httpx.URL(served.url).port), timeout=60) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + 1500 * (b"X-Long: " + 90 * b"x" + b"\r\n"))
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert httpx.get(f"{served.url}/healthz").status_code == 200


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    """A server whose clients have a second for everything; it has no models."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(LARGE if scope["path"] == "/large" else b"small")(scope, receive, send)

    settings = Settings(body_timeout=1, max_body_mb=0.001, access_log=False, drain=1)
    with listening(Guard(app, settings, Metrics(), []), settings) as url:
        yield url


def connected(url: str, sent: bytes, buffer: int | None = None) -> socket.socket:
    """A client that has sent something."""
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", httpx.URL(url).port or 0))
    connection.sendall(sent)
    return connection


def test_no_client_holds_a_connection_by_sending_now_and_then(impatient: str) -> None:
    head = b"%s / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    cases = [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost: local", b""),
        (head % (b"GET", 0), b"HTTP/1.1 200"),
        (head % (b"GET", 10), b"HTTP/1.1 200"),  # a body that nobody reads
        (head % (b"POST", 10), b"HTTP/1.1 408"),
        (head % (b"POST", 10**9), b"HTTP/1.1 413"),
    ]
    clients = [(connected(impatient, sent), answer, bytearray()) for sent, answer in cases]
    left, deadline = list(clients), time.monotonic() + 20
    while left and time.monotonic() < deadline:
        for client in list(left):
            connection, answer, found = client
            connection.settimeout(0.02)
            with suppress(TimeoutError):
                try:
                    if piece := connection.recv(10_000):
                        found += piece
                    else:
                        left.remove(client)
                        continue
                    if found or not answer:
                        connection.sendall(b"x")  # of a body, or of a head that never ends
                except ConnectionError:
                    left.remove(client)
    for connection, answer, found in clients:
        connection.close()
        assert found.startswith(answer)
    assert not left, "some are held"


def test_no_client_holds_an_answer_by_not_reading_it(impatient: str) -> None:
    ask = b"GET /large HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    clients = [connected(impatient, ask % more, 4096) for more in (b"", b"Connection: close\r\n")]
    time.sleep(2)
    for connection in clients:
        found = 0
        with connection, suppress(ConnectionError):
            while piece := connection.recv(2**20):
                found += len(piece)
        assert found < len(LARGE)


def test_a_client_that_reads_and_asks_keeps_its_connection(impatient: str) -> None:
    ask = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(impatient, b"", 4096) as connection:
        for _ in range(3):
            time.sleep(0.4)
            connection.sendall(ask)
            left = len(LARGE)
            while left > 0:
                left -= len(connection.recv(2**20))


def test_other_servers_run_the_factory() -> None:
    code = "import uvicorn; c = uvicorn.Config('tokenflow_sdk.server:create_app', factory=True); c.load(); print(c.loaded)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"
