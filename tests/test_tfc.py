from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DATA, ROOT
from tokenflow_sdk import Codes
from tokenflow_sdk.errors import CodesError, CorruptCodesError
from tokenflow_sdk.tfc import Header, pack, pack_header, pack_scale, unpack

EXAMPLE = Header("mini", "00112233445566ff", 500, (1, 2))


def slow_pack(indices: list[int], bits: int) -> bytes:
    """The oracle: a string of zeros and ones."""
    text = "".join(format(index, f"0{bits}b") for index in indices)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


headers = st.builds(
    Header,
    variant=st.from_regex(r"[a-z0-9_.-]{1,64}", fullmatch=True),
    codebook_id=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
    codebook_size=st.one_of(st.integers(2, 70000), st.sampled_from([2**15, 2**16, 2**24])),
    patch_nums=st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple),
)


@given(headers, st.data())
def test_packing_agrees_with_the_slow_oracle_and_round_trips(header: Header, data: st.DataObject) -> None:
    n_scales = data.draw(st.integers(1, len(header.patch_nums)))
    length = sum(side * side for side in header.patch_nums[:n_scales])
    seed = data.draw(st.integers(0, 2**32))
    indices = np.random.default_rng(seed).integers(0, header.codebook_size, length).astype(np.int32)
    content = pack(header, indices)
    expected, crc = pack_header(header)
    start = 0
    for side in header.patch_nums[:n_scales]:
        payload = slow_pack(indices[start : start + side * side].tolist(), header.bits)
        crc = zlib.crc32(payload, crc)
        expected += payload + crc.to_bytes(4, "little")
        start += side * side
    assert content == expected
    again, found = unpack(content)
    assert again == header
    assert np.array_equal(found, indices)


def test_the_released_256_px_tokenizer_takes_1_6_kb() -> None:
    indices = np.load(DATA / "clipb_256_expected.npz")["code_indices"]
    patch_nums = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    codes = Codes(indices, patch_nums, 32768, "clipb_256", "ab" * 32)
    assert len(codes.to_bytes()) < -(-817 * 15 // 8) + 100
    assert Codes.from_bytes(codes.to_bytes()) == codes


@pytest.fixture
def example() -> bytes:
    return pack(EXAMPLE, np.array([499, 0, 1, 2, 3], np.int32))


def test_the_documented_example_is_this_file(example: bytes) -> None:
    text = (ROOT / "docs" / "tfc-format.md").read_text()
    dump = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert dump
    assert bytes.fromhex(re.sub(r"#.*", "", dump[1]).replace("\n", " ")) == example


def test_every_flipped_bit_is_noticed(example: bytes) -> None:
    for bit in range(8 * len(example)):
        damaged = bytearray(example)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptCodesError):
            unpack(bytes(damaged))


def test_a_file_may_end_at_a_scales_end_and_nowhere_else(example: bytes) -> None:
    header_size = len(pack_header(EXAMPLE)[0])
    first_end = header_size + EXAMPLE.segment_size(1)
    for length in range(len(example) + 1):
        if length in (first_end, len(example)):
            assert len(unpack(example[:length])[1]) == (1 if length == first_end else 5)
            continue
        with pytest.raises(CorruptCodesError) as caught:
            unpack(example[:length])
        if length > first_end:
            assert f"inside scale 2 of 2, at byte {length} of {len(example)}" in str(caught.value)
            assert f"cut it to {first_end} bytes" in str(caught.value)
    with pytest.raises(CorruptCodesError, match="3 bytes after the last scale"):
        unpack(example + b"abc")


def test_scales_of_two_files_cannot_be_mixed(example: bytes) -> None:
    first_end = len(pack_header(EXAMPLE)[0]) + EXAMPLE.segment_size(1)
    other = pack(EXAMPLE, np.array([498, 0, 1, 2, 3], np.int32))
    with pytest.raises(CorruptCodesError, match="checksum of scale 2"):
        unpack(example[:first_end] + other[first_end:])


def test_scales_can_be_written_as_they_arrive(example: bytes) -> None:
    content, crc = pack_header(EXAMPLE)
    for indices in ([499], [0, 1, 2, 3]):
        segment, crc = pack_scale(np.array(indices, np.int32), EXAMPLE.bits, crc)
        content += segment
    assert content == example


def test_a_newer_version_asks_for_an_upgrade(example: bytes) -> None:
    with pytest.raises(CorruptCodesError, match="version 2; this SDK reads version 1.*pip install --upgrade"):
        unpack(example[:3] + b"\x02" + example[4:])


def with_valid_checksums(header: Header, indices: list[int]) -> bytes:
    return pack(header, np.array(indices, np.int32))


def test_valid_checksums_do_not_excuse_bad_content() -> None:
    with pytest.raises(CorruptCodesError, match="codes outside its codebook"):
        unpack(with_valid_checksums(EXAMPLE, [511]))
    payload = b"\x00\x01"  # nine bits of code, then a one where padding must be zero
    content, crc = pack_header(EXAMPLE)
    content += payload + zlib.crc32(payload, crc).to_bytes(4, "little")
    with pytest.raises(CorruptCodesError, match="codes outside its codebook"):
        unpack(content)
    for header, words in (
        (Header("mini", "0" * 16, 2**25, (1,)), "codebook of 33554432 entries"),
        (Header("mini", "0" * 16, 500, (1, 5000)), r"scales \[1, 5000\]"),
        (Header("a b", "0" * 16, 500, (1,)), "variant name 'a b'"),
        (Header("mini", "0" * 16, 2**24, (1024,) * 64), "67108864 codes"),
    ):
        with pytest.raises(CorruptCodesError, match=words):
            unpack(pack_header(header)[0])


@given(st.binary(max_size=200))
def test_any_bytes_give_codes_or_a_codes_error(content: bytes) -> None:
    for candidate in (content, b"TFC\x01" + content):
        try:
            Codes.from_bytes(candidate)
        except CodesError:
            continue


@settings(max_examples=50)
@given(st.data())
def test_headers_with_valid_checksums_give_codes_or_a_codes_error(data: st.DataObject) -> None:
    body = b"TFC\x01" + data.draw(st.binary(min_size=16, max_size=60))
    n_scales, name_length = body[17], body[18]
    body = (body + bytes(400))[: 19 + 2 * n_scales + name_length]
    try:
        Codes.from_bytes(body + zlib.crc32(body).to_bytes(4, "little") + data.draw(st.binary(max_size=40)))
    except CodesError:
        return


def test_reading_stops_at_the_largest_valid_size(tmp_path: Path) -> None:
    huge = tmp_path / "huge.tfc"
    with huge.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CorruptCodesError):
        Codes.load(huge)
