from __future__ import annotations

import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DATA, ROOT
from tests.pictures.test_preparation import EVERY
from tokenflow_sdk import Codes
from tokenflow_sdk.errors import CodesError, CorruptCodesError
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.pictures.tfc import MAX_BYTES, Header, code_bits, pack, pack_header, pack_scale, scale_ends, unpack

EXAMPLE = Header("mini", "00112233445566ff", 500, (1, 2))


def slow_pack(indices: list[int], bits: int) -> bytes:
    """The oracle of packing: a string of zeros and ones."""
    text = "".join(format(index, f"0{bits}b") for index in indices)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def slow_read(data: bytes) -> tuple[Header, list[int]]:
    """The oracle of reading, by docs/reference/tfc-format.md alone: bit by bit, each checksum from the file's beginning."""

    def number(at: int, size: int) -> int:
        return sum(data[at + i] << 8 * i for i in range(size))

    n, m, bits = data[17], data[18], data[8]
    end = 19 + 2 * n + m
    assert data[:4] == b"TFC\x01"
    assert number(end, 4) == zlib.crc32(data[:end])
    header = Header(
        data[19 + 2 * n : end].decode(), data[9:17].hex(), number(4, 4), tuple(number(19 + 2 * i, 2) for i in range(n))
    )
    assert 2 ** (bits - 1) < header.codebook_size <= 2**bits
    checked, at, codes = data[:end], end + 4, []
    for s in header.patch_nums:
        if at == len(data):
            break
        payload = data[at : at + (s * s * bits + 7) // 8]
        checked += payload
        at += len(payload) + 4
        assert number(at - 4, 4) == zlib.crc32(checked)
        for i in range(s * s):
            code = 0
            for j in range(i * bits, (i + 1) * bits):
                code = 2 * code + (payload[j // 8] >> (7 - j % 8) & 1)
            codes.append(code)
    assert at == len(data)
    return header, codes


def random_codes(header: Header, n_scales: int, seed: int) -> np.ndarray:
    length = sum(side * side for side in header.patch_nums[:n_scales])
    return np.random.default_rng(seed).integers(0, header.codebook_size, length).astype(np.int32)


names = st.one_of(st.from_regex(r"[a-z0-9_.-]{1,64}", fullmatch=True), st.sampled_from(["é", "模" * 21, "a b", "\U0001f5bc"]))
headers = st.builds(
    Header,
    variant=names,
    codebook_id=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
    codebook_size=st.one_of(st.integers(2, 9), st.integers(2, 2**17), st.sampled_from([2**15, 2**16, 2**16 + 1, 2**24])),
    patch_nums=st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple),
)
seeds = st.integers(0, 2**32)


@given(headers, seeds, st.data())
def test_packing_agrees_with_the_slow_oracle(header: Header, seed: int, data: st.DataObject) -> None:
    n_scales = data.draw(st.integers(1, len(header.patch_nums)))
    indices = random_codes(header, n_scales, seed)
    expected, crc = pack_header(header)
    start = 0
    for side in header.patch_nums[:n_scales]:
        payload = slow_pack(indices[start : start + side * side].tolist(), header.bits)
        crc = zlib.crc32(payload, crc)
        expected += payload + crc.to_bytes(4, "little")
        start += side * side
    assert pack(header, indices) == expected


@given(headers, seeds, st.data())
def test_reading_agrees_with_a_reader_written_from_the_document(header: Header, seed: int, data: st.DataObject) -> None:
    n_scales = data.draw(st.integers(1, len(header.patch_nums)))
    indices = random_codes(header, n_scales, seed)
    content = pack(header, indices)
    found_header, found = unpack(content)
    assert slow_read(content) == (found_header, found.tolist()) == (header, indices.tolist())
    assert found.dtype == np.int32
    assert len(content) == scale_ends(header)[n_scales - 1]


@pytest.mark.parametrize("preparation", [None, *EVERY], ids=str)
def test_a_file_says_how_its_picture_was_prepared_and_old_readers_read_it(preparation: Preparation | None) -> None:
    indices = np.array([499, 0, 1, 2, 3], np.int32)
    content = pack(replace(EXAMPLE, preparation=preparation), indices)
    header, found = unpack(content)
    assert (header, header.preparation, found.tolist()) == (EXAMPLE, preparation, indices.tolist())
    old_header, old_codes = slow_read(content)
    assert replace(old_header, variant="mini") == EXAMPLE
    assert old_header.variant == ("mini" if preparation is None else f"mini;{preparation}")
    assert old_codes == indices.tolist()
    assert scale_ends(header)[-1] == len(content)
    assert Codes.from_bytes(content).truncate(1).preparation == preparation


def test_a_name_without_room_for_the_preparation_keeps_its_own() -> None:
    crop = Preparation("crop", "srgb")
    for length, kept in ((64 - len(";crop,srgb"), crop), (64 - len(";crop,srgb") + 1, None), (64, None)):
        header = replace(EXAMPLE, variant="x" * length, preparation=crop)
        found = unpack(pack(header, np.zeros(1, np.int32)))[0]
        assert (found.variant, found.preparation) == ("x" * length, kept)
    known = replace(crop, source="0123456789abcdef")
    for length, kept in ((64 - len(f";{known}"), known), (64 - len(f";{known}") + 1, crop)):
        header = replace(EXAMPLE, variant="x" * length, preparation=known)
        assert unpack(pack(header, np.zeros(1, np.int32)))[0].preparation == kept


@pytest.mark.parametrize("variant", ["mini;crop", "mini;crop,srgb,slow", "mini;", "a;b"])
def test_a_variant_may_have_a_semicolon(variant: str) -> None:
    found = unpack(pack(replace(EXAMPLE, variant=variant), np.zeros(1, np.int32)))[0]
    assert (found.variant, found.preparation) == (variant, None)


def test_a_variant_that_ends_like_a_preparation_is_refused() -> None:
    assert "variant name 'x;crop,srgb'" in str(replace(EXAMPLE, variant="x;crop,srgb").problem())
    with pytest.raises(CorruptCodesError, match="variant name 'x;crop,srgb'"):
        unpack(pack_header(replace(EXAMPLE, variant="x;crop,srgb;pad,srgb"))[0])


def test_the_extremes_of_the_format_round_trip() -> None:
    largest = Header("x" * 64, "f" * 16, 2**24, (1024, 1024))
    indices = np.full(2**21, 2**24 - 1, np.int32)
    content = pack(largest, indices)
    assert len(content) <= MAX_BYTES
    assert np.array_equal(unpack(content)[1], indices)
    many = Header("x", "0" * 16, 2, (1,) * 64)
    assert unpack(pack(many, np.ones(64, np.int32)))[1].tolist() == [1] * 64


def test_the_released_256_px_tokenizer_takes_1_6_kb() -> None:
    indices = np.load(DATA / "clipb_256_expected.npz")["code_indices"]
    patch_nums = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    codes = Codes(indices, patch_nums, 32768, "clipb_256", "ab" * 32)
    assert len(codes.to_bytes()) == 1620 < -(-817 * 15 // 8) + 100
    assert "1,620 bytes for the 817 codes" in (ROOT / "docs" / "reference" / "tfc-format.md").read_text(encoding="utf-8")
    assert Codes.from_bytes(codes.to_bytes()) == codes


@pytest.fixture
def example() -> bytes:
    return pack(EXAMPLE, np.array([499, 0, 1, 2, 3], np.int32))


def test_the_documented_example_is_this_file(example: bytes) -> None:
    text = (ROOT / "docs" / "reference" / "tfc-format.md").read_text(encoding="utf-8")
    dump = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert dump
    assert bytes.fromhex(re.sub(r"#.*", "", dump[1]).replace("\n", " ")) == example
    assert [int(end) for end in re.findall(r"at byte (\d+)", dump[1])] == scale_ends(EXAMPLE)


def test_every_flipped_bit_is_noticed(example: bytes) -> None:
    for content in (example, example[: scale_ends(EXAMPLE)[0]]):
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CorruptCodesError):
                unpack(bytes(damaged))


def test_headers_of_a_tokenizer_share_their_scales() -> None:
    assert Header("other", "0" * 16, 2, (1, 2)).scales is EXAMPLE.scales


def test_a_file_may_end_at_a_scales_end_and_nowhere_else(example: bytes) -> None:
    first, last = scale_ends(EXAMPLE)
    for length in range(len(example) + 1):
        if length in (first, last):
            assert len(unpack(example[:length])[1]) == (1 if length == first else 5)
            continue
        with pytest.raises(CorruptCodesError) as caught:
            unpack(example[:length], "a.tfc")
        if length > first:
            assert f"a.tfc ends inside scale 2 of 2, at byte {length}." in str(caught.value)
            assert f"ends at byte {last}, or cut it to {first} bytes" in str(caught.value)
        elif length >= EXAMPLE.size:
            assert f"a.tfc ends inside scale 1 of 2, at byte {length}." in str(caught.value)
            assert f"ends at byte {first}." in str(caught.value)
        elif length >= 3:
            assert f"a.tfc ends inside its header, at byte {length}." in str(caught.value)
        else:
            assert ("a.tfc is empty" if length == 0 else "a.tfc is not a file of TokenFlow codes") in str(caught.value)
    with pytest.raises(CorruptCodesError, match=f"goes on after its last scale, which ends at byte {last}"):
        unpack(example + b"abc")


def test_scales_of_two_files_cannot_be_mixed(example: bytes) -> None:
    first = scale_ends(EXAMPLE)[0]
    other_start = pack(EXAMPLE, np.array([498, 0, 1, 2, 3], np.int32))
    other_header = pack(Header("mino", EXAMPLE.codebook_id, 500, (1, 2)), np.array([499, 0, 1, 2, 3], np.int32))
    for other in (other_start, other_header):
        with pytest.raises(CorruptCodesError, match=rf"checksum of scale 2 of 2 .*cut it to {first} bytes"):
            unpack(example[:first] + other[first:])


def test_scales_can_be_written_as_they_arrive(example: bytes) -> None:
    content, crc = pack_header(EXAMPLE)
    for indices, end in zip(([499], [0, 1, 2, 3]), scale_ends(EXAMPLE), strict=True):
        segment, crc = pack_scale(code_bits(np.array(indices, np.int32), EXAMPLE.bits), crc)
        content += segment
        assert len(content) == end
    assert content == example


def test_a_newer_version_asks_for_an_upgrade(example: bytes) -> None:
    for content in (example[:3] + b"\x02" + example[4:], b"TFC\xff"):
        with pytest.raises(CorruptCodesError, match=r"version \d+; this SDK reads version 1.*pip install --upgrade"):
            unpack(content)


def sealed(body: bytes, *payloads: bytes) -> bytes:
    """A file with checksums that fit, whatever it says."""
    crc = zlib.crc32(body)
    content = body + crc.to_bytes(4, "little")
    for payload in payloads:
        crc = zlib.crc32(payload, crc)
        content += payload + crc.to_bytes(4, "little")
    return content


def test_fitting_checksums_do_not_excuse_bad_codes() -> None:
    body = pack_header(EXAMPLE)[0][:-4]
    assert unpack(sealed(body, b"\xf9\x80"))[1].tolist() == [499]
    with pytest.raises(CorruptCodesError, match="scale 1 of 2 holds code 500, outside its codebook of 500"):
        unpack(sealed(body, b"\xfa\x00"))
    with pytest.raises(CorruptCodesError, match="scale 2 of 2 has padding bits"):
        unpack(sealed(body, b"\xf9\x80", b"\x00\x00\x40\x40\x31"))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (Header("mini", "0" * 16, 2**24 + 1, (1,)), "codebook of 16777217 entries"),
        (Header("mini", "0" * 16, 1, (1,)), "codebook of 1 entries"),
        (Header("mini", "0" * 16, 500, ()), r"scales \[\]"),
        (Header("mini", "0" * 16, 500, (1,) * 65), "scales"),
        (Header("mini", "0" * 16, 500, (1, 1025)), r"scales \[1, 1025\]"),
        (Header("mini", "0" * 16, 500, (0, 1)), r"scales \[0, 1\]"),
        (Header("mini", "0" * 16, 2**24, (1024,) * 64), "67108864 codes"),
        (Header("mini", "0" * 16, 2, (1, 1024, 1024)), "2097153 codes"),
        (Header("", "0" * 16, 500, (1,)), "variant name ''"),
        (Header("x" * 65, "0" * 16, 500, (1,)), "variant name 'x"),
        (Header("../x", "0" * 16, 500, (1,)), "variant name"),
        (Header("\x1b[2J", "0" * 16, 500, (1,)), r"variant name '\\x1b\[2J'"),
        (Header("\x9b2J", "0" * 16, 500, (1,)), r"variant name '\\x9b2J'"),
    ],
)
def test_fitting_checksums_do_not_excuse_bad_headers(header: Header, words: str) -> None:
    with pytest.raises(CorruptCodesError, match=f"claims .*{words}.* in its header"):
        unpack(pack_header(header)[0])


