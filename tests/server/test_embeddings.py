from __future__ import annotations

import base64
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests.conftest import ROOT
from tokenflow_sdk import Tokenizer

PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_work_with_openais_client(openais: openai.OpenAI, mini_bundle: Path, encoding: str) -> None:
    picture = f"data:image/jpeg;base64,{base64.b64encode(PHOTO).decode()}"
    answer = openais.embeddings.create(model="clip", input=[picture, picture], encoding_format=encoding)  # type: ignore[arg-type]
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        wanted = tokenizer.semantic(tokenizer.encode(PHOTO), pool="mean")
    vectors = [
        np.frombuffer(base64.b64decode(each.embedding), "<f4") if isinstance(each.embedding, str) else each.embedding
        for each in answer.data
    ]
    np.testing.assert_allclose(vectors, [wanted, wanted], rtol=1e-6)
    # What the client asks for where nothing is said, it reads itself.
    assert len(openais.embeddings.create(model="gpt-image-1", input=picture).data[0].embedding) == len(wanted)


@pytest.mark.parametrize("given, code", [([], "unprocessable"), (["AA=="] * 17, "too_many_images"), ([1] * 9, "unprocessable")])
def test_what_cannot_be_embedded_is_named(client: httpx.Client, given: list[object], code: str) -> None:
    answer = client.post("/v1/embeddings", json={"input": given})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
