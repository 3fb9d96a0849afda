from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.support.waiting import comes_true
from tokenflow_sdk import Codes, Generator
from tokenflow_sdk.request_runner import RequestStream

PROMPT = "a cat"


@pytest.fixture(scope="module")
def generator(mini_generator: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(mini_generator, threads=1) as opened:
        yield opened


def pixels(text: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text or ""))))


def test_openais_client_draws_what_the_sdk_draws(openais: openai.OpenAI, generator: Generator) -> None:
    extra = {"seed": 5, "preset": "balanced", "cfg_scale": 3.0, "negative_prompt": "a dog"}
    answer = openais.images.generate(model="gpt-image-1", prompt=PROMPT, n=2, extra_body=extra)
    wanted = generator.generate(PROMPT, n=2, **extra)  # type: ignore[arg-type]
    assert answer.data is not None and answer.usage is not None
    for found, image in zip(answer.data, wanted.images, strict=True):
        np.testing.assert_array_equal(pixels(found.b64_json), np.asarray(image))
        assert found.url is None
    assert answer.usage.output_tokens == sum(map(len, wanted.codes))
    assert answer.usage.input_tokens == wanted.prompt_tokens > 0
    size = generator.tokenizer.config.image_size
    assert (answer.size, answer.output_format) == (f"{size}x{size}", "png")
    tfc = [Codes.from_bytes(base64.b64decode(each.tfc)) for each in answer.data]  # type: ignore[attr-defined]
    assert tfc == list(wanted.codes)
    # Like those of the command line, the files say how they were drawn.
    chunk = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json or ""))).text["tokenflow"]  # type: ignore[attr-defined]
    assert json.loads(chunk) == {**wanted.metadata, "image": 1}


def test_openais_client_streams_previews(openais: openai.OpenAI, generator: Generator) -> None:
    drawn = generator.generate(PROMPT, seed=1)
    stream = openais.images.generate(model="gpt-image-1", prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1})
    events = list(stream)
    assert [each.type for each in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [events[0].partial_image_index, events[1].partial_image_index] == [0, 1]  # type: ignore[union-attr]
    np.testing.assert_array_equal(pixels(events[-1].b64_json), np.asarray(drawn.images[0]))
    scales = [each.scale for each in events[:2]]  # type: ignore[union-attr]
    for event, scale in zip(events, scales, strict=False):
        preview = generator.tokenizer.decode(drawn.codes[0].truncate(scale))
        np.testing.assert_array_equal(pixels(event.b64_json), np.asarray(preview))
    assert events[-1].usage.total_tokens > 0  # type: ignore[union-attr]


def test_events_have_names_and_scales_can_be_asked(url: str, generator: Generator) -> None:
    body = {"prompt": PROMPT, "stream": True, "partial_scales": [1, 2, 3, 4], "seed": 2, "output_format": "webp"}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
        text = answer.read().decode()
    events = [dict(line.split(": ", 1) for line in each.splitlines()) for each in text.strip().split("\n\n")]
    data = [json.loads(each["data"]) for each in events]
    assert [each["event"] for each in events] == [each["type"] for each in data]
    assert [each.get("scale") for each in data] == [1, 2, 3, 4, None]
    assert Image.open(io.BytesIO(base64.b64decode(data[-1]["b64_json"]))).format == "WEBP"


def test_a_url_is_a_data_url_and_jpeg_is_jpeg(url: str) -> None:
    body = {"prompt": PROMPT, "response_format": "url", "output_format": "jpeg", "output_compression": 50, "style": "vivid"}
    (found,) = httpx.post(f"{url}/v1/images/generations", json=body).json()["data"]
    head, _, text = found["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(text))).format == "JPEG"


@pytest.mark.parametrize(
    "wrong, status",
    [
        ({"prompt": ""}, 422),
        ({"prompt": "\ud800"}, 400),
        ({"prompt": "cat " * 5000}, 422),
        ({}, 422),
        ({"prompt": PROMPT, "n": 11}, 422),
        ({"prompt": PROMPT, "n": "many"}, 422),
        ({"prompt": PROMPT, "size": "1024x1024"}, 422),
        ({"prompt": PROMPT, "background": "transparent"}, 422),
        ({"prompt": PROMPT, "preset": "best"}, 422),
        ({"prompt": PROMPT, "cfg_scale": 1e9}, 422),
        ({"prompt": PROMPT, "seed": -1}, 422),
        ({"prompt": PROMPT, "partial_scales": [5], "stream": True}, 422),
        ({"prompt": PROMPT, "model": "dall-e-9"}, 404),
    ],
)
def test_what_cannot_be_drawn_is_named(url: str, wrong: dict[str, object], status: int) -> None:
    # As text, because httpx cannot write half a character.
    body = json.dumps(wrong)
    answer = httpx.post(f"{url}/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_many_requests_are_read_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than asyncio has threads, 32 at most: each begins only when all are being read."""
    count = 36
    together, begun = threading.Barrier(count), set[int]()
    following = RequestStream.__next__

    def next_piece(stream: RequestStream[object, object]) -> object:
        if id(stream) not in begun:
            begun.add(id(stream))
            together.wait(60)
        return following(stream)

    monkeypatch.setattr(RequestStream, "__next__", next_piece)
    with ThreadPoolExecutor(count) as pool, httpx.Client(timeout=120, limits=httpx.Limits(max_connections=count)) as client:
        body = {"prompt": PROMPT}
        answers = list(pool.map(lambda _: client.post(f"{url}/v1/images/generations", json=body).status_code, range(count)))
    assert answers == [200] * count


def held_pages(url: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#"))
    return float(lines['tokenflow_pages{model="generator"}']) - float(lines['tokenflow_pages_free{model="generator"}'])


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_its_pages(url: str, streaming: bool) -> None:
    body = {"prompt": PROMPT, "n": 3, "stream": streaming, "partial_scales": [1], "preset": "paper"}
    for _ in range(3):
        with httpx.Client(timeout=0.05 if not streaming else 30) as client:
            if streaming:
                with client.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with suppress(httpx.ReadTimeout):
                    client.post(f"{url}/v1/images/generations", json=body)
    assert comes_true(lambda: not held_pages(url))
