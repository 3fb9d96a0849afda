"""Reads and writes messages of protobuf, the format of ONNX files, because devices have no onnx package."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

__all__ = ["Message", "encoded", "fields"]


def fields(data: bytes | mmap.mmap, message: slice) -> Iterator[tuple[int, int | slice]]:
    """Yield number and value of each field of a message; fields of a fixed width, which ONNX has for floats, are stepped over.

    Args:
        data: the file.
        message: where in it the message is.

    Yields:
        The field's number in its message type, and an integer, or where in the file a text, bytes or a message is.

    Raises:
        ValueError, IndexError: the bytes are no such message.
    """
    at, end = message.start, message.stop
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 2:
            length, at = _varint(data, at)
            if length > end - at:
                raise ValueError("it ends early")
            yield tag >> 3, slice(at, at + length)
            at += length
        elif wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} is not ONNX")
    if at > end:
        raise ValueError("it ends early")


def _varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """The number that begins at byte `at`, seven bits to a byte, and where it ends."""
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at} is not ONNX")


class Message:
    """The fields of a message, by their numbers.

    Args:
        data: the file.
        place: where in it the message is.

    Raises:
        ValueError, IndexError: the bytes are no such message; texts raise ValueError too.
    """

    def __init__(self, data: bytes | mmap.mmap, place: slice) -> None:
        self._data = data
        self._fields = list(fields(data, place))

    def numbers(self, wanted: int) -> list[int]:
        """The integers of a field."""
        return [value for number, value in self._fields if number == wanted and isinstance(value, int)]

    def places(self, wanted: int) -> list[slice]:
        """Where in the file the texts, bytes and messages of a field are."""
        return [value for number, value in self._fields if number == wanted and isinstance(value, slice)]

    def messages(self, wanted: int) -> list[Message]:
        """The messages of a field."""
        return [Message(self._data, place) for place in self.places(wanted)]

    def texts(self, wanted: int) -> list[str]:
        """The texts of a field."""
        return [self._data[place].decode() for place in self.places(wanted)]

    def text(self, wanted: int) -> str:
        """The first text of a field; empty if there is none."""
        return next(iter(self.texts(wanted)), "")


def encoded(*parts: tuple[int, float | str | bytes]) -> bytes:
    """A message with these fields, each given by its number and its value; negative integers are of 64 bits, floats of 32."""
    pieces = []
    for number, value in parts:
        if isinstance(value, int):
            pieces += [_digits(number << 3), _digits(value & (2**64 - 1))]
        elif isinstance(value, float):
            pieces += [_digits(number << 3 | 5), struct.pack("<f", value)]
        else:
            content = value.encode() if isinstance(value, str) else value
            pieces += [_digits(number << 3 | 2), _digits(len(content)), content]
    return b"".join(pieces)


def _digits(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)
