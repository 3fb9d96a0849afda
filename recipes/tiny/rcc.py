"""Reads Qt resource archives (`.rcc`), a tree of names with stored or zlib-compressed files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

__all__ = ["read_rcc"]

_COMPRESSED, _DIRECTORY, _ZSTD = 1, 2, 4


def read_rcc(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each file; zstd-compressed files are left out.

    Raises:
        ValueError: the content is no such archive, or is truncated.
    """
    if content[:4] != b"qres":
        raise ValueError("no Qt resource archive")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    size = 14 if version == 1 else 22

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", content, names + offset)
        return content[names + offset + 6 : names + offset + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, path: str) -> Iterator[tuple[str, bytes]]:
        name, flags, second, third = struct.unpack_from(">IHII", content, tree + index * size)
        here = f"{path}/{name_at(name)}" if index else ""
        if flags & _DIRECTORY:
            for child in range(third, third + second):
                yield from walk(child, here)
        elif not flags & _ZSTD:
            start = data + third
            (length,) = struct.unpack_from(">I", content, start)
            stored = content[start + 4 : start + 4 + length]
            yield here.lstrip("/"), zlib.decompress(stored[4:]) if flags & _COMPRESSED else stored

    try:
        yield from walk(0, "")
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"damaged Qt resource archive: {error}") from error