def test_fitting_checksums_do_not_excuse_bad_fields(example: bytes) -> None:
    body = example[: EXAMPLE.size - 4]
    for at, value, words in ((3, 0, "format version 0"), (8, 10, "10 bits a code for a codebook of 500"), (23, 0xFF, "name")):
        damaged = body[:at] + bytes([value]) + body[at + 1 :]
        with pytest.raises(CorruptCodesError, match=f"claims .*{words}"):
            unpack(sealed(damaged, b"\xf9\x80"))


def codes_or_error(content: bytes) -> None:
    """Whatever is read must be what would be written: a file for every list of codes, and no other."""
    try:
        codes = Codes.from_bytes(content)
    except CodesError:
        return
    assert codes.to_bytes() == content


@given(st.binary(max_size=200))
def test_any_bytes_give_codes_or_a_codes_error(content: bytes) -> None:
    codes_or_error(content)
    codes_or_error(b"TFC\x01" + content)


@given(headers, seeds, st.data())
def test_damaged_files_give_an_error(header: Header, seed: int, data: st.DataObject) -> None:
    content = pack(header, random_codes(header, len(header.patch_nums), seed))
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 8)))
    codes_or_error(content[:start] + data.draw(st.binary(max_size=8)) + content[stop:])
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptCodesError):
        unpack(bytes(flipped))


