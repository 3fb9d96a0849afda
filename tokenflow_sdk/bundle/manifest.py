"""Reads a bundle's `bundle.json`, which may come from a stranger, before anything in it is looked at."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tokenflow_sdk.bundle.missing import not_found
from tokenflow_sdk.bundle.schema import MANIFEST
from tokenflow_sdk.errors import ArgumentError, BundleNotFoundError, BundleVersionError, CorruptBundleError
from tokenflow_sdk.files import read_regular, reason

__all__ = ["MANIFEST", "SCHEMA_VERSION", "read_manifest"]

SCHEMA_VERSION = 1
_MOST_BYTES = 16 * 2**20
_MOST_LEVELS = 32
_AGAIN = "Export the bundle again with `tokenflow export`, or fetch it again."


def read_manifest(path: Path, sha256: str | None = None, kind: str | None = None) -> tuple[dict[str, Any], str]:
    """Read the `bundle.json` of the bundle at `path`.

    Args:
        path: the bundle's directory.
        sha256: SHA-256 that bundle.json must have, in hex; None: any.
        kind: that is looked for, which the error names where there is no bundle; None: any. It is not compared.

    Returns:
        The parsed object, of a schema version that this SDK reads, and the SHA-256 of the file.

    Raises:
        ArgumentError: `sha256` is no SHA-256.
        BundleNotFoundError: there is no such file, or it cannot be read.
        BundleVersionError: it was written for a newer SDK.
        CorruptBundleError: it has another SHA-256, or is no valid manifest.
    """
    wanted = _checked_digest(sha256)
    manifest = path / MANIFEST
    content = _read(path, kind)
    digest = hashlib.sha256(content).hexdigest()
    if wanted not in (None, digest):
        raise CorruptBundleError(
            f"{manifest} has the SHA-256 {digest}, not {wanted} as asked: it is another bundle, or it was changed.",
            "Fetch the bundle that was meant, or give the sha256= that `tokenflow info` prints for a bundle that you trust.",
        )
    try:
        data = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptBundleError(f"{manifest} is not valid JSON: {error}.", _AGAIN) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise CorruptBundleError(f"{manifest} gives no schema_version.", _AGAIN)
    if version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"{path} has bundle schema {version}; this SDK reads up to {SCHEMA_VERSION}.",
            "Upgrade with `pip install --upgrade tokenflow-sdk`.",
        )
    if _is_deep(data):
        raise CorruptBundleError(f"{manifest} nests values more than {_MOST_LEVELS} deep.", _AGAIN)
    return data, digest


def _checked_digest(sha256: object) -> str | None:
    if sha256 is None:
        return None
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ArgumentError(f"sha256={sha256!r} is no SHA-256.", "Give the 64 hex digits that `tokenflow info BUNDLE` prints.")
    return sha256.lower()


def _read(path: Path, kind: str | None) -> bytes:
    manifest = path / MANIFEST
    try:
        return read_regular(manifest, _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise not_found(path, kind) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise CorruptBundleError(f"{manifest} is no manifest: it is {reason(error)}.", _AGAIN) from None
        raise BundleNotFoundError(f"{manifest} cannot be read: {reason(error)}.", "Check its name and permissions.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _is_deep(data: object) -> bool:
    """Whether values are nested so deep that printing them may end in a RecursionError."""
    level = [data]
    for _ in range(_MOST_LEVELS):
        nested = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [value for values in nested for value in values]
    return bool(level)
