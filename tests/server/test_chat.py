from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ROOT
from tokenflow_sdk import AnswerParams, Codes, Understander

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(PHOTO).decode()}"}}
QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def understander(mini_understander: Path) -> Iterator[Understander]:
    with Understander.from_pretrained(mini_understander, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def codes(understander: Understander) -> Codes:
    return understander.tokenizer.encode(PHOTO, preprocess=understander.config.preprocess)


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


def ask(openais: openai.OpenAI, messages: list[Any], **settings: Any) -> Any:
    return openais.chat.completions.create(model="gpt-image-1", messages=messages, **({"temperature": 0} | settings))


def test_openais_client_gets_the_answer_of_the_sdk(openais: openai.OpenAI, understander: Understander, codes: Codes) -> None:
    wanted = understander.answer(codes, "What is this?", params=AnswerParams(max_tokens=6))
    for parts in ((QUESTION, PICTURE), (PICTURE, QUESTION)):
        found = ask(openais, [user(*parts)], max_tokens=6)
        assert found.choices[0].message.content == wanted.text
        assert found.choices[0].finish_reason == wanted.finish
        assert found.usage.prompt_tokens == wanted.prompt_tokens
        assert found.usage.completion_tokens == len(wanted.token_ids)


def test_stored_codes_are_a_part_of_their_own(openais: openai.OpenAI, understander: Understander, codes: Codes) -> None:
    part = {"type": "image_codes", "image_codes": {"tfc": base64.b64encode(codes.to_bytes()).decode()}}
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    wanted = understander.answer([codes, codes], "Same?", params=AnswerParams(max_tokens=4, **drawn))  # type: ignore[arg-type]
    found = ask(openais, [user(part, PICTURE, {"type": "text", "text": "Same?"})], max_completion_tokens=4, **drawn)
    assert found.choices[0].message.content == wanted.text


def test_a_conversation_goes_on(openais: openai.OpenAI, understander: Understander, codes: Codes) -> None:
    chat = understander.chat(codes, turns=[("What is this?", "A cat.")])
    wanted = chat.ask("And that?", max_tokens=5, params=AnswerParams())
    messages = [user(PICTURE, QUESTION), {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And that?"}]
    assert ask(openais, messages, max_tokens=5).choices[0].message.content == wanted.text


def test_openais_client_streams(openais: openai.OpenAI, understander: Understander, codes: Codes, url: str) -> None:
    wanted = understander.answer(codes, "What is this?", params=AnswerParams(max_tokens=6))
    chunks = list(ask(openais, [user(PICTURE, QUESTION)], max_tokens=6, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted.text
    assert chunks[-2].choices[0].finish_reason == wanted.finish
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], wanted.prompt_tokens + len(wanted.token_ids))
    body = {"messages": [user(PICTURE, QUESTION)], "stream": True, "max_tokens": 1}
    lines = httpx.post(f"{url}/v1/chat/completions", json=body).text.split("\n\n")
    assert (lines[-2:], len({each.split(":")[0] for each in lines[:-1]})) == (["data: [DONE]", ""], 1)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "messages, status",
    [
        ([], 422),
        ([user(QUESTION)], 422),
        ([user(PICTURE)], 422),
        ([SYSTEM, user(PICTURE, QUESTION)], 422),
        ([user(PICTURE, QUESTION), user(QUESTION)], 422),
        ([user(PICTURE, QUESTION), {"role": "assistant", "content": "A cat."}], 422),
        ([user(PICTURE, QUESTION), {"role": "assistant", "content": "A cat."}, user(PICTURE, QUESTION)], 422),
        ([user({"type": "image_url"}, QUESTION)], 422),
        ([user({"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}, QUESTION)], 422),
        ([user({"type": "image_codes", "image_codes": {"tfc": "AAAA"}}, QUESTION)], 422),
        ([user(PICTURE, {"type": "text", "text": "x" * 20_000})], 422),
        ([{"role": "tool", "content": "x"}], 422),
    ],
)
def test_what_cannot_be_answered_is_named(url: str, messages: list[Any], status: int) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_settings_that_cannot_work_are_named(url: str) -> None:
    for wrong in ({"temperature": -1}, {"n": 2}, {"top_p": 3}, {"max_tokens": 10**9}, {"repetition_penalty": 0}):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [user(PICTURE, QUESTION)], **wrong})
        assert answer.status_code == 422, answer.text
