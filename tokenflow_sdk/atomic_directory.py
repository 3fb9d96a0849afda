"""Writes a directory beside its target and renames it at the end, so that it appears whole or not at all."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tokenflow_sdk.bundle.manifest import MANIFEST
from tokenflow_sdk.errors import MissingPackageError, OutputError

__all__ = ["BUNDLE", "DirectoryKind", "atomic_directory", "checked_target"]

_OUTPUT_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


class DirectoryKind(NamedTuple):
    """What a directory holds: its name in messages, how one is told from other directories, and the option that names it."""

    name: str
    is_one: Callable[[Path], bool]
    option: str = "--out"


BUNDLE = DirectoryKind("bundle", lambda path: (path / MANIFEST).is_file())


@contextmanager
def atomic_directory(out: Path, force: bool, needed: int, kind: DirectoryKind = BUNDLE) -> Iterator[Path]:
    """Give a directory to write into. It becomes `out` when the block succeeds, and is deleted when the block fails.

    What an earlier process that wrote `out` left beside it because it was killed is deleted first.

    Args:
        out: must not exist, or be of this kind if `force` is set.
        force: replace `out`.
        needed: about how many bytes will be written.
        kind: what is written.

    Raises:
        OutputError: `out` exists, is being written by another process or cannot be written, or the disk has not enough space.
        MissingPackageError: filelock is not installed.
    """
    try:
        out = checked_target(out, force, kind)
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed * 1.1:
            raise OutputError(
                f"{out.parent} has {free / 1e9:.1f} GB free; this {kind.name} needs about {needed * 1.1 / 1e9:.1f} GB.",
                f"Free some space, or choose a directory on another disk for {kind.option}.",
            )
        with _locked(out, kind):
            work = Path(tempfile.mkdtemp(prefix=f".{out.name}.export-", dir=out.parent))
            try:
                staging = work / "new"
                staging.mkdir()
                yield staging
                _move_in(staging, out, work / "old", force)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno not in _OUTPUT_ERRORS:
            raise
        raise OutputError(
            f"Writing {out} failed: {error.strerror}.", f"Free some space, or choose another {kind.option}."
        ) from error


def checked_target(out: Path, force: bool, kind: DirectoryKind = BUNDLE) -> Path:
    """Resolve the directory that is to be written, and refuse one that must not be.

    Raises:
        OutputError: it is a symbolic link, exists without `force`, or is of another kind.
    """
    if out.is_symlink():
        raise OutputError(f"{out} is a symbolic link.", f"Give the path that it stands for, {out.resolve()}, or delete it.")
    out = out.resolve()
    if out.exists() and not force:
        raise OutputError(f"{out} exists already.", f"Choose another {kind.option}, or give --force to replace it.")
    if out.exists() and not kind.is_one(out):
        raise OutputError(
            f"{out} is not a {kind.name}, so it is not replaced.", f"Choose another {kind.option}, or delete it yourself."
        )
    return out


@contextmanager
def _locked(out: Path, kind: DirectoryKind) -> Iterator[None]:
    """Let no other process begin to write `out`, and delete what killed ones left. The lock of a dead process is free."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise MissingPackageError(
            f"Writing a {kind.name} needs filelock, which is not installed.", "Run `pip install 'tokenflow-sdk[build]'`."
        ) from error
    path = out.with_name(f".{out.name}.lock")
    try:
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"Another process writes {out}.", f"Wait until it is done, or choose another {kind.option}."
        ) from None
    except NotImplementedError:  # a file system without locks: what is left there cannot be told from what is in use
        yield
        return
    try:
        _clean(out)
        yield
    finally:
        with suppress(OSError):  # Windows lets go of the file first, and then deletes it itself
            path.unlink()
        lock.release()


def _clean(out: Path) -> None:
    for left in out.parent.iterdir():
        if re.fullmatch(re.escape(f".{out.name}.export-") + "[a-z0-9_]{8}", left.name):
            if (left / "old").is_dir() and not out.exists():  # killed between the two renames of `_move_in`
                (left / "old").rename(out)
            shutil.rmtree(left, ignore_errors=True)


def _move_in(staging: Path, out: Path, old: Path, force: bool) -> None:
    if force and out.exists():
        out.rename(old)
    try:
        staging.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputError(f"{out} was made by another process meanwhile.", "Use that one, or give --force.") from error
        raise
