"""The `.tfc` file: codes packed to the bit, checksummed scale by scale. docs/tfc-format.md is the format's description."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import CorruptCodesError

__all__ = ["MAX_BYTES", "Header", "pack", "pack_header", "pack_scale", "unpack"]

MAGIC = b"TFC"
VERSION = 1
MAX_SCALES = 64
MAX_SIDE = 1024
MAX_CODEBOOK = 2**24
MAX_BYTES = 16 * 2**20
"""No valid file is larger; readers stop here."""
_FIXED = struct.Struct("<3sBIB8sBB")
_CRC = struct.Struct("<I")
_AGAIN = "Copy or make the file again."


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

    def problem(self) -> str | None:
        """What no file may say, or None."""
        sides = self.patch_nums
        if not 2 <= self.codebook_size <= MAX_CODEBOOK:
            return f"a codebook of {self.codebook_size} entries"
        if not 1 <= len(sides) <= MAX_SCALES or any(not 1 <= side <= MAX_SIDE for side in sides):
            return f"the scales {list(sides)}"
        if not re.fullmatch(r"[\w.-]{1,64}", self.variant, re.ASCII):
            return f"the variant name {self.variant!r}"
        if not re.fullmatch(r"[0-9a-f]{16}", self.codebook_id):
            return f"the codebook id {self.codebook_id!r}"
        if sum(self.segment_size(side) for side in sides) > MAX_BYTES // 2:
            return f"{sum(side * side for side in sides)} codes"
        return None

    def segment_size(self, side: int) -> int:
        """Bytes of a scale: its packed codes and their checksum."""
        return -(-side * side * self.bits // 8) + _CRC.size


def pack_header(header: Header) -> tuple[bytes, int]:
    """The bytes before the first scale, and the checksum that the first scale's chains on to."""
    name = header.variant.encode("ascii")
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        header.codebook_size,
        header.bits,
        bytes.fromhex(header.codebook_id),
        len(header.patch_nums),
        len(name),
    )
    data = fixed + struct.pack(f"<{len(header.patch_nums)}H", *header.patch_nums) + name
    crc = zlib.crc32(data)
    return data + _CRC.pack(crc), crc


def pack_scale(indices: NDArray[np.int32], bits: int, previous_crc: int) -> tuple[bytes, int]:
    """One scale's segment, and its checksum for the next to chain on to."""
    # Each code as `bits` rows of one bit, most significant first; packbits pads the last byte with zeros.
    shifts = np.arange(bits - 1, -1, -1, dtype=np.int32)
    payload = np.packbits(((indices[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()
    crc = zlib.crc32(payload, previous_crc)
    return payload + _CRC.pack(crc), crc


def pack(header: Header, indices: NDArray[np.int32]) -> bytes:
    """A whole file, or with fewer scales' codes, the first part of one."""
    data, crc = pack_header(header)
    parts, start = [data], 0
    for side in header.patch_nums:
        if start == len(indices):
            break
        segment, crc = pack_scale(indices[start : start + side * side], header.bits, crc)
        parts.append(segment)
        start += side * side
    return b"".join(parts)


def unpack(data: bytes) -> tuple[Header, NDArray[np.int32]]:
    """Header and code indices of a file that may end at any scale's end.

    Raises:
        CorruptCodesError: anything else.
    """
    header, at, crc = _unpack_header(data)
    found: list[NDArray[np.int32]] = []
    for i, side in enumerate(header.patch_nums):
        if at == len(data) and found:
            break
        stop = at + header.segment_size(side)
        if stop > len(data):
            hint = f"cut it to {at} bytes to keep the scales before" if found else "nothing of it can be read"
            raise CorruptCodesError(
                f"The file ends inside scale {i + 1} of {len(header.patch_nums)}, at byte {len(data)} of {stop}.",
                f"Fetch it again, or {hint}.",
            )
        payload = data[at : stop - _CRC.size]
        crc = zlib.crc32(payload, crc)
        if data[stop - _CRC.size : stop] != _CRC.pack(crc):
            raise CorruptCodesError(
                f"The checksum of scale {i + 1} (bytes {at} to {stop}) does not fit: it is damaged.", _AGAIN
            )
        found.append(_unpack_scale(payload, side * side, header))
        at = stop
    if at != len(data):
        raise CorruptCodesError(f"There are {len(data) - at} bytes after the last scale.", _AGAIN)
    return header, np.concatenate(found)


def _unpack_header(data: bytes) -> tuple[Header, int, int]:
    if data[:3] != MAGIC:
        raise CorruptCodesError("This is not a file of TokenFlow codes.", "Give a .tfc file, as `tokenflow encode` writes.")
    if data[3:4] > bytes([VERSION]):
        raise CorruptCodesError(
            f"The file has format version {data[3]}; this SDK reads version {VERSION}.",
            "Upgrade with `pip install --upgrade tokenflow-sdk`.",
        )
    if len(data) >= _FIXED.size:
        _, version, size, bits, codebook, n_scales, name_length = _FIXED.unpack_from(data)
        end = _FIXED.size + 2 * n_scales + name_length
        if len(data) >= end + _CRC.size:
            crc = zlib.crc32(data[:end])
            if data[end : end + _CRC.size] != _CRC.pack(crc):
                raise CorruptCodesError("The checksum of the file's header does not fit: it is damaged.", _AGAIN)
            sides = struct.unpack_from(f"<{n_scales}H", data, _FIXED.size)
            name = data[end - name_length : end].decode("ascii", errors="replace")
            header = Header(name, codebook.hex(), size, sides)
            problem = header.problem() or (f"{bits} bits a code" if bits != header.bits or version != VERSION else None)
            if problem:
                raise CorruptCodesError(f"The file's header claims {problem}.", "Make the file again.")
            return header, end + _CRC.size, crc
    raise CorruptCodesError(f"The file ends in its header, after {len(data)} bytes.", _AGAIN)


def _unpack_scale(payload: bytes, count: int, header: Header) -> NDArray[np.int32]:
    flat = np.unpackbits(np.frombuffer(payload, np.uint8))
    used = count * header.bits
    weights = 1 << np.arange(header.bits - 1, -1, -1, dtype=np.int32)
    indices = (flat[:used].reshape(count, header.bits) @ weights).astype(np.int32)
    if flat[used:].any() or indices.max() >= header.codebook_size:
        raise CorruptCodesError("The file holds codes outside its codebook.", "Make the file again.")
    return indices
