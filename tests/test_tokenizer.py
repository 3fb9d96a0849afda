from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import (
    ArgumentError,
    ArrayError,
    CodebookMismatchError,
    CodesRangeError,
    ImageReadError,
    ImageShapeError,
)

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.fixture
def made() -> list[FakeSession]:
    return []


@pytest.fixture
def fake(made: list[FakeSession]) -> Tokenizer:
    def open_session(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        made.append(FakeSession(path, entry, options))
        return made[-1]

    return Tokenizer(fake_bundle(), batch_limit=2, open_session=open_session)


def crops(count: int, size: int) -> np.ndarray:
    photo = Image.open(PHOTO).convert("RGB")
    boxes = [(7 * i, 5 * i, 7 * i + 150, 5 * i + 150) for i in range(count)]
    return np.stack([np.asarray(photo.crop(box).resize((size, size))) for box in boxes])


def test_graphs_load_on_first_use_and_once(fake: Tokenizer, made: list[FakeSession]) -> None:
    assert made == []
    assert fake.device == "not loaded"
    codes = fake.encode(np.full((8, 8, 3), 7, np.uint8))
    fake.encode(np.zeros((8, 8, 3), np.uint8))
    assert len(made) == 1
    fake.load()
    assert len(made) == 3
    assert codes.indices.tolist() == [7] * 5
    assert fake.device == "cpu"


def test_large_batches_are_split(fake: Tokenizer, made: list[FakeSession]) -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    assert fake.encode_array(images)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert made[0].calls == [(2, ("code_indices",)), (2, ("code_indices",)), (1, ("code_indices",))]
    assert [codes.indices[0] for codes in fake.encode_batch(list(images))] == [0, 1, 2, 3, 4]
    assert fake.encode_batch([]) == []
    assert fake.decode_batch([]) == []
    assert fake.decode_array(np.full((3, 5), 9, np.int32)).shape == (3, 8, 8, 3)


def test_encode_batch_takes_any_iterable(fake: Tokenizer) -> None:
    assert len(fake.encode_batch(np.full((8, 8), i, np.uint8) for i in range(3))) == 3


def test_encode_iter_gives_the_codes_of_encode_in_order(tokenizer: Tokenizer) -> None:
    photo, data = crops(3, 90), PHOTO.read_bytes()
    images = [
        PHOTO,
        data,
        str(PHOTO),
        bytearray(data),
        memoryview(data),
        photo[0],
        torch.from_numpy(photo[1]),
        photo[2][:, :, 0],
    ]
    images += [Image.open(PHOTO), Image.fromarray(photo[0]), io.BytesIO(data), crops(1, 64)[0]]
    found = list(tokenizer.encode_iter(images, preprocess="pad", workers=3))
    expected = [tokenizer.encode(image, preprocess="pad") for image in images]
    assert found == expected
    assert [codes.preparation for codes in found] == [codes.preparation for codes in expected]
    assert (found[0].preparation, found[-1].preparation) == (tokenizer.preparation("pad"), None)


def test_encode_iter_keeps_what_its_source_changes_afterwards(fake: Tokenizer) -> None:
    """A camera that fills one array again and again, frames of one image, one open file."""
    array, image, file = np.zeros((8, 8), np.uint8), Image.new("L", (8, 8)), io.BytesIO()
    for reused in (array, memoryview(array).cast("B"), torch.from_numpy(array), image, file):

        def camera(reused: object = reused) -> Iterator[object]:
            for level in range(9):
                array[:] = level
                image.paste(level, (0, 0, 8, 8))
                file.seek(0)
                file.truncate()
                Image.fromarray(array).save(file, "PNG")
                yield file.getvalue() if isinstance(reused, memoryview) else reused

        assert [codes.indices[0] for codes in fake.encode_iter(camera())] == list(range(9))  # type: ignore[arg-type]


def test_encode_iter_yields_errors_of_pictures_and_raises_those_of_the_engine(fake: Tokenizer) -> None:
    images = [np.zeros((8, 8), np.uint8), "missing.png", np.zeros((8, 8)), object(), np.ones((8, 8), np.uint8)]
    found = list(fake.encode_iter(images, errors="yield"))  # type: ignore[arg-type]
    assert [type(each).__name__ for each in found] == ["Codes", "ImageReadError", "ArrayError", "ArgumentError", "Codes"]
    with pytest.raises(ImageReadError, match=r"missing\.png"):
        list(fake.encode_iter(images))  # type: ignore[arg-type]
    running = fake.encode_iter((np.zeros((8, 8), np.uint8) for _ in itertools.count()), errors="yield")
    next(running)
    fake.close()
    with pytest.raises(ArgumentError, match="closed"):
        list(running)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenflow")]


def test_encode_iter_checks_its_arguments_at_once(fake: Tokenizer) -> None:
    with pytest.raises(ArgumentError, match=r"encode_iter takes several pictures.*encode_iter\(\[image\]\)"):
        fake.encode_iter("photo.png")
    for wrong in ({"workers": 0}, {"workers": "2"}, {"errors": "skip"}, {"errors": None}, {"preprocess": "cut"}, {"color": 1}):
        with pytest.raises(ArgumentError, match=str(next(iter(wrong.values())))):
            fake.encode_iter([], **wrong)  # type: ignore[call-overload]


def test_a_cpu_has_as_many_calls_at_once_as_fill_its_cores(fake: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow_sdk.tokenizer.available_cores", lambda: 8)
    assert fake.lanes() == 2
    for threads, lanes in ((1, 8), (2, 4), (8, 2), (16, 2)):
        fake._threads = threads
        assert fake.lanes() == lanes
    # The calls of a large model fill the cores themselves, of 8 threads those of 8 times as large ones.
    entry = fake.bundle.graph("encode")
    for size, threads, lanes in ((1e8, 1, 8), (1.6e9, None, 1), (7.9e8, 8, 2), (8e8, 8, 1), (9e9, 5, 2), (9e9, 9, 1)):
        large = replace(entry, files=tuple(replace(entry.files[0], size=int(part)) for part in (1e6, size - 1e6)))
        monkeypatch.setattr(fake, "bundle", replace(fake.bundle, graphs={"encode": large}))
        fake._threads = threads
        assert fake.lanes() == lanes
    monkeypatch.setattr(FakeSession, "device", "cuda:0")
    fake._threads = 1
    assert fake.lanes() == 2


@pytest.mark.parametrize(
    ("one", "name"),
    [
        (np.zeros((5, 256, 3), np.uint8), r"<array uint8\[5, 256, 3\]>"),
        (np.zeros((5, 256), np.uint8), r"<array uint8\[5, 256\]>"),
        ("photo.png", "photo.png"),
        (Path("photo.png"), "photo.png"),
        (b"1234", "<4 bytes>"),
        (io.BytesIO(b"1234"), "<BytesIO>"),
        (Image.new("RGB", (9, 8)), "<RGB image 9x8>"),
    ],
)
def test_one_picture_is_not_taken_for_several(fake: Tokenizer, one: object, name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"several pictures, and {name} is one.*encode_batch\(\[image\]\)"):
        fake.encode_batch(one)  # type: ignore[arg-type]


def test_an_array_of_pictures_is_several(fake: Tokenizer) -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    assert [codes.indices[0] for codes in fake.encode_batch(images)] == [0, 1, 2]
    paths = np.empty(1, object)
    paths[0] = PHOTO
    assert fake.encode_batch(paths) == fake.encode_batch([PHOTO])


def test_one_row_of_codes_is_not_taken_for_several(fake: Tokenizer) -> None:
    whole = fake.codes(np.array([9, 1, 2, 3, 4]))
    for one, kind in ((whole, "Codes"), (np.array([[9]]), "ndarray"), (5, "int")):
        with pytest.raises(ArgumentError, match=rf"takes a list of Codes, not {kind}.*decode_batch\(\[codes\]\)"):
            fake.decode_batch(one)  # type: ignore[arg-type]
    assert len(fake.decode_batch(codes for codes in (whole, whole))) == 2  # type: ignore[arg-type]


def test_partial_codes_are_padded_with_absent_scales(fake: Tokenizer) -> None:
    whole = fake.codes(np.array([9, 1, 2, 3, 4]))
    assert fake.features(whole.truncate(1))[:, 0].tolist() == [9, -1, -1, -1]
    assert np.asarray(fake.decode(whole.truncate(1))).max() == 9
    assert fake.decode_array(np.array([[9]])).max() == 9
    assert [picture.size for picture in fake.decode_batch([whole, whole.truncate(1)])] == [(8, 8)] * 2


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (np.zeros((1, 5)), ArrayError, "float64"),
        (np.zeros(5, int), ArrayError, r"codes\[None\]"),
        (np.zeros((0, 5), int), ArrayError, "B >= 1"),
        (np.zeros((1, 4), int), CodesRangeError, "Valid lengths are 1, 5"),
        (np.full((1, 5), 256), CodesRangeError, r"Code 256 at \[0, 0\].*0 \.\. 255"),
        (np.array([[0, 1, -2, 3, 4]]), CodesRangeError, r"Code -2 at \[0, 2\]"),
        (np.array([[0, 1, -1, 3, 4]]), CodesRangeError, "Scale 2 is absent .* in part"),
        (np.full((1, 5), 2**33), CodesRangeError, "Code 8589934592"),
    ],
)
def test_code_arrays_that_cannot_be_decoded(fake: Tokenizer, indices: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fake.decode_array(indices)


def test_features_of_many_are_those_of_each(tokenizer: Tokenizer) -> None:
    codes = [tokenizer.codes(row) for row in tokenizer.encode_array(crops(3, 64))]
    codes[1] = codes[1].truncate(2)
    rows = np.stack([each.padded() for each in codes])
    for graph, width in ((tokenizer.features, 40), (tokenizer.semantic, 20)):
        each = np.stack([graph(one) for one in codes])
        assert each.shape == (3, 16, width)
        for many in (codes, iter(codes), rows, torch.from_numpy(rows)):
            assert np.array_equal(graph(many), each)
        assert np.array_equal(graph(codes[0].indices[None]), each[:1])
        assert (graph([]).shape, graph([]).dtype) == ((0, 16, width), np.float32)
    pooled = tokenizer.semantic(codes, pool="mean")
    assert np.allclose(pooled, tokenizer.semantic(codes).astype(float).mean(1), atol=1e-6)
    assert np.array_equal(tokenizer.semantic(codes[2], pool="mean"), pooled[2])
    assert (tokenizer.semantic([], pool="mean").shape, pooled.dtype) == ((0, 20), np.float32)


def test_features_of_what_are_no_codes(fake: Tokenizer) -> None:
    row = np.array([9, 1, 2, 3, 4])
    for wrong, error, words in (
        ([fake.codes(row), row], ArgumentError, "Expected Codes, got ndarray"),
        ("p.tfc", ArgumentError, "Expected Codes, got str"),
        ([[fake.codes(row)]], ArgumentError, "Expected Codes, got list.*decode_batch for lists of Codes"),
        (7, ArgumentError, "codes cannot be of type int"),
        (row, ArrayError, r"codes\[None\]"),
        (row[None] * 99, CodesRangeError, "outside the codebook"),
    ):
        with pytest.raises(error, match=words):
            fake.features(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="pool='max' is no way to pool"):
        fake.semantic(fake.codes(row), pool="max")  # type: ignore[arg-type]


def test_codes_of_another_tokenizer_are_refused(fake: Tokenizer) -> None:
    other = Codes(np.zeros(5, int), (1, 2), 256, "other", "cd" * 32)
    for use in (fake.decode, fake.features, fake.semantic):
        with pytest.raises(CodebookMismatchError, match=r"made by other .*not by fake"):
            use(other)
    with pytest.raises(ArgumentError, match="Expected Codes, got str"):
        fake.decode("p.tfc")  # type: ignore[arg-type]


def test_graphs_that_there_are_not_are_named(fake: Tokenizer) -> None:
    with pytest.raises(ArgumentError, match="no graph 'nope'. Choose of: encode, decode, semantic, features"):
        fake.load("encode", "nope")
    assert fake.device == "not loaded"


def test_closed_tokenizers_say_so(fake: Tokenizer, made: list[FakeSession]) -> None:
    with fake:
        fake.load("encode")
    fake.close()
    assert made[0].closed == 1
    with pytest.raises(ArgumentError, match="closed"):
        fake.encode(np.zeros((8, 8), np.uint8))


def test_options_that_cannot_work(mini_bundle: Path) -> None:
    with pytest.raises(ArgumentError, match="batch_limit=0"):
        Tokenizer.from_pretrained(mini_bundle, batch_limit=0)
    for limit in ("2", 2.0, True):
        with pytest.raises(ArgumentError, match=f"batch_limit={limit!r} leaves no room"):
            Tokenizer.from_pretrained(mini_bundle, batch_limit=limit)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=f"batch_limit={limit!r} leaves no room"):
            Tokenizer(fake_bundle(), batch_limit=limit)  # type: ignore[arg-type]
    assert Tokenizer(fake_bundle(), batch_limit=np.int64(2)).batch_limit == 2  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="device"):
        Tokenizer.from_pretrained(mini_bundle, device="gpu")