@settings(max_examples=200)
@given(st.data())
def test_sealed_headers_give_codes_or_an_error(data: st.DataObject) -> None:
    n_scales, name_length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    size = data.draw(st.sampled_from([0, 1, 2, 3, 500, 2**24, 2**24 + 1, 2**32 - 1]))
    bits = data.draw(st.sampled_from([max(0, size - 1).bit_length(), 0, 255]))
    sides = [data.draw(st.sampled_from([0, 1, 2, 1024, 65535])) for _ in range(n_scales)]
    body = b"TFC" + bytes([data.draw(st.sampled_from([1, 1, 1, 0, 2]))]) + size.to_bytes(4, "little") + bytes([bits]) + bytes(8)
    body += bytes([n_scales, name_length]) + b"".join(side.to_bytes(2, "little") for side in sides)
    body += data.draw(st.binary(min_size=name_length, max_size=name_length))
    codes_or_error(sealed(body, *data.draw(st.lists(st.binary(max_size=12), max_size=3))))


def test_reading_stops_at_the_largest_valid_size(tmp_path: Path) -> None:
    huge = tmp_path / "huge.tfc"
    with huge.open("wb") as file:
        file.write(pack(EXAMPLE, np.array([499, 0, 1, 2, 3], np.int32)))
        file.truncate(2**33)
    with pytest.raises(CorruptCodesError, match="goes on after its last scale"):
        Codes.load(huge)
