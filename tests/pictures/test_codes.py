from __future__ import annotations

import copy
import io
import os
import pickle
import stat
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import fake_bundle
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
from tokenflow_sdk.pictures.preparation import Preparation

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
        with pytest.raises(ArgumentError, match=f"={i}"):
            codes.scale(i)


def test_truncate_keeps_the_coarsest_scales() -> None:
    codes = make(indices=np.arange(21)).truncate(2)
    assert codes.indices.tolist() == [0, 1, 2, 3, 4]
    assert not codes.complete
    assert codes.padded().tolist() == [0, 1, 2, 3, 4] + [-1] * 16
    assert codes.truncate(2) == codes
    for n in (0, 3, -1):
        with pytest.raises(ArgumentError, match=f"n_scales={n}"):
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


def test_nobody_can_make_codes_writable() -> None:
    source = np.arange(21, dtype=np.int32)
    view = source.view()
    view.flags.writeable = False
    codes = make(indices=view)
    source[0] = 77
    again = pickle.loads(pickle.dumps(codes))  # noqa: S301 - across process pools
    for same in (codes, again, copy.copy(codes), copy.deepcopy(codes), codes.truncate(3)):
        assert same == codes
        assert same.indices.tolist() == list(range(21))
        for array in (same.indices, same.scale(1), np.asarray(same)):
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True


def test_truncate_shares_the_array() -> None:
    codes = make()
    assert np.shares_memory(codes.truncate(2).indices, codes.indices)
    assert codes.truncate(3) is codes


def test_arrays_over_bytes_are_shared_only_as_contiguous_int32() -> None:
    narrow, wide = (np.frombuffer(np.arange(21).astype(dtype).tobytes(), dtype) for dtype in (np.int32, np.int64))
    assert np.shares_memory(make(indices=narrow).indices, narrow)
    for array in (narrow[::-1], wide):
        codes = make(indices=array)
        assert codes.indices.tolist() == array.tolist()
        assert codes.indices.flags.c_contiguous
        assert not codes.indices.flags.writeable


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u8"])
def test_every_integer_dtype_is_taken(dtype: str) -> None:
    codes = make(indices=np.arange(21).astype(dtype))
    assert codes.indices.dtype == np.int32
    assert codes == make(indices=list(range(21))) == make(indices=codes)


def test_equality_and_hash() -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    different = [make(seed=1), make(2), make(variant="other"), make(codebook_id="f" * 16), make(codebook_size=501)]
    assert all(codes != make() for codes in different)
    assert len({make(), make(), *different}) == 6
    assert make() != "codes"


def test_codes_remember_how_their_picture_was_prepared() -> None:
    codes = make(preparation=Preparation("pad-grey", "srgb"))
    for same in (codes.truncate(2), copy.copy(codes), pickle.loads(pickle.dumps(codes)), Codes.from_bytes(codes.to_bytes())):  # noqa: S301
        assert same.preparation == codes.preparation
    assert codes.scale_ends == [len(codes.truncate(n).to_bytes()) for n in (1, 2, 3)]
    assert (codes == make(), hash(codes) == hash(make()), make().preparation) == (True, True, None)
    with pytest.raises(ArgumentError, match="Codes cannot have the preparation 'crop'"):
        make(preparation="crop")


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
    assert np.shares_memory(np.asarray(codes), codes.indices)
    with pytest.raises(ValueError, match="copy"):
        codes.__array__(np.int64, copy=False)


def test_repr_is_for_people() -> None:
    assert repr(make(2)) == f"Codes(mini: 5 codes of 9 bits in 2 of 3 scales up to 2 x 2, 48 bytes, codebook {ID})"
    assert repr(make()) == f"Codes(mini: 21 codes of 9 bits in 3 scales up to 4 x 4, 70 bytes, codebook {ID})"


def test_scale_ends_are_the_sizes_of_the_files_cut_there() -> None:
    assert make().scale_ends == [len(make().truncate(n).to_bytes()) for n in (1, 2, 3)]
    assert make(2).scale_ends == make().scale_ends[:2]


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (np.zeros(21, np.float32), ArrayError, "1-D integer array, not float32"),
        (np.zeros(21, bool), ArrayError, "not bool"),
        (np.zeros((1, 21), int), ArrayError, r"int64\[1, 21\].*indices\[0\]"),
        (np.r_[np.zeros(20, int), 500], CodesRangeError, r"Code 500 at position 20.*0 \.\. 499"),
        (np.r_[-1, np.zeros(20, int)], CodesRangeError, "Code -1 at position 0"),
        (np.full(21, 2**40), CodesRangeError, "Code 1099511627776"),
        (np.zeros(20, int), CodesRangeError, r"20 codes .*Give 5 \(2 of 3 scales\) or 21 \(3 of 3 scales\)"),
        (np.zeros(0, int), CodesRangeError, r"0 codes .*Give 1 \(1 of 3 scales\)\."),
        (np.zeros(22, int), CodesRangeError, r"22 codes .*Give 21 \(3 of 3 scales\)\."),
        ([[0], [1, 2]], ArrayError, "cannot become an array"),
        (None, ArrayError, "not object"),
    ],
)
def test_bad_indices_are_named(indices: object, error: type[Exception], words: str) -> None:
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
        {"variant": "\ud800"},
        {"codebook_id": "xyz"},
        {"codebook_id": ID[:15]},
    ],
)
def test_sizes_and_names_that_no_file_could_hold_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="cannot have"):
        make(**changes)


