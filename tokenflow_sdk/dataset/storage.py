"""`Storage`: one place for files, a local directory or anything that fsspec opens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["Entry", "Storage"]


class Entry(NamedTuple):
    """One name in a directory."""

    name: str
    is_directory: bool
    size: int


class Storage:
    """A place: a local directory, or an address `scheme://...` that fsspec opens. Names in it are relative, with `/`.

    Can be pickled. Its errors are DatasetError (not there, no permission, no credentials), StorageError (may pass: try again),
    and OutputError when writing.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_local = "://" not in address

    def path(self, name: str) -> str:
        """The full address of a name, for messages and for other programs."""
        raise NotImplementedError

    def scan(self, directory: str = "") -> Iterator[Entry]:
        """What lies in a directory, in no order."""
        raise NotImplementedError

    def find(self, name: str) -> Entry | None:
        """One file or directory; None if there is none."""
        raise NotImplementedError

    def open(self, name: str) -> BinaryIO:
        """A file for reading, also for seeking."""
        raise NotImplementedError

    def read(self, name: str, limit: int = 2**31) -> bytes:
        """A file's content, of at most `limit` bytes."""
        raise NotImplementedError

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """A local file to write. When the block succeeds, it appears under its name, whole; else it is deleted."""
        raise NotImplementedError

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole, or replace it."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        raise NotImplementedError

    def delete_leftovers(self, directory: str = "") -> None:
        """Delete what `new_file` left in a directory because its process was killed; only if nobody writes there now."""
        raise NotImplementedError
