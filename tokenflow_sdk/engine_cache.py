"""Built engines on disk: found by everything that decides whether one fits, written whole or not at all, dropped when unused.

An engine is `<digest>.engine` with `<digest>.json` beside it, which says what it was built from and with which result it was
checked. The JSON is written last: an engine without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tokenflow_sdk.bundle import file_sha256
from tokenflow_sdk.config import GraphEntry
from tokenflow_sdk.errors import ArgumentError, MissingPackageError, OutputError
from tokenflow_sdk.files import write_atomic

__all__ = ["CachedEngine", "EngineCache", "EngineKey", "default_directory", "graph_digest"]

DEFAULT_LIMIT = 20 * 10**9
"""Bytes of engines that are kept; the least recently used go first."""


def default_directory() -> Path:
    """`$TOKENFLOW_CACHE`, else `tokenflow/engines` in the user's cache directory."""
    named = os.environ.get("TOKENFLOW_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "tokenflow" / "engines"


def graph_digest(entry: GraphEntry) -> str:
    """SHA-256 over the hashes of a graph's files."""
    return hashlib.sha256("".join(file.sha256 for file in entry.files).encode()).hexdigest()


@dataclass(frozen=True)
class EngineKey:
    """What an engine depends on; a difference in any of it is another engine.

    `graph_sha256` as `graph_digest`; `flavour` tensorrt or tensorrt-rtx and its full `version`; `system` operating system and
    processor; `target` the GPU architecture (sm86); `precision` with its pinned nodes; `profile` shapes, canonical.
    """

    graph: str
    graph_sha256: str
    flavour: str
    version: str
    target: str
    precision: str
    profile: str
    system: str = f"{platform.system()}-{platform.machine()}".lower()

    @property
    def digest(self) -> str:
        """32 hex digits: the file name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def title(self) -> str:
        """For people: `decode, fp16, sm86, tensorrt-rtx 1.7.1.116`."""
        return f"{self.graph}, {self.precision}, {self.target}, {self.flavour} {self.version}"


@dataclass(frozen=True)
class CachedEngine:
    """An engine on disk, verified, and the certificate stored with it."""

    key: EngineKey
    path: Path
    size: int
    certificate: Mapping[str, Any]


class EngineCache:
    """A directory of engines, shared by processes.

    Args:
        directory: made on the first write; None: `default_directory`.
        limit: bytes to keep.

    Raises:
        ArgumentError: `limit` is negative.
    """

    def __init__(self, directory: Path | None = None, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 0:
            raise ArgumentError(f"limit={limit} keeps nothing.", "Give bytes, e.g. 20_000_000_000.")
        self.directory = directory or default_directory()
        self.limit = limit

    def get(self, key: EngineKey) -> CachedEngine | None:
        """The engine of this key, if it is whole. Nothing is removed: another process may be writing it."""
        found = self._read(self._record(key))
        if found is None or found.key != key or not _is_whole(found, self._record(key)):
            return None
        with suppress(OSError):
            # Recently used; a directory that cannot be written serves all the same.
            os.utime(self._record(key))
        return found

    def put(self, key: EngineKey, engine: bytes, certificate: Mapping[str, Any]) -> CachedEngine:
        """Store an engine and drop the least recently used beyond the limit.

        Raises:
            OutputError: the directory cannot be written.
        """
        path = self._engine(key)
        write_atomic(path, engine)
        digest = hashlib.sha256(engine).hexdigest()
        record = {"key": asdict(key), "size": len(engine), "sha256": digest, "certificate": dict(certificate)}
        write_atomic(self._record(key), json.dumps(record, indent=2).encode())
        self._evict(keep=key.digest)
        return CachedEngine(key, path, len(engine), certificate)

    def certify(self, key: EngineKey, certificate: Mapping[str, Any]) -> None:
        """Store what an engine's check gave; nothing where the engine is gone.

        Raises:
            OutputError: the directory cannot be written.
        """
        try:
            record = json.loads(self._record(key).read_bytes())
        except (OSError, ValueError):
            return
        write_atomic(self._record(key), json.dumps(record | {"certificate": dict(certificate)}, indent=2).encode())

    @contextmanager
    def building(self, key: EngineKey) -> Iterator[None]:
        """Held by one process at a time; the system lets go of it when a process dies.

        Raises:
            MissingPackageError: filelock is not installed.
            OutputError: the directory cannot be written.
        """
        try:
            from filelock import FileLock
        except ImportError as error:
            raise MissingPackageError(
                "Building engines needs filelock, which is not installed.", "Run `pip install 'tokenflow-sdk[build]'`."
            ) from error
        lock = FileLock(self.directory / f"{key.digest}.lock")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise OutputError(
                f"{self.directory} cannot be written: {error.strerror or error}.",
                "Name another directory for engines in $TOKENFLOW_CACHE or with --cache.",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def entries(self) -> list[CachedEngine]:
        """All engines with a readable record, most recently used first."""
        records = sorted(self.directory.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [found for path in records if (found := self._read(path)) is not None]

    def clear(self) -> int:
        """Remove every engine, finished or not; the number of bytes freed."""
        freed = 0
        for path in self.directory.glob("*"):
            if path.suffix in (".engine", ".json") or path.name.startswith("."):
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _engine(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.engine"

    def _record(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.json"

    def _read(self, path: Path) -> CachedEngine | None:
        try:
            data = json.loads(path.read_bytes())
            key = EngineKey(**{field.name: str(data["key"][field.name]) for field in fields(EngineKey)})
            return CachedEngine(key, path.with_suffix(".engine"), int(data["size"]), dict(data["certificate"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remove(self, digest: str) -> None:
        for suffix in (".json", ".engine"):
            with suppress(OSError):
                (self.directory / f"{digest}{suffix}").unlink(missing_ok=True)

    def _evict(self, keep: str) -> None:
        total = 0
        for engine in self.entries():
            total += engine.size
            if total > self.limit and engine.key.digest != keep:
                self._remove(engine.key.digest)


def _is_whole(engine: CachedEngine, record: Path) -> bool:
    try:
        return (
            engine.path.stat().st_size == engine.size and file_sha256(engine.path) == json.loads(record.read_bytes())["sha256"]
        )
    except (OSError, ValueError, KeyError):
        return False
