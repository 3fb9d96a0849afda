"""File operations that fail, one at a time."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
_OPERATIONS = ("open", "stat", "lstat", "listdir", "scandir", "mkdir", "rmdir", "replace", "rename", "unlink", "utime", "chmod")


class FileFaults:
    """Counts the file operations below some directories, and fails one of them.

    Args:
        directories: others' files, e.g. those of Python itself, are let through.
        number: which operation fails, from 0; None: none.
        code: its `errno`.
    """

    def __init__(self, directories: Sequence[Path], number: int | None, code: int) -> None:
        self._below = tuple(str(directory.resolve()) for directory in directories)
        self.number, self.code = number, code
        self.operations: list[str] = []

    def concerns(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(self._below)  # noqa: PTH100

    def note(self, operation: str, path: object) -> None:
        self.operations.append(f"{operation} {path}")
        if len(self.operations) - 1 == self.number:
            raise OSError(self.code, os.strerror(self.code), str(path))


class _Raw(io.FileIO):
    """A file whose first read and first write are operations: the others of a large file would be more of the same."""

    faults: FileFaults | None

    def _note(self, operation: str) -> None:
        faults, self.faults = self.faults, None
        if faults is not None:
            faults.note(operation, self.name)

    def write(self, data: Any) -> int:
        self._note("write")
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self._note("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._note("read")
        return super().readall()


def _open(faults: FileFaults, plain: Callable[..., Any]) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not faults.concerns(file):
            return plain(file, mode, buffering, *args, **kwargs)
        faults.note("open", file)
        if "b" not in mode:
            return plain(file, mode, buffering, *args, **kwargs)
        raw = _Raw(os.fspath(file), mode.replace("b", ""))
        raw.faults = faults
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)

    return opened


def _noted(faults: FileFaults, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
        if faults.concerns(path):
            faults.note(name, path)
        return plain(path, *args, **kwargs)

    return operation


@contextmanager
def file_faults(directories: Sequence[Path], number: int | None = None, code: int = errno.EIO) -> Iterator[FileFaults]:
    """Fail one file operation of the block; see `FileFaults`."""
    faults = FileFaults(directories, number, code)
    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(os, name, _noted(faults, name, getattr(os, name)))
        synced = os.fsync
        patch.setattr(os, "fsync", lambda handle: (faults.note("fsync", handle), synced(handle))[1])
        opened = _open(faults, io.open)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield faults