def test_a_photo_goes_through(tokenizer: Tokenizer, tmp_path: Path) -> None:
    codes = tokenizer.encode(PHOTO)
    assert (len(codes), codes.variant, codes.complete) == (30, "mini_clip", True)
    assert tokenizer.encode(PHOTO.read_bytes()) == codes
    picture = tokenizer.decode(codes)
    assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert tokenizer.reconstruct(PHOTO).tobytes() == picture.tobytes()
    assert tokenizer.features(codes).shape == (16, 40)
    assert tokenizer.semantic(codes).shape == (16, 20)
    assert {array.dtype for array in (tokenizer.features(codes), tokenizer.semantic(codes))} == {np.dtype(np.float32)}
    codes.save(tmp_path / "p.tfc")
    assert tokenizer.decode(Codes.load(tmp_path / "p.tfc")).tobytes() == picture.tobytes()
    assert tokenizer.encode(PHOTO, preprocess="squash") != codes


@pytest.mark.parametrize("kind", ["clip", "vitamin", "siglip"])
def test_batches_and_single_pictures_give_the_same_codes(kind: str, mini_bundles: Callable[[str], Path]) -> None:
    with (
        Tokenizer.from_pretrained(mini_bundles(kind), threads=2, batch_limit=3) as batched,
        Tokenizer.from_pretrained(mini_bundles(kind), threads=2) as single,
    ):
        images = crops(7, single.config.image_size)
        codes = single.encode_array(images)
        assert np.array_equal(batched.encode_array(images), codes)
        assert np.array_equal(single.encode_array(images), codes)
        assert np.array_equal(np.concatenate([single.encode_array(image[None]) for image in images]), codes)
        assert np.abs(batched.decode_array(codes).astype(int) - single.decode_array(codes)).max() <= 1
        assert len(np.unique(codes)) > 10


