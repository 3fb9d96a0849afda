"""Read and write the `.tfc` format: bit-packed codes with a checksum for every scale (docs/reference/tfc-format.md)."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import CorruptCodesError
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.pictures.scales import Scales

__all__ = ["MAX_BYTES", "Header", "code_bits", "pack", "pack_header", "pack_scale", "scale_ends", "unpack"]

MAGIC = b"TFC"
VERSION = 1
MAX_SCALES = 64
MAX_SIDE = 1024
MAX_CODES = 2**21
MAX_CODEBOOK = 2**24
MAX_NAME_BYTES = 64
MAX_BYTES = 8 * 2**20
"""Bound on the size of a valid file; readers stop here."""

_FIXED = struct.Struct("<3sBIB8sBB")
_CRC = struct.Struct("<I")
# The variant's name is printed on terminals and may become part of a path, hence no control characters and no separators. Lone
# surrogates cannot be encoded in UTF-8.
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]+")
# Codes of a tokenizer have the same, and ask for them again and again.
_scales = lru_cache(Scales)


@dataclass(frozen=True)
class Header:
    """The header of a `.tfc` file.

    Args:
        variant: the tokenizer's name.
        codebook_id: the first 16 hex digits of the codebook's SHA-256, lower case.
        codebook_size: number of codebook entries K.
        patch_nums: sides of all scales of the tokenizer, coarse to fine.
        preparation: how the picture was prepared; None: not known. Headers that differ in it alone are equal.
    """

    variant: str
    codebook_id: str
    codebook_size: int
    patch_nums: tuple[int, ...]
    preparation: Preparation | None = field(default=None, compare=False)

    @property
    def name(self) -> bytes:
        """The name in the file: the variant and what fits of the preparation, which older readers take for a part of it."""
        names = [self.variant]
        if self.preparation is not None:
            names = [
                *(f"{self.variant};{known}" for known in (self.preparation, replace(self.preparation, source=None))),
                *names,
            ]
        return next((name for name in map(str.encode, names) if len(name) <= MAX_NAME_BYTES), self.variant.encode())

    @property
    def bits(self) -> int:
        """Bits of one code, ceil(log2 K)."""
        return (self.codebook_size - 1).bit_length()

    @property
    def size(self) -> int:
        """Size of the header in bytes."""
        return _FIXED.size + 2 * len(self.patch_nums) + len(self.name) + _CRC.size

    @property
    def scales(self) -> Scales:
        """All scales of the tokenizer."""
        return _scales(self.patch_nums)

    def segment_size(self, count: int) -> int:
        """Size in bytes of the segment of a scale of `count` codes: the packed codes and their checksum."""
        return -(-count * self.bits // 8) + _CRC.size

    def problem(self) -> str | None:
        """The first value that the format does not allow, in words for an error message; None if the header is valid."""
        sides = self.patch_nums
        if not 2 <= self.codebook_size <= MAX_CODEBOOK:
            return f"a codebook of {self.codebook_size} entries"
        if not 1 <= len(sides) <= MAX_SCALES or any(not 1 <= side <= MAX_SIDE for side in sides):
            return f"the scales {list(sides)}"
        if self.scales.total > MAX_CODES:
            return f"{self.scales.total} codes"
        if not _NAME.fullmatch(self.variant) or len(self.variant.encode()) > MAX_NAME_BYTES or _split_name(self.variant)[1]:
            return f"the variant name {self.variant!r}"
        if not re.fullmatch(r"[0-9a-f]{16}", self.codebook_id):
            return f"the codebook id {self.codebook_id!r}"
        return None


def _split_name(name: str) -> tuple[str, Preparation | None]:
    """The variant and the preparation in the name in a file."""
    variant, _, last = name.rpartition(";")
    preparation = Preparation.parse(last) if variant else None
    return (name, None) if preparation is None else (variant, preparation)


def scale_ends(header: Header) -> list[int]:
    """Byte offset of the end of each scale, coarse to fine. A file may end at any of them."""
    return list(accumulate(map(header.segment_size, header.scales.counts), initial=header.size))[1:]


def pack_header(header: Header) -> tuple[bytes, int]:
    """The header as bytes, and its CRC-32, from which the first scale's CRC-32 continues."""
    name = header.name
    sides = header.patch_nums
    fixed = _FIXED.pack(
        MAGIC, VERSION, header.codebook_size, header.bits, bytes.fromhex(header.codebook_id), len(sides), len(name)
    )
    data = fixed + struct.pack(f"<{len(sides)}H", *sides) + name
    crc = zlib.crc32(data)
    return data + _CRC.pack(crc), crc


