"""`Storage`: one place for files, a local directory or anything that fsspec opens."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tokenflow_sdk.errors import (
    ArgumentError,
    DatasetFileError,
    MissingPackageError,
    OutputError,
    StorageError,
    TokenFlowError,
)
from tokenflow_sdk.files import open_regular, read_regular, reason, write_atomic

__all__ = ["Entry", "Storage", "as_text"]

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_OF_THE_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
    errno.ENXIO, errno.EFBIG, errno.EILSEQ,
)  # fmt: skip
"""What is wrong with a local file itself, and not with its disk."""
_ACCESS = "Check that the service can be reached, and that this machine has credentials for it."
_PARTIAL = ".partial"
_LEFT = re.compile(rf"\.(.*)-[0-9a-f]{{12}}({re.escape(_PARTIAL)})?")
"""Names of local files before they are whole: of `new_file`, and of `write`, which leaves out the ending."""


def as_text(name: str) -> str:
    r"""A file's name as text that UTF-8 can write: bytes of it that are not UTF-8 become `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class Entry(NamedTuple):
    """One name in a directory. `size` in bytes; None: not known, as in a local listing; `find` asks for it."""

    name: str
    is_directory: bool
    size: int | None


class Storage:
    """A place: a local directory or file, or an address `scheme://...` of one that fsspec opens.

    Names in it are relative, with `/`; the empty name is the place itself. It can be pickled. Reading raises DatasetFileError
    where one file is at fault, and StorageError where the disk, network or service is. Writing raises OutputError.

    Args:
        address: of the place. Local ones need no fsspec.

    Raises:
        MissingPackageError: fsspec, or its package for the scheme, is not installed; when the place is first used.
        ArgumentError: there is no such scheme; when the place is first used.
    """

    def __init__(self, address: str) -> None:
        if address.startswith("file://"):
            # Takes long to import.
            from urllib.parse import urlsplit
            from urllib.request import url2pathname

            address = url2pathname(urlsplit(address).path)
        self.is_local = "://" not in address
        # Other processes may have other working directories.
        self.address = os.path.abspath(address) if self.is_local else address.rstrip("/")  # noqa: PTH100 - links stay

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "is_local": self.is_local}

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1].rsplit(os.sep, 1)[-1]

    def path(self, name: str = "") -> str:
        """The full address of a name."""
        if self.is_local:
            return os.path.join(self.address, *name.split("/")) if name else self.address  # noqa: PTH118 - millions of them
        return f"{self.address}/{name}" if name else self.address

    def scan(self, directory: str = "") -> Iterator[Entry]:
        """What lies in a directory, in no order. Local links to directories are left out: they may lead back.

        Local names are read as they are asked for; of other places a directory's whole listing is in memory.
        """
        if self.is_local:
            with self._reading(directory), os.scandir(self.path(directory)) as entries:
                for entry in entries:
                    if not (entry.is_symlink() and os.path.isdir(entry.path)):  # noqa: PTH112 - no error where links lead nowhere
                        yield Entry(entry.name, entry.is_dir(follow_symlinks=False), None)
            return
        with self._reading(directory):
            place = self._remote(directory)
            listing = self._filesystem.ls(place, detail=True)
        for info in listing:
            # An object may have the name of the directory itself: it marks one that may be empty.
            if (path := info["name"].rstrip("/")) != place.rstrip("/"):
                yield Entry(path.rsplit("/", 1)[-1], info["type"] == "directory", info.get("size"))

    def find(self, name: str = "") -> Entry | None:
        """The file or directory of a name, with its size; None if there is none."""
        try:
            with self._reading(name):
                if self.is_local:
                    status = os.stat(path := self.path(name))  # noqa: PTH116 - of millions of files
                    return Entry(os.path.basename(path), stat.S_ISDIR(status.st_mode), status.st_size)  # noqa: PTH119
                info = self._filesystem.info(self._remote(name))
                return Entry(self.path(name).rsplit("/", 1)[-1], info["type"] == "directory", info.get("size"))
        except DatasetFileError as error:
            if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                return None
            raise

    def open(self, name: str = "") -> io.BufferedReader:
        """A file for reading and seeking, whose errors are this class's."""
        file: Any
        with self._reading(name):
            file = open_regular(Path(self.path(name))) if self.is_local else self._filesystem.open(self._remote(name), "rb")
        return io.BufferedReader(_NamedErrors(self, name, file), 2**18)

    def read(self, name: str = "", limit: int = 2**31, size: int | None = None) -> bytes:
        """A file's content.

        Args:
            name: of the file.
            limit: most bytes that it may have.
            size: its bytes, if they are known from a listing, which saves a request.
        """
        with self._reading(name):
            if self.is_local:
                return read_regular(Path(self.path(name)), limit)
            path = self._remote(name)
            if (self._filesystem.size(path) if size is None else size) > limit:
                raise DatasetFileError(f"{as_text(self.path(name))} is larger than {limit:,} bytes.", "Give a smaller file.")
            try:
                content: bytes = self._filesystem.cat_file(path)
            except PermissionError as error:
                # Of an object in an archive, say. Where credentials have ended, it cannot be asked about either.
                self._filesystem.info(path)
                hint = "Check its permissions, or restore it from its archive."
                raise DatasetFileError(f"{as_text(self.path(name))} cannot be read: {_why(error)}.", hint) from error
            return content

    @contextmanager
    def new_file(self, name: str, sending: Callable[[Callable[[], None]], None] = lambda send: send()) -> Iterator[Path]:
        """Give a local file to write. When the block succeeds, it appears under its name, whole; else it is deleted.

        Object stores show an object when all of it has arrived. What is sent to others, e.g. by SFTP, may be seen half there.

        Args:
            name: of the file.
            sending: calls its argument, which sends the file where the storage is not local, and may call it again if it fails.
        """
        if self.is_local:
            target = Path(self.path(name))
            temporary = target.with_name(f".{target.name}-{secrets.token_hex(6)}{_PARTIAL}")
            with self._writing(name):
                target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                with self._writing(name):
                    with temporary.open("rb+") as file:
                        os.fsync(file.fileno())
                    temporary.replace(target)
            finally:
                with suppress(OSError, ValueError):
                    temporary.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="tokenflow-") as directory:
            temporary = Path(directory, name.rsplit("/", 1)[-1])
            yield temporary

            def send() -> None:
                with self._writing(name):
                    self._filesystem.put_file(str(temporary), self._remote(name))

            sending(send)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole, or replace it."""
        with self._writing(name):
            if self.is_local:
                path = Path(self.path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content)
            else:
                self._filesystem.pipe_file(self._remote(name), content)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._writing(name), suppress(FileNotFoundError):
            if self.is_local:
                Path(self.path(name)).unlink()
            else:
                self._filesystem.rm_file(self._remote(name))

    def delete_leftovers(self, directory: str = "", names: Collection[str] | None = None) -> None:
        """Delete what `new_file` and `write` left in a local directory because its process was killed.

        Args:
            directory: where to look.
            names: of the files, in the directory, that were to be written; nobody else may be writing them. None: any.
        """
        if not self.is_local or self.find(directory) is None:
            return
        for entry in list(self.scan(directory)):
            found = _LEFT.fullmatch(entry.name)
            if found is not None and (names is None or found[1] in names):
                self.delete(f"{directory}/{entry.name}" if directory else entry.name)

    @cached_property
    def _filesystem(self) -> Any:
        """fsspec's file system. It lists anew each time: a kept listing would hide what others do."""
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            hint = "Run `pip install 'tokenflow-sdk[dataset]'`."
            raise MissingPackageError(f"{self.address} needs fsspec, which is not installed.", hint) from error
        try:
            filesystem, self._root = url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES.get(self.address.partition("://")[0])
            hint = f"Run `pip install {package}`." if package else "Install what fsspec needs for it."
            raise MissingPackageError(f"{self.address} cannot be opened: {error}.", hint) from error
        except ValueError as error:
            hint = "Give a path, or an address that fsspec opens."
            raise ArgumentError(f"{self.address} cannot be opened: {error}.", hint) from error
        return filesystem

    _root: str

    def _remote(self, name: str) -> str:
        """A name as the file system takes it."""
        self._filesystem  # noqa: B018 - finds the root
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Name the errors of reading a file or directory."""
        try:
            yield
        except TokenFlowError:
            raise
        except FileNotFoundError as error:
            raise DatasetFileError(f"{as_text(self.path(name))} does not exist.", "Check the path.") from error
        except Exception as error:
            # Services have exceptions of their own, which are not OSErrors, e.g. for credentials that are missing.
            if not self.is_local:
                raise StorageError(f"{as_text(self.path(name))} cannot be read: {_why(error)}.", _ACCESS) from error
            if not isinstance(error, (OSError, ValueError)):
                raise
            if isinstance(error, ValueError) or error.errno in _OF_THE_FILE:
                hint = "Check the path and its permissions."
                raise DatasetFileError(f"{as_text(self.path(name))} cannot be read: {reason(error)}.", hint) from error
            raise StorageError(f"{as_text(self.path(name))} cannot be read: {reason(error)}.", "Check its disk.") from error

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Name the errors of writing a file."""
        try:
            yield
        except TokenFlowError:
            raise
        except Exception as error:
            if not self.is_local:
                raise OutputError(f"{as_text(self.path(name))} cannot be written: {_why(error)}.", _ACCESS) from error
            if not isinstance(error, (OSError, ValueError)):
                raise
            hint = "Choose another output, or check its directory and the free space."
            raise OutputError(f"{as_text(self.path(name))} cannot be written: {reason(error)}.", hint) from error


def _why(error: Exception) -> str:
    """What an exception of a service says, in one line."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _NamedErrors(io.RawIOBase):
    """A file that is open for reading, whose errors are named as those of its storage."""

    def __init__(self, storage: Storage, name: str, file: BinaryIO) -> None:
        self._storage, self._name, self._file = storage, name, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._storage._reading(self._name):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._storage._reading(self._name):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._file.close()