@pytest.mark.parametrize(
    "changes", [{"codebook_size": 500.0}, {"patch_nums": (1.0, 2, 4)}, {"patch_nums": 1}, {"variant": 7}, {"codebook_id": None}]
)
def test_names_and_sizes_of_the_wrong_type_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="cannot be of type|is no size"):
        make(**changes)


def test_sizes_may_be_numpy_integers() -> None:
    codes = make(codebook_size=np.int64(500), patch_nums=np.array(PATCH_NUMS))
    assert codes == make()
    assert hash(codes) == hash(make())
    assert type(codes.codebook_size) is type(codes.patch_nums[0]) is int


def test_codes_of_another_tokenizer_are_refused() -> None:
    make().require("mini", ID + "0" * 48, 500, PATCH_NUMS)
    make().require("renamed", ID, 500, PATCH_NUMS)
    for wrong, words in (
        (("other", "f" * 64, 500, PATCH_NUMS), "not by other .codebook f{16} of 500, scales 1 2 4"),
        (("mini", ID, 512, PATCH_NUMS), f"not by mini .codebook {ID} of 512, scales 1 2 4"),
        (("mini", ID, 500, (1, 2, 3)), f"not by mini .codebook {ID} of 500, scales 1 2 3"),
    ):
        with pytest.raises(CodebookMismatchError, match=f"made by mini .codebook {ID} of 500, scales 1 2 4.*{words}.*bundle"):
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
    for kind in (bytearray, memoryview, io.BytesIO):
        assert Codes.load(kind(path.read_bytes())) == codes
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
    with pytest.raises(CodesReadError, match="null"):
        Codes.load("a\0.tfc")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tfc"
    path.write_bytes(b"\x89PNG")
    with pytest.raises(CorruptCodesError, match=r"x\.tfc is not a file of TokenFlow codes"):
        Codes.load(path)
    with path.open("rb") as file, pytest.raises(CorruptCodesError, match=r"x\.tfc is not"):
        Codes.load(file)
    with pytest.raises(CorruptCodesError, match="<4 bytes> is not"):
        Codes.load(path.read_bytes())


def test_file_objects_may_give_less_than_asked_for() -> None:
    class Pipe(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(7, size or 7))

    assert Codes.load(Pipe(make().to_bytes())) == make()


def test_unusable_file_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tfc"
    path.write_text("TFC")
    with path.open() as text, pytest.raises(CodesReadError, match=r"x\.tfc cannot be read.*binary mode"):
        Codes.load(text)  # type: ignore[arg-type]
    with path.open("rb") as closed:
        pass
    with pytest.raises(CodesReadError, match="closed file"):
        Codes.load(closed)
    with pytest.raises(CodesReadError, match=r"No such file or directory. Check the path and its permissions.$"):
        Codes.load("nope.tfc")
    with path.open("ab") as append, pytest.raises(CodesReadError, match=r"cannot be read: (?!None)"):
        Codes.load(append)
    with pytest.raises(ArgumentError, match="cannot be loaded from ndarray"):
        Codes.load(np.zeros(21))  # type: ignore[arg-type]


def test_nothing_is_left_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"missing.p\.tfc cannot be written: No such file"):
        make().save(tmp_path / "missing" / "p.tfc")
    (tmp_path / "directory.tfc").mkdir()
    with pytest.raises(OutputError, match="not a file that can be replaced"):
        make().save(tmp_path / "directory.tfc")
    assert os.listdir(tmp_path) == ["directory.tfc"]
    assert os.listdir(tmp_path / "directory.tfc") == []


def test_pytorch_takes_codes_as_a_tensor_of_its_own(recwarn: pytest.WarningsRecorder) -> None:
    codes = make()
    for take in (torch.as_tensor, torch.tensor, torch.from_dlpack):
        tensor = take(codes)
        assert (tensor.dtype, tensor.tolist()) == (torch.int32, codes.indices.tolist())
        tensor[0] = -1
        assert codes.indices[0] >= 0
    assert torch.tensor(codes.indices).tolist() == codes.indices.tolist()
    assert len(recwarn) == 0


def test_codes_become_ids_and_come_back() -> None:
    codes, config = make(), fake_bundle().config
    config = replace(config, variant="mini", patch_nums=PATCH_NUMS, codebook_size=500, codebook_sha256=ID + "0" * 48)
    tokens = {"image_start": 7, "image_end": 600, "scale_end": 601}
    for n in (1, 2, 3):
        cut = codes.truncate(n)
        expected = [7]
        for i in range(n):
            expected += [*(cut.scale(i).ravel() + 100).tolist(), 601]
        ids = cut.to_ids(100, **tokens)
        assert (ids.dtype, ids.tolist()) == (np.int64, [*expected, 600])
        for again in (ids, ids.tolist(), torch.from_numpy(ids)):
            assert Codes.from_ids(again, config, 100, **tokens) == cut
        assert cut.to_ids(0).tolist() == cut.indices.tolist()
        assert Codes.from_ids(cut.to_ids(2**40), config, 2**40) == cut
    with pytest.raises(ArgumentError, match="config cannot be of type str"):
        Codes.from_ids([1], "mini", 0)  # type: ignore[arg-type]
