"""Writing results: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tokenflow_sdk.errors import OutputError

__all__ = ["write_atomic"]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it, so that no reader ever sees a part.

    Raises:
        OutputError: the directory is missing or read-only, the disk is full, or `path` is a directory.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}-", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(_default_mode())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.", "Choose another output, or check its directory and the free space."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _default_mode() -> int:
    """What open() would have given a new file; mkstemp gives its owner alone access."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