def test_threads_may_share_a_tokenizer(mini_bundle: Path) -> None:
    images = crops(8, 64)
    with Tokenizer.from_pretrained(mini_bundle, threads=1) as tokenizer:
        found: dict[int, np.ndarray] = {}

        def work(i: int) -> None:
            found[i] = tokenizer.decode_array(tokenizer.encode_array(images[i : i + 1]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = tokenizer.decode_array(tokenizer.encode_array(images))
    assert np.array_equal(np.concatenate([found[i] for i in range(8)]), expected)


def test_arrays_of_the_wrong_size_point_to_encode_batch(tokenizer: Tokenizer) -> None:
    with pytest.raises(ImageShapeError, match="32x32; this tokenizer takes 64x64.*encode_batch"):
        tokenizer.encode_array(np.zeros((1, 32, 32, 3), np.uint8))


def test_repr_is_for_people(tokenizer: Tokenizer) -> None:
    assert repr(tokenizer) == "Tokenizer(mini_clip: 64 px, 4 scales, 30 codes of 500)"


def test_closing_while_another_thread_encodes_is_named_there(mini_bundle: Path) -> None:
    """It is finished, or told that the tokenizer is closed; nothing else."""
    images = np.zeros((64, 64, 64, 3), np.uint8)
    for _ in range(5):
        tokenizer = Tokenizer.from_pretrained(mini_bundle, threads=1).load("encode")
        found: list[object] = []

        def work(tokenizer: Tokenizer = tokenizer, found: list[object] = found) -> None:
            try:
                found.append(tokenizer.encode_array(images))
            except ArgumentError as error:
                found.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.02)
        tokenizer.close()
        thread.join(60)
        (outcome,) = found
        assert isinstance(outcome, np.ndarray) or "closed" in str(outcome)
