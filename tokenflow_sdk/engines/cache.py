"""Built engines on disk: found by everything that decides whether one fits, written whole or not at all, dropped when unused.

An engine is `<digest>.engine` with `<digest>.json` beside it, which says what it was built from and with which result it was
checked. The JSON is written last: an engine without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tokenflow_sdk.bundle.bundle import file_sha256
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import ArgumentError, MissingPackageError, OutputError
from tokenflow_sdk.files import write_atomic

__all__ = ["CachedEngine", "EngineCache", "EngineKey", "default_directory", "default_limit", "graph_digest"]

DEFAULT_LIMIT_GB = 20.0
_OTHER_DIRECTORY_HINT = "Name another directory for engines in $TOKENFLOW_CACHE or with --cache."
_SUFFIXES = (".json", ".engine", ".kernels")
"""Record, engine, and what TensorRT-RTX compiled from it."""


def default_directory() -> Path:
    """`$TOKENFLOW_CACHE`, else `tokenflow/engines` in the user's cache directory."""
    named = os.environ.get("TOKENFLOW_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "tokenflow" / "engines"


def default_limit() -> int:
    """Bytes of engines that are kept: `$TOKENFLOW_CACHE_GB` gigabytes, else 20.

    Raises:
        ArgumentError: the variable is no such number.
    """
    named = os.environ.get("TOKENFLOW_CACHE_GB")
    try:
        gigabytes = DEFAULT_LIMIT_GB if named is None else float(named)
    except ValueError:
        gigabytes = math.nan
    if not (math.isfinite(gigabytes) and gigabytes >= 0):
        raise ArgumentError(f"TOKENFLOW_CACHE_GB={named!r} is no number of gigabytes.", "Set it to e.g. 20, or unset it.")
    return int(gigabytes * 1e9)


def graph_digest(entry: GraphEntry) -> str:
    """SHA-256 over the hashes of a graph's files."""
    return hashlib.sha256("".join(file.sha256 for file in entry.files).encode()).hexdigest()


@dataclass(frozen=True)
class EngineKey:
    """What an engine depends on; a difference in any of it is another engine.

    `graph_sha256` as `graph_digest`; `revision` of what the SDK makes of it; `flavour` tensorrt or tensorrt-rtx and its full
    `version`; `system` operating system and processor; `target` the GPU architecture (sm86); `gpu` its model, where engines are
    for that alone, else empty; `precision` with its pinned nodes; `profile` shapes, canonical.
    """

    graph: str
    graph_sha256: str
    revision: str
    flavour: str
    version: str
    target: str
    precision: str
    profile: str
    gpu: str = ""
    system: str = f"{platform.system()}-{platform.machine()}".lower()

    @property
    def runtime_and_gpu(self) -> tuple[str, str, str, str]:
        """Where engines run that differ in nothing else: TensorRT and GPU."""
        return self.flavour, self.version, self.target, self.gpu

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
    """An engine on disk, verified, its certificate, and the build config that it was built by (`BuildConfig.to_json`)."""

    key: EngineKey
    path: Path
    size: int
    certificate: Mapping[str, Any]
    build_config: Mapping[str, Any]

    @property
    def kernels(self) -> Path:
        """Where TensorRT-RTX keeps what it compiled from the engine on this machine."""
        return self.path.with_suffix(".kernels")


class EngineCache:
    """A directory of engines, shared by processes.

    Args:
        directory: made on the first write; None: `default_directory`.
        limit: bytes to keep; None: `default_limit`. The least recently used go first beyond it, but nothing that was used since
            this object was made: a bundle's engines must not push out each other.

    Raises:
        ArgumentError: `limit` is negative.
    """

    def __init__(self, directory: Path | None = None, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        if self.limit < 0:
            raise ArgumentError(f"limit={limit} keeps nothing.", "Give bytes, e.g. 20_000_000_000.")
        self.directory = directory or default_directory()
        # File systems round times, some to two seconds.
        self._since = time.time() - 2

    def get(self, key: EngineKey) -> CachedEngine | None:
        """The engine of this key, if it is whole. Nothing is removed: another process may be writing it."""
        found = self._read(self._record(key))
        if found is None or found.key != key or not _is_intact(found, self._record(key)):
            return None
        with suppress(OSError):
            # Recently used; a directory that cannot be written serves all the same.
            os.utime(self._record(key))
        return found

    def put(self, key: EngineKey, engine: bytes, build_config: Mapping[str, Any]) -> CachedEngine:
        """Store an engine, without a certificate yet, and drop the least recently used beyond the limit.

        Raises:
            OutputError: the directory cannot be written.
        """
        path, digest = self._engine(key), hashlib.sha256(engine).hexdigest()
        record = {
            "key": asdict(key),
            "size": len(engine),
            "sha256": digest,
            "build_config": dict(build_config),
            "certificate": {},
        }
        try:
            write_atomic(path, engine)
            write_atomic(self._record(key), json.dumps(record, indent=2).encode())
        except OutputError as error:
            raise OutputError(
                error.message, f"Free some space (`tokenflow cache clear`), or n{_OTHER_DIRECTORY_HINT[1:]}"
            ) from error
        self._evict()
        return CachedEngine(key, path, len(engine), {}, dict(build_config))

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
                _OTHER_DIRECTORY_HINT,
            ) from error
        try:
            yield
        finally:
            lock.release()

    def entries(self) -> list[CachedEngine]:
        """All engines with a readable record, most recently used first."""
        records = sorted(self.directory.glob("*.json"), key=_last_used, reverse=True)
        return [found for path in records if (found := self._read(path)) is not None]

    def clear(self) -> int:
        """Remove every engine, finished or not; the number of bytes freed."""
        freed = 0
        for path in self.directory.glob("*"):
            if path.suffix in _SUFFIXES or path.name.startswith("."):
                with suppress(FileNotFoundError):
                    freed += path.stat().st_size
                    path.unlink()
        return freed

    def _engine(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.engine"

    def _record(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.json"

    def _read(self, path: Path) -> CachedEngine | None:
        try:
            data = json.loads(path.read_bytes())
            key = EngineKey(**{field.name: str(data["key"][field.name]) for field in fields(EngineKey)})
            contents = (dict(data[name]) for name in ("certificate", "build_config"))
            return CachedEngine(key, path.with_suffix(".engine"), int(data["size"]), *contents)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remove(self, digest: str) -> None:
        for suffix in _SUFFIXES:
            with suppress(OSError):
                (self.directory / f"{digest}{suffix}").unlink(missing_ok=True)

    def _evict(self) -> None:
        total = 0
        for engine in self.entries():
            total += engine.size
            if total > self.limit and _last_used(self._record(engine.key)) < self._since:
                self._remove(engine.key.digest)


def _last_used(record: Path) -> float:
    """When an engine was used last; 0 where another process has just removed it."""
    try:
        return record.stat().st_mtime
    except OSError:
        return 0


def _is_intact(engine: CachedEngine, record: Path) -> bool:
    try:
        return (
            engine.path.stat().st_size == engine.size and file_sha256(engine.path) == json.loads(record.read_bytes())["sha256"]
        )
    except (OSError, ValueError, KeyError):
        return False
