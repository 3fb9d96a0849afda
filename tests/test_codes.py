from __future__ import annotations

import io
import os
import stat
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_sdk import Codes
from tokenflow_sdk.errors import (
    ArgumentError,
    ArrayError,
    CodebookMismatchError,
    CodesRangeError,
    CodesReadError,
    CorruptCodesError,
    OutputError,
)

PATCH_NUMS = (1, 2, 4)
ID = "0123456789abcdef"


def make(n_scales: int = 3, seed: int = 0, **changes: object) -> Codes:
    length = sum(s * s for s in PATCH_NUMS[:n_scales])
    values = {
        "indices": np.random.default_rng(seed).integers(0, 500, length),
        "patch_nums": PATCH_NUMS,
        "codebook_size": 500,
        "variant": "mini",
        "codebook_id": ID,
    }
    return Codes(**values | changes)


def test_scales_are_maps_coarse_to_fine() -> None:
    codes = make(indices=np.arange(21))
    assert codes.scale(0).tolist() == [[0]]
    assert codes.scale(1).tolist() == [[1, 2], [3, 4]]
    assert codes.scale(-1).tolist() == np.arange(5, 21).reshape(4, 4).tolist()
    assert (codes.n_scales, codes.complete, len(codes)) == (3, True, 21)
    for i in (3, -4):
        with pytest.raises(ArgumentError, match=f"no scale {i}"):
            codes.scale(i)


def test_truncate_keeps_the_coarsest_scales() -> None:
    codes = make(indices=np.arange(21)).truncate(2)
    assert codes.indices.tolist() == [0, 1, 2, 3, 4]
    assert not codes.complete
    assert codes.padded().tolist() == [0, 1, 2, 3, 4] + [-1] * 16
    assert codes.truncate(2) == codes
    for n in (0, 3, -1):
        with pytest.raises(ArgumentError, match=f"cut to {n}"):
            codes.truncate(n)


def test_codes_are_immutable_and_independent_of_their_source() -> None:
    source = np.arange(21)
    codes = make(indices=source)
    source[0] = 77
    assert codes.indices[0] == 0
    for array in (codes.indices, codes.scale(2)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(FrozenInstanceError):
        codes.variant = "other"  # type: ignore[misc]
    padded = codes.padded()
    padded[0] = 5
    assert codes.indices[0] == 0


def test_equality_and_hash() -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    different = [make(seed=1), make(2), make(variant="other"), make(codebook_id="f" * 16), make(codebook_size=501)]
    assert all(codes != make() for codes in different)
    assert len({make(), make(), *different}) == 6
    assert make() != "codes"


def test_only_the_codebook_ids_first_digits_count() -> None:
    assert make(codebook_id=ID.upper() + "f" * 48) == make()


def test_numpy_sees_the_indices() -> None:
    codes = make(indices=np.arange(21))
    assert np.asarray(codes).tolist() == list(range(21))
    assert np.asarray(codes).dtype == np.int32
    assert np.array(codes, dtype=np.float64)[3] == 3.0
    changed = np.array(codes)
    changed[0] = 9
    assert codes.indices[0] == 0
    with pytest.raises(ValueError, match="copy"):
        codes.__array__(np.int64, copy=False)


def test_repr_is_for_people() -> None:
    assert repr(make(2)) == f"Codes(mini: 5 codes in 2 of 3 scales up to 2 x 2, {len(make(2).to_bytes())} bytes, codebook {ID})"


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (np.zeros(21, np.float32), ArrayError, "1-D integer array, not float32"),
        (np.zeros(21, bool), ArrayError, "not bool"),
        (np.zeros((1, 21), int), ArrayError, r"int64\[1, 21\].*indices\[0\]"),
        (np.r_[np.zeros(20, int), 500], CodesRangeError, r"Code 500 at position 20.*0 \.\. 499"),
        (np.r_[-1, np.zeros(20, int)], CodesRangeError, "Code -1 at position 0"),
        (np.full(21, 2**40), CodesRangeError, "Code 1099511627776"),
        (np.zeros(20, int), CodesRangeError, "20 codes.*1, 5, 21"),
        (np.zeros(0, int), CodesRangeError, "0 codes"),
        (np.zeros(22, int), CodesRangeError, "22 codes"),
    ],
)
def test_bad_indices_are_named(indices: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(indices=indices)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_size": 1},
        {"patch_nums": ()},
        {"patch_nums": (0,)},
        {"variant": ""},
        {"variant": "a/b"},
        {"codebook_id": "xyz"},
    ],
)
def test_sizes_and_names_that_no_file_could_hold_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="cannot have"):
        make(**changes)


def test_codes_of_another_tokenizer_are_refused() -> None:
    make().require("mini", ID + "0" * 48, 500, PATCH_NUMS)
    make().require("renamed", ID, 500, PATCH_NUMS)
    for wrong in (("mini", "f" * 64, 500, PATCH_NUMS), ("mini", ID, 512, PATCH_NUMS), ("mini", ID, 500, (1, 2, 3))):
        with pytest.raises(CodebookMismatchError, match=f"made by mini.*{ID}.*bundle that encoded them"):
            make().require(*wrong)


@given(st.integers(1, 3), st.integers(0, 10))
def test_files_round_trip(n_scales: int, seed: int) -> None:
    codes = make(n_scales, seed)
    assert Codes.from_bytes(codes.to_bytes()) == codes


def test_save_and_load(tmp_path: Path) -> None:
    codes, path = make(), tmp_path / "p.tfc"
    codes.save(path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    assert Codes.load(path) == Codes.load(str(path)) == Codes.load(path.read_bytes()) == codes
    assert Codes.load(io.BytesIO(path.read_bytes())) == codes
    make(2).save(path)
    assert Codes.load(path) == make(2)
    assert os.listdir(tmp_path) == ["p.tfc"]


def test_a_file_cut_at_a_scales_end_is_a_preview(tmp_path: Path) -> None:
    path = tmp_path / "p.tfc"
    path.write_bytes(make().to_bytes()[: len(make().truncate(2).to_bytes())])
    assert Codes.load(path) == make().truncate(2)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.tfc", tmp_path):
        with pytest.raises(CodesReadError, match=f"{path.name}.*cannot be read"):
            Codes.load(path)
    (tmp_path / "x.tfc").write_bytes(b"\x89PNG")
    with pytest.raises(CorruptCodesError, match="not a file of TokenFlow codes"):
        Codes.load(tmp_path / "x.tfc")


def test_nothing_is_left_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"missing.p\.tfc cannot be written: No such file"):
        make().save(tmp_path / "missing" / "p.tfc")
    (tmp_path / "directory.tfc").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        make().save(tmp_path / "directory.tfc")
    assert os.listdir(tmp_path) == ["directory.tfc"]
    assert os.listdir(tmp_path / "directory.tfc") == []
