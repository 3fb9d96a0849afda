from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow_sdk.errors import ArgumentError, ArrayError, ImageShapeError
from tokenflow_sdk.pictures.images import check_batch, load_image
from tokenflow_sdk.pictures.sources import describe, kept, several, to_array

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)


class OnlyArray:
    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return PIXELS


class OnlyDlpack:
    def __dlpack__(self, **options: object) -> object:
        return PIXELS.__dlpack__(**options)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> tuple[int, int]:
        return PIXELS.__dlpack_device__()


@pytest.mark.parametrize("given", [torch.from_numpy(PIXELS), OnlyArray(), OnlyDlpack(), torch.from_numpy(PIXELS.copy())[:, :]])
def test_arrays_of_other_libraries_are_pictures(given: object) -> None:
    assert np.array_equal(load_image(given), PIXELS)  # type: ignore[arg-type]
    assert np.array_equal(to_array(given), PIXELS)


def test_batches_of_other_libraries() -> None:
    assert np.array_equal(check_batch(torch.from_numpy(PIXELS[None, :, :6]), 6), PIXELS[None, :, :6])  # type: ignore[arg-type]
    with pytest.raises(ImageShapeError, match="7x6"):
        check_batch(torch.from_numpy(PIXELS[None]), 6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(4, 4, 3), r"not float32.*\(array \* 255\)"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), r"not \[3, 4, 5\].*transpose\(1, 2, 0\)"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), r"A Tensor cannot become a NumPy array.*cpu\(\)"),
        (torch.zeros(4, 4, device="meta"), r"cannot become a NumPy array.*cpu\(\)"),
        (torch.zeros(4, 4, requires_grad=True), r"cannot become a NumPy array.*detach\(\)"),
    ],
)
def test_arrays_that_are_no_pictures(given: torch.Tensor, words: str) -> None:
    with pytest.raises(ArrayError, match=words):
        load_image(given)  # type: ignore[arg-type]


def test_what_is_no_array_stays_as_it_is() -> None:
    for given in ("p.png", Path("p.png"), b"123", io.BytesIO(), Image.new("L", (2, 2)), PIXELS, [PIXELS], None):
        assert to_array(given) is given


def test_several_pictures_are_told_from_one() -> None:
    stack = np.stack([PIXELS] * 2)
    for given in (stack, torch.from_numpy(stack), [PIXELS, PIXELS], iter([PIXELS, PIXELS])):
        assert [describe(each) for each in several("encode_batch", given)] == ["<array uint8[6, 7, 3]>"] * 2  # type: ignore[arg-type]
    for one in (torch.from_numpy(PIXELS), OnlyArray(), "p.png", io.BytesIO()):
        with pytest.raises(ArgumentError, match=r"is one. Use encode\(image\), or give a list: encode_batch\(\[image\]\)"):
            several("encode_batch", one)  # type: ignore[arg-type]
    for none, name in ((3, "int"), (None, "NoneType")):
        with pytest.raises(ArgumentError, match=f"images cannot be of type {name}"):
            several("encode_batch", none)  # type: ignore[arg-type]


def test_a_directory_is_told_how_its_pictures_are_given(tmp_path: Path) -> None:
    for directory in (tmp_path, str(tmp_path)):
        with pytest.raises(
            ArgumentError, match=rf"is a directory. .*encode_iter\(pathlib.Path\('{tmp_path}'\).glob\('\*.jpg'\)\)"
        ):
            several("encode_iter", directory)  # type: ignore[arg-type]


def test_what_is_kept_is_not_changed_by_the_caller() -> None:
    tensor, buffer = torch.from_numpy(PIXELS.copy()), bytearray(b"12")
    array, data = kept(tensor), kept(buffer)  # type: ignore[arg-type]
    tensor[:] = 0
    buffer[0] = 0
    assert np.array_equal(array, PIXELS)
    assert data == b"12"
    assert kept(Path("p.png")) == Path("p.png")
    assert kept(io.BytesIO()) is kept(Image.new("L", (2, 2))) is None
