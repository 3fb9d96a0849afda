"""Locate data files shipped with the SDK, read regular files only, and write output files atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tokenflow_sdk.arguments import file_path
from tokenflow_sdk.errors import OutputError

__all__ = [
    "file_sha256",
    "file_status",
    "is_directory",
    "is_regular",
    "open_regular",
    "packaged_data",
    "read_regular",
    "reason",
    "write_atomic",
]


def packaged_data(name: str) -> Path:
    """Path of a data directory shipped with the SDK.

    Args:
        name: its path in the repository, e.g. `models/tiny`.

    Returns:
        The directory inside the installed package or, in a checkout, in the repository. It may not exist.
    """
    package = Path(__file__).parent
    inside = package / "_data" / name
    return inside if inside.is_dir() else package.parent / name


def file_status(path: Path) -> os.stat_result | None:
    """What `Path.stat` gives; None if the file is missing or may not be looked up, or no file can have such a name."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def is_directory(path: Path) -> bool:
    """Whether a path is a directory. Unlike `Path.is_dir`, never raises: see `file_status`."""
    status = file_status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_regular(path: Path) -> bool:
    """Whether a path is a file whose reading ends, unlike that of a pipe. Never raises: see `file_status`."""
    status = file_status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Opening a pipe would wait for a writer, and reading a device might never end.

    Raises:
        OSError: it cannot be opened, or is a directory, pipe, device or socket.
        ValueError: no file can have such a name.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file. Raises as `open_regular`, and OSError if it has more than `limit` bytes."""
    with open_regular(path) as file:
        # Room for `limit` bytes would be mapped, and unmapped, for each small file.
        size = min(os.fstat(file.fileno()).st_size, limit)
        content = file.read(size + 1)
        if len(content) > size:  # it has grown, or is in /proc, where files claim to be empty
            content += file.read(limit + 1 - len(content))
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file's content, in lower-case hex. Raises as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def reason(error: OSError | ValueError) -> object:
    """What a file operation's exception says is wrong, without number and path."""
    return getattr(error, "strerror", None) or error


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: to a temporary file in the same directory, which then replaces `path`.

    Args:
        path: the file to create or replace.
        data: its whole content.

    Raises:
        ArgumentError: `path` is none.
        OutputError: the directory is missing or read-only, the disk is full, the file system does not allow the name, or `path`
            exists and is not a regular file.
    """
    path = Path(file_path("path", path))
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is not a file that can be replaced.", "Choose another output.")
        # File systems limit the bytes of a name, usually to 255.
        start = path.name.encode(errors="ignore")[:100].decode(errors="ignore")
        temporary = path.with_name(f".{start}-{secrets.token_hex(6)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        # A null byte or a lone surrogate in a name is a ValueError.
        raise OutputError(
            f"{path} cannot be written: {reason(error)}.", "Choose another output, or check its directory and the free space."
        ) from error
