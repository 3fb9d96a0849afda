"""Writes a bundle into a directory beside its target and renames it at the end, so that it appears whole or not at all."""

from __future__ import annotations

import errno
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import onnxruntime
import torch

from tokenflow_sdk import __version__
from tokenflow_sdk.bundle.bundle import MANIFEST
from tokenflow_sdk.errors import OutputError

__all__ = ["atomic_directory", "versions"]


@contextmanager
def atomic_directory(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """Give a directory to write into. It becomes `out` when the block succeeds, and is deleted when the block fails.

    Args:
        out: must not exist, or be a bundle if `force` is set.
        force: replace `out`.
        needed: about how many bytes will be written.

    Raises:
        OutputError: `out` exists or cannot be written, or the disk has not enough space.
    """
    try:
        if out.exists() and not force:
            raise OutputError(f"{out} exists already.", "Choose another --out, or give --force to replace it.")
        if out.exists() and not (out / MANIFEST).is_file():
            raise OutputError(f"{out} is not a bundle, so it is not replaced.", "Choose another --out, or delete it yourself.")
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed * 1.1:
            raise OutputError(
                f"{out.parent} has {free / 1e9:.1f} GB free; this bundle needs about {needed * 1.1 / 1e9:.1f} GB.",
                "Free some space, or choose an --out on another disk.",
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out.parent} cannot be written: {error.strerror}.", "Choose another --out.") from error
    try:
        yield staging
        staging.chmod(0o755)
        _move_in(staging, out, force)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(f"{out} was made by another process meanwhile.", "Use that one, or give --force.") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise OutputError(
                f"Writing {out} failed: {error.strerror}.", "Free some space, or choose an --out on another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_in(staging: Path, out: Path, force: bool) -> None:
    if not (force and out.exists()):
        staging.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    try:
        out.rename(old / out.name)
        try:
            staging.rename(out)
        except BaseException:
            (old / out.name).rename(out)
            raise
    except BaseException:
        with suppress(OSError):  # it is not empty only where the old bundle could not be put back
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of the exporter and of the packages it used, for the provenance of a bundle."""
    return {
        "exporter": f"tokenflow-sdk {__version__}",
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
