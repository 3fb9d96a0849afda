"""Thousands of malformed requests get 4xx answers, and the server answers afterwards."""

from __future__ import annotations

import base64
import io
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.server.conftest import Serve
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.server.bodies import TFC

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()
PATHS = [f"/v1/images/{name}" for name in ("tokens", "decode", "features", "semantic", "generations")]
PATHS += ["/v1/embeddings", "/v1/chat/completions", *(f"/v2/models/{name}/infer" for name in ("encode", "decode", "semantic"))]
KINDS = ["image/png", "image/jpeg", TFC, "application/octet-stream", "application/json", "text/plain", ""]


def bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in a few hundred bytes, which says more than it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Some bytes of a file cut off, changed, doubled or added."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(found) + 1)
        match chance.randrange(4):
            case 0:
                del found[place:]
            case 1:
                found[place : place + 1] = chance.randbytes(1)
            case 2:
                found[place:place] = found[: chance.randrange(200)]
            case _:
                found += chance.randbytes(chance.randrange(50))
    return bytes(found)


def value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    text = base64.b64encode(PHOTO[: chance.choice([0, 10, 1000])]).decode()
    simple = [
        None,
        True,
        0,
        -1,
        2**70,
        1.5,
        1e308,
        "",
        "a cat",
        text,
        f"data:image/png;base64,{text}",
        "https://a.example/x.png",
    ]
    if depth > 3 or chance.random() < 0.6:
        return chance.choice(simple)
    if chance.random() < 0.5:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return fields(chance, depth + 1)


def fields(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """An object with some of the interface's fields, and any values."""
    names = (
        "image images data tfc indices codebook scales prompt n size seed stream preset cfg_scale messages role content type "
    )
    names += (
        "input model encoding_format dimensions inputs name shape datatype parameters binary_data_size outputs id max_tokens"
    )
    return {chance.choice(names.split()): value(chance, depth + 1) for _ in range(chance.randrange(6))}


def form(chance: random.Random, files: list[bytes]) -> tuple[bytes, str]:
    """A multipart form, often damaged."""
    body = b""
    for _ in range(chance.randrange(4)):
        name = chance.choice(["image", "images", "file", "tfc", "scales", "x", 'a"b', ""])
        file = f'; filename="{chance.choice(["a.png", "", "../../x"])}"' if chance.random() < 0.7 else ""
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + chance.choice(files) + b"\r\n"
    body += b"--b--\r\n"
    kind = chance.choice(["multipart/form-data; boundary=b", "multipart/form-data; boundary=c", "multipart/form-data"])
    return (damaged(chance, body) if chance.random() < 0.5 else body), kind


def request(chance: random.Random, files: list[bytes]) -> tuple[str, bytes, dict[str, str]]:
    """A path, a body and headers, of which something is wrong nearly always."""
    headers = {"Accept": chance.choice(["*/*", "application/octet-stream", "application/x-npy", "a/b;q=x"])}
    path = chance.choice(PATHS) + chance.choice(["", "", "?scales=0", "?scales=99", "?format=gif", "?preprocess=x", "?%00=%ff"])
    match chance.randrange(4):
        case 0:
            body = json.dumps(fields(chance)).encode()
            headers["Content-Type"] = "application/json"
        case 1:
            body, headers["Content-Type"] = form(chance, files)
        case 2:
            body = damaged(chance, json.dumps(fields(chance)).encode())
            headers["Content-Type"] = chance.choice(KINDS)
        case _:
            body, headers["Content-Type"] = damaged(chance, chance.choice(files)), chance.choice(KINDS)
    if chance.random() < 0.2:
        headers["Inference-Header-Content-Length"] = chance.choice(["0", "10", "-1", "x", str(len(body)), "99999999"])
    return path, body, headers


@pytest.fixture(scope="module")
def files(mini_bundle: Path) -> list[bytes]:
    codes: Codes = Tokenizer.from_pretrained(mini_bundle).encode(PHOTO)
    small = io.BytesIO()
    Image.new("RGB", (30, 30)).save(small, "PNG")
    return [PHOTO, codes.to_bytes(), small.getvalue(), bomb(), b"", b"TFC", b"\x89PNG\r\n\x1a\n"]


def send_all(url: str, count: int, files: list[bytes]) -> None:
    wrong = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for seed in range(count):
            path, body, headers = request(random.Random(seed), files)
            answer = client.post(path, content=body, headers=headers)
            if answer.status_code >= 500 or (answer.status_code >= 400 and set(answer.json()) != {"error"}):
                wrong.append((seed, path, answer.status_code, answer.text[:200]))
        assert not wrong, wrong[:5]
        good = client.post("/v1/images/tokens", content=PHOTO, headers={"Content-Type": "image/jpeg"})
        assert good.status_code == 200


def test_malformed_requests_get_4xx_answers(url: str, files: list[bytes]) -> None:
    send_all(url, 200, files)


@pytest.mark.parametrize("path", PATHS)
def test_a_million_values_are_refused_before_they_are_made(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json={"any": [{}] * 10**6})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.slow
def test_two_thousand_malformed_requests_get_4xx_answers(url: str, files: list[bytes]) -> None:
    send_all(url, 2000, files)


@pytest.mark.slow
def test_what_the_interface_describes_never_fails(serve: Serve, tmp_path: Path) -> None:
    with serve() as url:
        options = ["--checks", "not_a_server_error", "--max-examples", "25", "--request-timeout", "60", "--seed", "1"]
        program = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "--from", "schemathesis", "schemathesis"]
        command = [*program, "run", f"{url}/openapi.json", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:]
        assert httpx.get(f"{url}/readyz").status_code == 200
