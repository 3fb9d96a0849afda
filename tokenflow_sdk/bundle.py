"""The bundle: a directory of ONNX graphs and one `bundle.json`, the only contract between export and runtime.

A bundle is data. Nothing in it is executed or unpickled; file names are plain names inside the directory; every file is
checked against the SHA-256 in `bundle.json` before an engine sees it. docs/bundle-format.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow_sdk.config import FileEntry, GraphEntry, TokenizerConfig
from tokenflow_sdk.errors import (
    BundleNotFoundError,
    BundleVersionError,
    CorruptBundleError,
    MissingPackageError,
)

__all__ = ["MANIFEST", "SCHEMA_VERSION", "Bundle", "file_sha256", "find_bundle"]

MANIFEST = "bundle.json"
SCHEMA_VERSION = 1
_MAX_MANIFEST_BYTES = 16 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_AGAIN = "Export the bundle again with `python -m export`, or fetch it again."


def file_sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A parsed `bundle.json` and where it lies.

    `parity` holds the figures of the export's self-check, `provenance` where the weights came from; both are for people.
    """

    path: Path
    kind: str
    config: TokenizerConfig
    graphs: Mapping[str, GraphEntry]
    reference: FileEntry
    parity: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check `bundle.json`; that every file is there and has its size. Hashes are checked by `verify`.

        Raises:
            BundleNotFoundError: no such directory, or no bundle.json in it.
            BundleVersionError: written for a newer SDK.
            CorruptBundleError: bundle.json is damaged, or a file is missing or has another size.
        """
        path = Path(path)
        data = _read_manifest(path)
        for key in ("kind", "config", "graphs", "reference", "parity", "provenance"):
            if key not in data:
                raise CorruptBundleError(f"{path / MANIFEST} has no {key!r}.", _AGAIN)
        if data["kind"] != "tokenizer":
            raise CorruptBundleError(
                f"{path} holds a {data['kind']!r} bundle, not a tokenizer.", "Give the path of a tokenizer bundle."
            )
        for key in ("graphs", "parity", "provenance"):
            if not isinstance(data[key], dict):
                raise CorruptBundleError(f"{path / MANIFEST}: {key} is not an object.", _AGAIN)
        bundle = cls(
            path=path,
            kind=data["kind"],
            config=TokenizerConfig.from_json(data["config"]),
            graphs={name: GraphEntry.from_json(entry, f"graphs.{name}") for name, entry in data["graphs"].items()},
            reference=FileEntry.from_json(data["reference"], "reference"),
            parity=data["parity"],
            provenance=data["provenance"],
        )
        for entry in bundle.files():
            bundle._check_size(entry)
        return bundle

    def files(self) -> list[FileEntry]:
        """Every file of the bundle but bundle.json."""
        return [file for graph in self.graphs.values() for file in graph.files] + [self.reference]

    def graph(self, name: str) -> GraphEntry:
        """Raises:
        CorruptBundleError: the bundle has no such graph.
        """
        if name not in self.graphs:
            have = ", ".join(self.graphs) or "none"
            raise CorruptBundleError(f"{self.path} has no {name!r} graph (it has: {have}).", _AGAIN)
        return self.graphs[name]

    def verify(self, *entries: FileEntry) -> None:
        """Compare files with their SHA-256; without arguments, all of them.

        Raises:
            CorruptBundleError: naming the first file that differs.
        """
        entries = entries or tuple(self.files())
        for entry in entries:
            self._check_size(entry)
        # hashlib lets go of the interpreter lock: two files at a time take half as long.
        with ThreadPoolExecutor(2) as pool:
            digests = list(pool.map(file_sha256, [self.path / entry.name for entry in entries]))
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                raise CorruptBundleError(
                    f"{self.path / entry.name} is damaged: its SHA-256 is not the one in {MANIFEST}.", _AGAIN
                )

    def _check_size(self, entry: FileEntry) -> None:
        file = self.path / entry.name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise CorruptBundleError(f"{file} is missing from the bundle ({error.strerror}).", _AGAIN) from None
        if size != entry.size:
            raise CorruptBundleError(f"{file} is damaged: {size:,} bytes instead of {entry.size:,}.", _AGAIN)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = path / MANIFEST
    try:
        if manifest.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CorruptBundleError(f"{manifest} is larger than any manifest.", _AGAIN)
        data = json.loads(manifest.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BundleNotFoundError(
            f"There is no bundle at {path} (no {MANIFEST} there).",
            "Give the directory that `python -m export tokenizer --out DIR` wrote, or a hub id like org/name.",
        ) from None
    except OSError as error:
        raise BundleNotFoundError(f"{manifest} cannot be read: {error.strerror}.", "Check its permissions.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptBundleError(f"{manifest} is not valid JSON: {error}.", _AGAIN) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise CorruptBundleError(f"{manifest} gives no schema_version.", _AGAIN)
    if version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"{path} has bundle schema {version}; this SDK reads up to {SCHEMA_VERSION}.",
            "Upgrade with `pip install --upgrade tokenflow-sdk`.",
        )
    return dict(data)


def find_bundle(name: str | os.PathLike[str]) -> Path:
    """The directory of a bundle given by path or by Hugging Face hub id (`org/name`, fetched once and cached).

    Raises:
        BundleNotFoundError: neither a directory here nor a repository on the hub.
        MissingPackageError: a hub id without huggingface_hub installed.
    """
    path = Path(name).expanduser()
    if path.exists() or not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        return path
    return _from_hub(name)


def _from_hub(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingPackageError(
            f"{repo_id!r} is no directory here, and fetching it from the hub needs huggingface_hub.",
            "Run `pip install 'tokenflow-sdk[hub]'`, or give the path of a bundle.",
        ) from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=[MANIFEST, "*.onnx", "*.data", "*.npz"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BundleNotFoundError(
            f"{repo_id!r} is no directory here, and the hub did not deliver it: {str(error).splitlines()[0]}",
            "Check the name and the network, or give the path of a bundle.",
        ) from error