def code_bits(indices: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """The bits of codes in the file's order, that of big-endian words: u8 [n, bits], each 0 or 1.

    Args:
        indices: codes int32 [n], each in [0, 2^bits).
        bits: bits of one code.
    """
    return np.unpackbits(indices.astype(">u4").view(np.uint8)).reshape(-1, 32)[:, 32 - bits :]


def pack_scale(rows: NDArray[np.uint8], previous_crc: int) -> tuple[bytes, int]:
    """The segment of one scale: its packed codes and checksum.

    Args:
        rows: bits of the scale's codes, u8 [s * s, bits].
        previous_crc: CRC-32 of the header or of the previous scale, which this scale's CRC-32 continues.

    Returns:
        The segment, and its CRC-32 for the next scale.
    """
    payload = np.packbits(rows).tobytes()  # pads the last byte with zeros
    crc = zlib.crc32(payload, previous_crc)
    return payload + _CRC.pack(crc), crc


def pack(header: Header, indices: NDArray[np.int32]) -> bytes:
    """The content of a file.

    Args:
        header: the file's header.
        indices: codes int32 of whole scales, coarse to fine; may lack the finer scales.
    """
    data, crc = pack_header(header)
    parts = [data]
    rows = code_bits(indices, header.bits)  # of all scales in one step: scales are small
    for start, end in zip(header.scales.starts, header.scales.ends, strict=True):
        if start >= len(rows):
            break
        segment, crc = pack_scale(rows[start:end], crc)
        parts.append(segment)
    return b"".join(parts)


def unpack(data: bytes, name: str = "The file") -> tuple[Header, NDArray[np.int32]]:
    """Parse the content of a file, which may end after any scale.

    Args:
        data: the content.
        name: what error messages call the file.

    Returns:
        The header, and the codes int32 of the scales present.

    Raises:
        CorruptCodesError: not a `.tfc` file, damaged, cut inside a scale, or with data after the last scale.
    """
    header, crc = _unpack_header(data, name)
    found: list[NDArray[np.int32]] = []
    at = header.size
    for count, stop in zip(header.scales.counts, scale_ends(header), strict=True):
        if found and at == len(data):
            break
        scale = f"scale {len(found) + 1} of {len(header.patch_nums)}"
        salvage = f", or cut it to {at} bytes to keep the scales before" if found else ""
        if stop > len(data):
            raise CorruptCodesError(
                f"{name} ends inside {scale}, at byte {len(data)}.",
                f"Fetch it again: that scale ends at byte {stop}{salvage}.",
            )
        payload = data[at : stop - _CRC.size]
        crc = zlib.crc32(payload, crc)
        if data[stop - _CRC.size : stop] != _CRC.pack(crc):
            raise CorruptCodesError(
                f"{name} is damaged: the checksum of {scale} (bytes {at} to {stop}) does not fit.",
                f"Fetch or make it again{salvage}.",
            )
        found.append(_unpack_scale(payload, count, header, f"{name}: {scale}"))
        at = stop
    if at != len(data):
        raise CorruptCodesError(
            f"{name} goes on after its last scale, which ends at byte {at}.", f"Make it again, or cut it to {at} bytes."
        )
    return header, np.concatenate(found)


def _unpack_header(data: bytes, name: str) -> tuple[Header, int]:
    if data[:3] != MAGIC:
        what = "is not a file of TokenFlow codes" if data else "is empty"
        raise CorruptCodesError(f"{name} {what}.", "Give a .tfc file, as `tokenflow encode` writes.")
    if data[3:4] > bytes([VERSION]):
        raise CorruptCodesError(
            f"{name} has format version {data[3]}; this SDK reads version {VERSION}.",
            "Upgrade with `pip install --upgrade tokenflow-sdk`.",
        )
    again = "Fetch or make it again."
    n_scales, name_length = data[17:19] if len(data) >= _FIXED.size else (0, 0)
    end = _FIXED.size + 2 * n_scales + name_length
    if len(data) < end + _CRC.size:
        raise CorruptCodesError(f"{name} ends inside its header, at byte {len(data)}.", again)
    crc = zlib.crc32(data[:end])
    if data[end : end + _CRC.size] != _CRC.pack(crc):
        raise CorruptCodesError(f"{name} is damaged: the checksum of its header does not fit.", again)
    _, version, size, bits, codebook, _, _ = _FIXED.unpack_from(data)
    sides = struct.unpack_from(f"<{n_scales}H", data, _FIXED.size)
    # Bytes that are not UTF-8 become lone surrogates, which `problem` refuses.
    variant, preparation = _split_name(data[end - name_length : end].decode(errors="surrogateescape"))
    header = Header(variant, codebook.hex(), size, sides, preparation)
    problem = f"format version {version}" if version != VERSION else header.problem()
    if not problem and bits != header.bits:
        problem = f"{bits} bits a code for a codebook of {size} entries"
    if problem:
        raise CorruptCodesError(f"{name} claims {problem} in its header.", "Make it again.")
    return header, crc


def _unpack_scale(payload: bytes, count: int, header: Header, name: str) -> NDArray[np.int32]:
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    used = count * header.bits
    if bits[used:].any():
        raise CorruptCodesError(f"{name} has padding bits that are not zero.", "Make the file again.")
    words = np.zeros((count, 32), np.uint8)
    words[:, 32 - header.bits :] = bits[:used].reshape(count, header.bits)
    indices = np.packbits(words).view(">u4").astype(np.int32)
    if indices.max() >= header.codebook_size:
        raise CorruptCodesError(
            f"{name} holds code {indices.max()}, outside its codebook of {header.codebook_size}.", "Make the file again."
        )
    return indices
