"""Writes a bundle into a directory beside its target and renames it at the end, so that it appears whole or not at all."""

from __future__ import annotations

import errno
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import onnxruntime
import torch
from filelock import FileLock, Timeout

from tokenflow_sdk import __version__
from tokenflow_sdk.bundle.bundle import MANIFEST
from tokenflow_sdk.errors import OutputError

__all__ = ["atomic_directory", "checked_target", "versions"]

_OUTPUT_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


@contextmanager
def atomic_directory(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """Give a directory to write into. It becomes `out` when the block succeeds, and is deleted when the block fails.

    What an earlier export to `out` left beside it because it was killed is deleted first.

    Args:
        out: must not exist, or be a bundle if `force` is set.
        force: replace `out`.
        needed: about how many bytes will be written.

    Raises:
        OutputError: `out` exists, is being exported to or cannot be written, or the disk has not enough space.
    """
    try:
        out = checked_target(out, force)
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed * 1.1:
            raise OutputError(
                f"{out.parent} has {free / 1e9:.1f} GB free; this bundle needs about {needed * 1.1 / 1e9:.1f} GB.",
                "Free some space, or choose an --out on another disk.",
            )
        with _locked(out):
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
            f"Writing {out} failed: {error.strerror}.", "Free some space, or choose an --out elsewhere."
        ) from error


def checked_target(out: Path, force: bool) -> Path:
    """Resolve the directory that is to be written, and refuse one that must not be.

    Raises:
        OutputError: it is a symbolic link, exists without `force`, or is something else than a bundle.
    """
    if out.is_symlink():
        raise OutputError(f"{out} is a symbolic link.", f"Give the path that it stands for, {out.resolve()}, or delete it.")
    out = out.resolve()
    if out.exists() and not force:
        raise OutputError(f"{out} exists already.", "Choose another --out, or give --force to replace it.")
    if out.exists() and not (out / MANIFEST).is_file():
        raise OutputError(f"{out} is not a bundle, so it is not replaced.", "Choose another --out, or delete it yourself.")
    return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Let no other export to `out` begin, and delete what killed ones left. The system releases the lock of a dead process."""
    path = out.with_name(f".{out.name}.lock")
    try:
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"Another process exports to {out}.", "Wait until it is done, or choose another --out.") from None
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


def versions() -> dict[str, str]:
    """Versions of the exporter and of the packages it used, for the provenance of a bundle."""
    return {
        "exporter": f"tokenflow-sdk {__version__}",
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
