"""Loads a serialized engine from disk into TensorRT in pieces, and compares its SHA-256 in the same pass.

The whole engine is never in host memory a second time, and the hash is computed while TensorRT takes the piece.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from tokenflow_sdk.errors import BackendError
from tokenflow_sdk.files import open_regular, reason

__all__ = ["PIECE_BYTES", "load_engine"]

PIECE_BYTES = 2**26
"""Most bytes that are handed to TensorRT at once; where it asked for more, it asks again."""


def load_engine(trt: Any, runtime: Any, path: Path, sha256: str) -> Any:
    """Deserialize an engine.

    Args:
        trt: the module, from `import_tensorrt`.
        runtime: its `Runtime`.
        path: of the serialized engine.
        sha256: what the file's SHA-256 must be, in lower-case hex.

    Returns:
        The engine; None if TensorRT refuses it.

    Raises:
        BackendError: the file cannot be read, or its SHA-256 is another one. TensorRT's engine is then given up.
    """
    try:
        with open_regular(path) as file, _HashedFile(file) as content:
            if hasattr(trt, "IStreamReaderV2"):
                reader = _make_reader(trt, content)
                engine = runtime.deserialize_cuda_engine(reader)
                if reader.error is not None:
                    raise reader.error
            else:
                engine = runtime.deserialize_cuda_engine(content.read(-1))
            found = content.sha256()
    except (OSError, ValueError) as error:
        raise BackendError(f"The engine {path} cannot be read: {reason(error)}.", _BUILD_AGAIN) from error
    if found != sha256:
        raise BackendError(f"The engine {path} is damaged: its SHA-256 is not the one it was stored with.", _BUILD_AGAIN)
    return engine


_BUILD_AGAIN = "Build it again with `tokenflow build BUNDLE`, which keeps the engines that are intact."


class _HashedFile:
    """A file whose SHA-256 is computed, on a thread, from what is read of it. What was not read in order is read once more.

    Args:
        file: open for reading, at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._hashed = file, hashlib.sha256(), 0
        self._thread = ThreadPoolExecutor(1, "tokenflow-sha256")
        self._last: Future[None] | None = None

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def read(self, size: int) -> bytes:
        """At most `size` bytes from the current position; fewer only at the file's end. -1: all that are left."""
        start = self._file.tell()
        piece = self._file.read(size)
        if start <= self._hashed < start + len(piece):
            if self._last is not None:
                # At most one piece waits, so that no more than two are in memory.
                self._last.result()
            self._last = self._thread.submit(self._digest.update, memoryview(piece)[self._hashed - start :])
            self._hashed = start + len(piece)
        return piece

    def seek(self, offset: int, whence: int) -> None:
        self._file.seek(offset, whence)

    def sha256(self) -> str:
        """SHA-256 of the whole file, in lower-case hex."""
        self._file.seek(self._hashed)
        while self.read(PIECE_BYTES):
            pass
        if self._last is not None:
            self._last.result()
        return self._digest.hexdigest()


def _make_reader(trt: Any, content: _HashedFile) -> Any:
    whence = {trt.SeekPosition.SET: os.SEEK_SET, trt.SeekPosition.CUR: os.SEEK_CUR, trt.SeekPosition.END: os.SEEK_END}

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        """Gives TensorRT the file. TensorRT discards exceptions raised in its callbacks, so `error` keeps the first."""

        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)
            self.error: BaseException | None = None

        def read(self, num_bytes: int, stream: int) -> bytes:
            try:
                return content.read(min(num_bytes, PIECE_BYTES))
            except BaseException as error:
                self.error = self.error or error
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            try:
                content.seek(offset, whence[where])
            except BaseException as error:
                self.error = self.error or error
                return False
            return True

    return Reader()
