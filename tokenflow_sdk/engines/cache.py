"""A directory of built engines, each found by a key of everything it depends on, and evicted when least recently used.

An engine is `<digest>.engine` with a record `<digest>.json` beside it: the engine's key, build config, size, SHA-256, figures
and its certificates by GPU architecture. The record is written after the engine, so an engine without a record is incomplete
and never used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import ArgumentError, MissingPackageError, OutputError, TokenFlowError
from tokenflow_sdk.files import file_sha256, file_status, read_regular, write_atomic

__all__ = ["CachedEngine", "EngineCache", "EngineKey", "default_directory", "default_limit", "graph_digest", "join_targets"]

DEFAULT_LIMIT_GB = 20.0
_WRITTEN = re.compile(
    r"[0-9a-f]{32}\.(json|engine|(sm\d+\.)?kernels|choice|lock)|\.[0-9a-f]{32}\.(json|engine|(sm\d+\.)?kernels|choice)-[0-9a-f]{12}"
)
"""Names of all files that the cache holds: those of engines, measured choices, locks, and temporary files of `write_atomic`."""
_MOST_RECORD_BYTES = 2**24
_MARK = "CACHEDIR.TAG"
_MARK_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# Engines that tokenflow-sdk built; `tokenflow cache clear` removes them.\n"
)
"""Marks a directory as an engine cache; backup programs leave directories with such a file out (bford.info/cachedir)."""


def default_directory() -> Path:
    """The engine cache's directory: `$TOKENFLOW_CACHE`, else `tokenflow/engines` in the user's cache directory.

    Raises:
        OutputError: neither is known, because the user has no home directory.
    """
    if named := os.environ.get("TOKENFLOW_CACHE"):
        return Path(named)
    import platformdirs

    try:
        if not os.environ.get("XDG_CACHE_HOME"):
            # Raises where there is none; platformdirs would take `~` for a directory.
            Path.home()
        base = platformdirs.user_cache_path()
    except RuntimeError as error:
        raise OutputError(
            "There is no directory for engines: this user has no home directory.",
            "Name one in $TOKENFLOW_CACHE or with --cache.",
        ) from error
    return base / "tokenflow" / "engines"


def default_limit() -> int:
    """The engine cache's size limit in bytes: `$TOKENFLOW_CACHE_GB` gigabytes, else 20 GB.

    Raises:
        ArgumentError: the variable is not a finite number of at least 0.
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
    """SHA-256 over the hashes of a graph's files, as 64 hex digits."""
    return hashlib.sha256("".join(file.sha256 for file in entry.files).encode()).hexdigest()


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on. A cached engine is used only if all of it is equal, but may have more targets.

    Attributes:
        graph: name of the graph in the bundle.
        graph_sha256: the graph's `graph_digest`.
        revision: `tokenflow_sdk.engines.build.REVISION`.
        flavour: `tensorrt` or `tensorrt-rtx`.
        version: full version of TensorRT.
        target: GPU architecture, e.g. sm86; several with commas in ascending order (`join_targets`), e.g. sm86,sm89,sm120.
        precision: `Annotations.key` of the graph: precision, pinned nodes, and what is special about the decoder.
        profile: digest of the optimization profiles and the workspace limit.
        gpu: model of the GPU that full TensorRT built on; empty for TensorRT-RTX, whose engines run on the whole architecture.
        system: operating system and processor architecture.
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
    def targets(self) -> tuple[str, ...]:
        """The GPU architectures one by one."""
        return tuple(self.target.split(","))

    def serves(self, other: EngineKey) -> bool:
        """Whether an engine of this key can be used as one of `other`: it has the other's targets, and all else is equal."""
        return replace(self, target=other.target) == other and set(other.targets) <= set(self.targets)

    def runs_where(self, other: EngineKey) -> bool:
        """Whether the same TensorRT and GPU that run an engine of `other` also run one of this key."""
        same = (self.flavour, self.version, self.gpu) == (other.flavour, other.version, other.gpu)
        return same and set(other.targets) <= set(self.targets)

    @property
    def digest(self) -> str:
        """The name of the engine's files without their endings: 32 hex digits of the key's SHA-256."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def title(self) -> str:
        """Description for messages, e.g. `decode, fp16, sm86, tensorrt-rtx 1.7.1.116`."""
        return f"{self.graph}, {self.precision}, {self.target}, {self.flavour} {self.version}"


def join_targets(targets: Iterable[str]) -> str:
    """GPU architectures as `EngineKey.target`: each once, in lower case, in ascending order."""
    return ",".join(sorted({target.lower() for target in targets}, key=lambda target: (len(target), target)))


@dataclass(frozen=True)
class CachedEngine:
    """An engine in the cache.

    Attributes:
        key: what it depends on.
        path: of the serialized engine.
        size: in bytes.
        sha256: of the serialized engine, as stored when it was built.
        certificates: results of its comparisons with the reference, as `Certificate.to_json`, by the architecture of the GPU
            that ran it; an architecture is missing before its comparison.
        build_config: what it was built by, as `BuildConfig.to_json`.
        figures: what TensorRT said of it; see `BuiltEngine`.
    """

    key: EngineKey
    path: Path
    size: int
    sha256: str
    certificates: Mapping[str, Mapping[str, Any]]
    build_config: Mapping[str, Any]
    figures: Mapping[str, Any]

    def kernels(self, architecture: str) -> Path:
        """File for the kernels that TensorRT-RTX compiles from the engine on a GPU of this architecture."""
        return self.path.with_suffix(f".{architecture}.kernels")


class EngineCache:
    """A directory of engines. Several processes may use it at once.

    Args:
        directory: created by the first build; None: `default_directory`, which is looked up when it is first needed.
        limit: bytes of engines to keep; None: `default_limit`. Beyond it the least recently used engines are removed, except
            those used since this object was made, so that the engines of one bundle do not evict each other.

    Raises:
        ArgumentError: `limit` is negative, or `$TOKENFLOW_CACHE_GB` is invalid.
    """

    def __init__(self, directory: Path | None = None, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        if self.limit < 0:
            raise ArgumentError(f"limit={limit} keeps nothing.", "Give bytes, e.g. 20_000_000_000.")
        self._directory = directory
        # Some file systems round modification times to two seconds.
        self._since = time.time() - 2

    @cached_property
    def directory(self) -> Path:
        """Where the engines are. Raises as `default_directory` if none was named."""
        return self._directory or default_directory()

    def get(self, key: EngineKey) -> CachedEngine | None:
        """An engine for a key; None if there is none, or it is damaged. Marks it as used.

        It is the engine of this very key, else one with more targets, as few as possible. Its SHA-256 is checked. A damaged
        engine is not removed, because another process may be writing it.
        """
        return self._get(key, _is_intact)

    def find(self, key: EngineKey) -> CachedEngine | None:
        """As `get`, but of the engine only the size is checked: whoever loads it must compare its SHA-256."""
        return self._get(key, _has_size)

    def _get(self, key: EngineKey, usable: Callable[[CachedEngine], bool]) -> CachedEngine | None:
        found = next((engine for engine in self._candidates(key) if usable(engine)), None)
        if found is not None:
            with suppress(OSError):
                # The modification time of the record is the time of last use. A read-only cache is fine: nothing is evicted.
                os.utime(self._record(found.key))
        return found

    def _candidates(self, key: EngineKey) -> Iterator[CachedEngine]:
        """The engines that serve a key, the preferred first."""
        exact = self._read(self._record(key))
        if exact is not None and exact.key == key:
            yield exact
        others = [engine for engine in self.entries() if engine.key != key and engine.key.serves(key)]
        yield from sorted(others, key=lambda engine: len(engine.key.targets))

    def put(
        self, key: EngineKey, engine: bytes, build_config: Mapping[str, Any], figures: Mapping[str, int] | None = None
    ) -> CachedEngine:
        """Store an engine without a certificate, and evict the least recently used engines beyond the limit.

        Args:
            key: of the engine.
            engine: serialized.
            build_config: what it was built by, as `BuildConfig.to_json`.
            figures: what TensorRT said of it; see `BuiltEngine`.

        Raises:
            OutputError: the directory cannot be written.
        """
        path = self._engine(key)
        digest = hashlib.sha256(engine).hexdigest()
        made = CachedEngine(key, path, len(engine), digest, {}, dict(build_config), dict(figures or {}))
        record = {name: value for name, value in asdict(made).items() if name != "path"}
        try:
            write_atomic(path, engine)
            write_atomic(self._record(key), json.dumps(record, indent=2).encode())
        except OutputError as error:
            raise OutputError(
                error.message,
                "Free some space (`tokenflow cache clear`), or name another directory for engines in $TOKENFLOW_CACHE or with "
                "--cache.",
            ) from error
        self._evict()
        return made

    def certify(self, key: EngineKey, architecture: str, certificate: Mapping[str, Any]) -> None:
        """Store an engine's certificate (`Certificate.to_json`) in its record. Does nothing if the record is gone.

        Args:
            key: of the engine, with all its targets.
            architecture: of the GPU that it was compared on.
            certificate: the result.

        Raises:
            OutputError: the directory cannot be written.
        """
        record, found = _read_record(self._record(key)), self._read(self._record(key))
        if record is None or found is None:
            return
        certificates = {**found.certificates, architecture: dict(certificate)}
        write_atomic(self._record(key), json.dumps(record | {"certificates": certificates}, indent=2).encode())

    def make_directory(self) -> None:
        """Make the directory, and mark it as an engine cache unless it holds files of others.

        Raises:
            OutputError: it cannot be made or written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / _MARK).exists() and self._foreign() is None:
                write_atomic(self.directory / _MARK, _MARK_TEXT)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.directory} cannot be written: {getattr(error, 'strerror', None) or error}.",
                "Name another directory for engines in $TOKENFLOW_CACHE or with --cache.",
            ) from error

    @contextmanager
    def building(self, key: EngineKey) -> Iterator[None]:
        """Hold a key's lock, so that one process builds its engine at a time. The system releases the lock of a dead process.

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
        self.make_directory()
        try:
            lock.acquire()
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.directory} cannot be written: {getattr(error, 'strerror', None) or error}.",
                "Name another directory for engines in $TOKENFLOW_CACHE or with --cache.",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def entries(self) -> list[CachedEngine]:
        """All engines with a readable record, most recently used first. The engines themselves are not read.

        Raises:
            OutputError: the directory cannot be read.
        """
        try:
            records = sorted(self.directory.glob("*.json"), key=_last_used, reverse=True)
        except ValueError:  # no directory can have such a name
            return []
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
                return []
            raise OutputError(
                f"{self.directory} cannot be read: {getattr(error, 'strerror', None) or error}.",
                "Check its permissions, or name another directory in $TOKENFLOW_CACHE or with --cache.",
            ) from error
        return [found for path in records if (found := self._read(path)) is not None]

    def clear(self) -> int:
        """Remove all engines, records, kernels, locks and temporary files. Other files stay.

        Returns:
            The number of bytes freed.

        Raises:
            ArgumentError: the directory is no engine cache: it has no mark of one, and holds other files.
            OutputError: the directory cannot be read, or a file cannot be removed.
        """
        freed = 0
        try:
            foreign = None if self._is_marked() else self._foreign()
            if foreign is not None:
                raise ArgumentError(
                    f"{self.directory} is no engine cache: it holds {foreign}, and no {_MARK} of tokenflow-sdk.",
                    "Give --cache the directory that engines were built into, or remove its *.engine files yourself.",
                )
            for path in self._written():
                with suppress(FileNotFoundError):
                    size = path.lstat().st_size
                    path.unlink()
                    freed += size
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            if isinstance(error, TokenFlowError):
                raise
            raise OutputError(
                f"{self.directory} cannot be cleared: {getattr(error, 'strerror', None) or error}.",
                "Check its permissions, or name another --cache.",
            ) from error
        return freed

    def _is_marked(self) -> bool:
        try:
            return read_regular(self.directory / _MARK, len(_MARK_TEXT)) == _MARK_TEXT
        except OSError:
            return False

    def _foreign(self) -> str | None:
        """The name of something in the directory that no cache writes; None: there is nothing else, or no directory."""
        written = {path.name for path in self._written()}
        marks = {_MARK} if self._is_marked() else set()
        return next((path.name for path in self.directory.iterdir() if path.name not in written | marks), None)

    def _written(self) -> list[Path]:
        """The files in the directory that caches wrote."""
        return [path for path in self.directory.iterdir() if _WRITTEN.fullmatch(path.name) and not path.is_dir()]

    def _engine(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.engine"

    def _record(self, key: EngineKey) -> Path:
        return self.directory / f"{key.digest}.json"

    def _read(self, path: Path) -> CachedEngine | None:
        data = _read_record(path)
        if data is None:
            return None
        try:
            key = EngineKey(**{field.name: str(data["key"][field.name]) for field in fields(EngineKey)})
            certificates = {str(name): dict(stored) for name, stored in dict(data.get("certificates", {})).items()}
            contents = (dict(data[name]) for name in ("build_config", "figures"))
            engine = path.with_suffix(".engine")
            found = CachedEngine(key, engine, int(data["size"]), str(data["sha256"]), certificates, *contents)
        except (ValueError, LookupError, TypeError, OverflowError):
            return None
        # A record under another name would let `_evict` remove another's engine.
        return found if key.digest == path.stem and found.size >= 0 else None

    def _remove(self, digest: str) -> None:
        # The record first: without it the engine is not used.
        others = (path for path in self.directory.glob(f"{digest}.*") if path.suffix in (".engine", ".kernels"))
        for path in (self.directory / f"{digest}.json", *others):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _evict(self) -> None:
        total = 0
        for engine in self.entries():
            total += engine.size
            if total > self.limit and _last_used(self._record(engine.key)) < self._since:
                self._remove(engine.key.digest)


def _last_used(record: Path) -> float:
    """When an engine was last used, as a POSIX time; 0 if another process has removed its record."""
    try:
        return record.stat().st_mtime
    except OSError:
        return 0


def _has_size(engine: CachedEngine) -> bool:
    """Whether the engine is a file of the size in its record."""
    status = file_status(engine.path)
    return status is not None and stat.S_ISREG(status.st_mode) and status.st_size == engine.size


def _is_intact(engine: CachedEngine) -> bool:
    """Whether the engine's size and SHA-256 are those in its record."""
    try:
        return _has_size(engine) and file_sha256(engine.path) == engine.sha256
    except OSError:
        return False


def _read_record(path: Path) -> dict[str, Any] | None:
    """An engine's record as parsed JSON; None if it is gone or damaged."""
    try:
        data = json.loads(read_regular(path, _MOST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
