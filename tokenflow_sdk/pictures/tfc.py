"""The `.tfc` file: codes packed to the bit, checksummed scale by scale. docs/reference/tfc-format.md describes it."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import CorruptCodesError
from tokenflow_sdk.pictures.scales import Scales

__all__ = ["MAX_BYTES", "Header", "pack", "pack_header", "pack_scale", "scale_ends", "unpack"]

MAGIC = b"TFC"
VERSION = 1
MAX_SCALES = 64
MAX_SIDE = 1024
MAX_CODES = 2**21
MAX_CODEBOOK = 2**24
MAX_NAME_BYTES = 64
MAX_BYTES = 8 * 2**20
"""No valid file is larger; readers stop here."""

_FIXED = struct.Struct("<3sBIB8sBB")
_CRC = struct.Struct("<I")
# A file's name for itself is shown on terminals and may be put into paths; lone surrogates have no UTF-8.
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]+")


@dataclass(frozen=True)
class Header:
    """What a file says before its codes. `codebook_id` is 16 hex digits."""

    variant: str
    codebook_id: str
    codebook_size: int
    patch_nums: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (self.codebook_size - 1).bit_length()

    @property
    def size(self) -> int:
        """Bytes before the first scale."""
        return _FIXED.size + 2 * len(self.patch_nums) + len(self.variant.encode()) + _CRC.size

    @property
    def scales(self) -> Scales:
        """All the tokenizer's scales."""
        return Scales(self.patch_nums)

    def segment_size(self, count: int) -> int:
        """Bytes of a scale of `count` codes: packed, and their checksum."""
        return -(-count * self.bits // 8) + _CRC.size

    def problem(self) -> str | None:
        """What no file may say, or None."""
        sides = self.patch_nums
        if not 2 <= self.codebook_size <= MAX_CODEBOOK:
            return f"a codebook of {self.codebook_size} entries"
        if not 1 <= len(sides) <= MAX_SCALES or any(not 1 <= side <= MAX_SIDE for side in sides):
            return f"the scales {list(sides)}"
        if self.scales.total > MAX_CODES:
            return f"{self.scales.total} codes"
        if not _NAME.fullmatch(self.variant) or len(self.variant.encode()) > MAX_NAME_BYTES:
            return f"the variant name {self.variant!r}"
        if not re.fullmatch(r"[0-9a-f]{16}", self.codebook_id):
            return f"the codebook id {self.codebook_id!r}"
        return None


def scale_ends(header: Header) -> list[int]:
    """The byte offsets at which a file may end: the end of each scale, coarse to fine."""
    return list(accumulate(map(header.segment_size, header.scales.counts), initial=header.size))[1:]


def pack_header(header: Header) -> tuple[bytes, int]:
    """The bytes before the first scale, and the checksum that the first scale's continues."""
    name = header.variant.encode()
    sides = header.patch_nums
    fixed = _FIXED.pack(
        MAGIC, VERSION, header.codebook_size, header.bits, bytes.fromhex(header.codebook_id), len(sides), len(name)
    )
    data = fixed + struct.pack(f"<{len(sides)}H", *sides) + name
    crc = zlib.crc32(data)
    return data + _CRC.pack(crc), crc


def pack_scale(indices: NDArray[np.int32], bits: int, previous_crc: int) -> tuple[bytes, int]:
    """The segment of one scale's codes [s * s], each in [0, 2^bits), and its checksum for the next scale's to continue."""
    # Big-endian words have their bits in the file's order; packbits fills the last byte with zeros.
    words = np.unpackbits(indices.astype(">u4").view(np.uint8)).reshape(-1, 32)
    payload = np.packbits(words[:, 32 - bits :]).tobytes()
    crc = zlib.crc32(payload, previous_crc)
    return payload + _CRC.pack(crc), crc


def pack(header: Header, indices: NDArray[np.int32]) -> bytes:
    """A whole file, or with fewer scales' codes, the first part of one."""
    data, crc = pack_header(header)
    parts = [data]
    for scale in header.scales.split(indices):
        if not len(scale):
            break
        segment, crc = pack_scale(scale, header.bits, crc)
        parts.append(segment)
    return b"".join(parts)


def unpack(data: bytes, name: str = "The file") -> tuple[Header, NDArray[np.int32]]:
    """Header and code indices of a file that may end at any scale's end. `name` is what errors call the file.

    Raises:
        CorruptCodesError: anything else.
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
    # Bytes that are no UTF-8 become lone surrogates, which no name may hold.
    header = Header(data[end - name_length : end].decode(errors="surrogateescape"), codebook.hex(), size, sides)
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
