from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import ArgumentError, OutputError
from tokenflow_sdk.generation.results import METADATA_KEY, GeneratedScale, Generation
from tokenflow_sdk.model.sampling import Pass, SamplingParams

decoded: list[int] = []


class Counting(FakeSession):
    def _infer(self, feeds, outputs):  # type: ignore[no-untyped-def]
        decoded.extend(next(iter(feeds.values()))[:, 0].tolist())
        return super()._infer(feeds, outputs)


@pytest.fixture
def tokenizer() -> Iterator[Tokenizer]:
    def open_session(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        return Counting(path, entry, options)

    decoded.clear()
    yield Tokenizer(fake_bundle(), batch_limit=4, open_session=open_session)


def generation(tokenizer: Tokenizer, n: int = 2) -> Generation:
    codes = tuple(tokenizer.codes(np.full(5, 40 + i)) for i in range(n))
    params = SamplingParams((Pass(5, 0.5), Pass(1, 0)), 2.5, 7)
    return Generation(codes, params, (0.1, 0.2), tokenizer, "a café", None, "ab" * 8)


def test_images_are_decoded_once(tokenizer: Tokenizer) -> None:
    made = generation(tokenizer)
    first = made.images
    first[0].putpixel((0, 0), (1, 2, 3))
    again = made.images
    assert decoded == [40, 41]
    assert [image.getpixel((7, 7)) for image in again] == [(40,) * 3, (41,) * 3]
    assert again[0] is first[0]
    first.clear()
    assert len(made.images) == 2
    assert made == generation(tokenizer)
    assert replace(made, timings=()).images[0] is not again[0]


def test_files_say_how_they_were_drawn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = generation(tokenizer)
    paths = made.save(tmp_path / "apple.png")
    assert [path.name for path in paths] == ["apple-1.png", "apple-2.png"]
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            assert image.tobytes() == made.images[i].tobytes()
            found = json.loads(image.text[METADATA_KEY])  # type: ignore[attr-defined]
        assert found == {
            "prompt": "a café",
            "negative_prompt": None,
            "n": 2,
            "seed": 7,
            "cfg_scale": 2.5,
            "unguided_scales": 0,
            "passes": [[5, 0.5], [1, 0.0]],
            "model": "ab" * 8,
            "image": i,
        }
    assert generation(tokenizer, 1).save(str(tmp_path / "one.PNG")) == [tmp_path / "one.PNG"]
    with pytest.raises(ArgumentError, match=r"apple\.jpg is no PNG file.*images\[0\]\.save"):
        made.save("apple.jpg")
    with pytest.raises(OutputError):
        made.save(tmp_path / "no" / "such" / "apple.png")


def test_notebooks_show_the_images(tokenizer: Tokenizer) -> None:
    one, two = generation(tokenizer, 1), generation(tokenizer)
    with Image.open(io.BytesIO(one._repr_png_())) as image:
        assert image.size == (8, 8)
    with Image.open(io.BytesIO(two._repr_png_())) as sheet:
        assert sheet.width > 16
        assert {(40,) * 3, (41,) * 3} <= {color for _, color in sheet.getcolors()}
    step = GeneratedScale(1, (two.codes[0].truncate(1),), tokenizer)
    with Image.open(io.BytesIO(step._repr_png_())) as image:
        assert image.getpixel((0, 0)) == (40,) * 3


def test_pickles_are_small_and_decode_again(mini_bundle: Path) -> None:
    with Tokenizer.from_pretrained(mini_bundle, threads=1) as tokenizer:
        codes = tokenizer.codes(np.zeros(30, int))
        made = Generation((codes,), SamplingParams(), (0.1,), tokenizer, (5, 6), None, "ab" * 8)
        before = len(pickle.dumps(made))
        image = made.images[0]
        data = pickle.dumps(made)
        assert len(data) == before
        copy = pickle.loads(data)  # noqa: S301
        assert copy == made
        assert copy.images[0].tobytes() == image.tobytes()
        copy.tokenizer.close()
