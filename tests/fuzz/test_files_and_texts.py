"""Random and damaged pictures, `.tfc` files, texts and records give a result or a named error."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, features

from tests.engines.test_cache import KEY
from tests.support.fuzzing import MODES, examples
from tests.support.mini_understander import byte_fallback_tokenizer, byte_level_tokenizer
from tokenflow_sdk import BuildConfig, Codes, TokenFlowError
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.errors import CodesError
from tokenflow_sdk.generation.prompt import PromptEncoder
from tokenflow_sdk.parity.certificate import Certificate
from tokenflow_sdk.pictures.images import preprocess
from tokenflow_sdk.pictures.preparation import PREPROCESS_MODES
from tokenflow_sdk.understanding.chat_text import TextStream

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

# Formats that Pillow writes; of the others there are only files of random bytes.
FORMATS = [
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "DIB", "PCX", "SGI", "TGA"),
    *(name for name, module in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(module)),
]
BEGINNINGS = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"8BPS\0\x01",
    b"qoif",
    b"II*\0",
    b"RIFF\x20\0\0\0WEBP",
    b"\0\0\1\0",
    b"P6 ",
]
CODES = Codes(np.arange(30), (1, 2, 3, 4), 500, "mini", "ab" * 32)


def picture(name: str, mode: str) -> bytes:
    """A small picture in a format, of a mode if the format has it."""
    image, buffer = Image.new("RGB", (24, 17), (200, 30, 90)), io.BytesIO()
    try:
        (image.convert(mode) if mode != "RGB" else image).save(buffer, name)
    except (OSError, ValueError, KeyError):
        buffer = io.BytesIO()
        image.save(buffer, name)
    return buffer.getvalue()


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Some bytes changed, left out or put in, and perhaps the end cut off."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(0, 5))):
        start = data.draw(st.integers(0, len(found)))
        stop = start + data.draw(st.integers(0, 4))
        found[start:stop] = data.draw(st.binary(max_size=4))
    return bytes(found[: data.draw(st.integers(0, len(found)))] if data.draw(st.booleans()) else found)


@examples(300)
@given(st.sampled_from(FORMATS), st.sampled_from(MODES), st.data())
def test_damaged_pictures(name: str, mode: str, data: st.DataObject) -> None:
    content = damaged(picture(name, mode), data)
    try:
        fitted = preprocess(content, 16, data.draw(st.sampled_from(PREPROCESS_MODES)), fast=data.draw(st.booleans()))
        assert fitted.shape == (16, 16, 3)
    except TokenFlowError as error:
        assert error.hint


@examples(200)
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=200))
def test_random_pictures(beginning: bytes, rest: bytes) -> None:
    try:
        assert preprocess(beginning + rest, 16, "crop").shape == (16, 16, 3)
    except TokenFlowError as error:
        assert error.hint


@examples(300)
@given(st.data())
def test_damaged_codes(data: st.DataObject) -> None:
    content = damaged(CODES.to_bytes(), data)
    try:
        assert Codes.from_bytes(content).to_bytes() == content
    except CodesError as error:
        assert error.hint


@pytest.fixture(scope="module")
def prompts(mini_generator: Path) -> PromptEncoder:
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import GeneratorConfig

    bundle = Bundle.open(mini_generator, GeneratorConfig)
    return PromptEncoder(bundle.asset_path("tokenizer"), bundle.config)


@examples(200)
@given(
    prompt=st.one_of(st.text(st.characters(), max_size=60), st.lists(st.integers(-5, 700), max_size=9)), strict=st.booleans()
)
@example(prompt="<s>[PAD]<vq_token_3>", strict=True)
def test_prompts(prompts: PromptEncoder, prompt: str | list[int], strict: bool) -> None:
    try:
        ids = prompts.encode(prompt, strict)
    except TokenFlowError as error:
        assert error.hint
    else:
        assert 1 <= len(ids) < prompts._config.max_prompt


@examples(150)
@given(st.sampled_from([byte_level_tokenizer(), byte_fallback_tokenizer()]), st.lists(st.integers(-1, 400), max_size=150))
def test_texts_of_any_tokens(tokenizer: object, tokens: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens if token >= 0]
    "".join([*pieces, stream.flush()]).encode()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@examples(200)
@given(st.data())
def test_records_of_engines(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A record that something else wrote over counts as none, wherever it is read."""
    cache = EngineCache(tmp_path_factory.getbasetemp() / "records")
    with cache.building(KEY):
        cache.put(KEY, b"engine", BuildConfig().to_json())
    record = cache._record(KEY)
    content = json.loads(record.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(json_values)
        record.write_text(json.dumps(content))
    else:
        record.write_bytes(damaged(record.read_bytes(), data))
    found = cache.get(KEY)
    assert found is None or found.path.read_bytes() == b"engine"
    for entry in cache.entries():
        for certificate in entry.certificates.values():
            Certificate.from_json(certificate)
        BuildConfig.from_json(entry.build_config)
    cache.certify(KEY, "sm86", {})
