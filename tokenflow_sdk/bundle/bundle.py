"""The bundle: a directory of ONNX graphs and one `bundle.json`, the only contract between export and runtime.

A bundle is data. Nothing in it is executed or unpickled; file names are plain names inside the directory; every file is
checked against the SHA-256 in `bundle.json` before an engine sees it. docs/reference/bundle-format.md describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry
from tokenflow_sdk.errors import (
    BundleKindError,
    BundleNotFoundError,
    BundleVersionError,
    CorruptBundleError,
    MissingPackageError,
)
from tokenflow_sdk.files import packaged_data, write_atomic

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "TINY",
    "Bundle",
    "bundle_kind",
    "bundles_in",
    "file_sha256",
    "find_bundle",
    "load_codebook",
    "load_reference",
    "open_bundle",
]

MANIFEST = "bundle.json"
CONFIGS: tuple[type[TokenizerConfig] | type[GeneratorConfig] | type[UnderstanderConfig], ...] = (
    TokenizerConfig,
    GeneratorConfig,
    UnderstanderConfig,
)
KINDS = tuple(config.kind for config in CONFIGS)
TINY = "tiny"
"""Name of the trained model that comes with the SDK."""
SCHEMA_VERSION = 1
_MAX_MANIFEST_BYTES = 16 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_AGAIN = "Export the bundle again with `tokenflow export`, or fetch it again."


class _Config(Protocol):
    """A frozen dataclass that knows what kind of bundle it describes."""

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def from_json(cls, data: object) -> Any: ...


C = TypeVar("C", bound=_Config)
R = TypeVar("R")


def file_sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle(Generic[C]):
    """A parsed `bundle.json` and where it lies.

    `graphs` are the ONNX graphs by name, `assets` the other files by what they are for. `parity` holds the figures of the
    export's self-check, `provenance` where the weights came from; both are for people.
    """

    path: Path
    config: C
    graphs: Mapping[str, GraphEntry]
    assets: Mapping[str, FileEntry]
    parity: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def in_half(self) -> bool:
        """Whether it was exported in float16, so that nothing of it is known in float32."""
        return any(spec.dtype == "float16" for entry in self.graphs.values() for spec in entry.inputs)

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: type[C]) -> Bundle[C]:
        """Read and check `bundle.json`; that every file is there and has its size. Hashes are checked by `verify`.

        Args:
            path: the bundle's directory.
            config: the kind of bundle wanted, e.g. `TokenizerConfig`.

        Raises:
            BundleNotFoundError: no such directory, or no bundle.json in it.
            BundleVersionError: written for a newer SDK.
            CorruptBundleError: bundle.json is damaged, or a file is missing or has another size.
            BundleKindError: it is a bundle of another kind.
        """
        path = Path(path)
        data = _read_manifest(path)
        for key in ("kind", "config", "graphs", "assets", "parity", "provenance"):
            if key not in data:
                raise CorruptBundleError(f"{path / MANIFEST} has no {key!r}.", _AGAIN)
            if key != "kind" and not isinstance(data[key], dict):
                raise CorruptBundleError(f"{path / MANIFEST}: {key} is not an object.", _AGAIN)
        if data["kind"] != config.kind:
            wanted = f"{'an' if config.kind[0] in 'aeiou' else 'a'} {config.kind}"
            raise BundleKindError(
                f"{path} holds a {data['kind']!r} bundle, not {wanted}.", f"Give the path of {wanted} bundle."
            )
        bundle = cls(
            path=path,
            config=config.from_json(data["config"]),
            graphs={name: GraphEntry.from_json(entry, f"graphs.{name}") for name, entry in data["graphs"].items()},
            assets={name: FileEntry.from_json(entry, f"assets.{name}") for name, entry in data["assets"].items()},
            parity=data["parity"],
            provenance=data["provenance"],
        )
        for entry in bundle.files():
            bundle._check_size(entry)
        return bundle

    def write_manifest(self) -> None:
        """Write `bundle.json`, which makes the directory a bundle; the exporter's last step."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.config.kind,
            "config": asdict(self.config),
            "graphs": {name: asdict(entry) for name, entry in self.graphs.items()},
            "assets": {name: asdict(entry) for name, entry in self.assets.items()},
            "parity": dict(self.parity),
            "provenance": dict(self.provenance),
        }
        write_atomic(self.path / MANIFEST, json.dumps(data, indent=2).encode())

    def files(self) -> list[FileEntry]:
        """Every file of the bundle but bundle.json."""
        return [file for graph in self.graphs.values() for file in graph.files] + list(self.assets.values())

    def graph(self, name: str) -> GraphEntry:
        """Raises:
        CorruptBundleError: the bundle has no such graph.
        """
        if name not in self.graphs:
            have = ", ".join(self.graphs) or "none"
            raise CorruptBundleError(f"{self.path} has no {name!r} graph (it has: {have}).", _AGAIN)
        return self.graphs[name]

    def graph_path(self, name: str) -> Path:
        """Where a graph's `.onnx` file is. Errors as in `graph`."""
        return self.path / self.graph(name).files[0].name

    def asset_path(self, name: str) -> Path:
        """Where an asset is. Errors as in `asset`."""
        return self.path / self.asset(name).name

    def asset(self, name: str) -> FileEntry:
        """Raises:
        CorruptBundleError: the bundle has no such file.
        """
        if name not in self.assets:
            raise CorruptBundleError(f"{self.path} has no {name!r} file.", _AGAIN)
        return self.assets[name]

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
            "Give the directory that `tokenflow export tokenizer --out DIR` wrote, or a hub id like org/name.",
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


def load_reference(bundle: Bundle[Any], kind: type[R]) -> R:
    """A bundle's `reference.npz` as the dataclass `kind`, whose fields are its arrays.

    Raises:
        CorruptBundleError: the bundle has none, or it is damaged.
    """
    path = bundle.asset_path("reference")
    bundle.verify(bundle.asset("reference"))
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return kind(**{key: arrays[key] for key in arrays.files})
    except (ValueError, TypeError, OSError) as error:
        raise CorruptBundleError(f"{path} is no reference file: {error}.", "Export the bundle again.") from error


def load_codebook(bundle: Bundle[GeneratorConfig]) -> NDArray[np.float32]:
    """A generator's codebook, float32 [K, 40].

    Raises:
        CorruptBundleError: the file holds something else.
    """
    path = bundle.asset_path("codebook")
    try:
        codebook: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorruptBundleError(f"{path} is no array: {error}.", _AGAIN) from error
    if codebook.ndim != 2 or codebook.dtype != np.float32 or len(codebook) != bundle.config.codebook_size:
        raise CorruptBundleError(f"{path} is no codebook of {bundle.config.codebook_size} entries.", _AGAIN)
    return codebook


def bundle_kind(path: Path) -> str:
    """What kind of bundle lies there: one of `KINDS`. Errors as in `Bundle.open`."""
    kind = _read_manifest(path).get("kind")
    if not isinstance(kind, str):
        raise CorruptBundleError(f"{path / MANIFEST} has no 'kind'.", _AGAIN)
    return kind


def open_bundle(path: Path) -> Bundle[Any]:
    """The bundle there, of whatever kind. Errors as in `Bundle.open`."""
    kind = bundle_kind(path)
    return Bundle.open(path, next((config for config in CONFIGS if config.kind == kind), TokenizerConfig))


def find_bundle(name: str | os.PathLike[str], kind: str | None = None) -> Path:
    """The directory of a bundle, or the bundle of one kind in a directory that holds several.

    Args:
        name: a path; `tiny`, the trained model that comes with the SDK; or a Hugging Face hub id (`org/name`, fetched once and
            cached).
        kind: one of `KINDS`: where `name` has no bundle itself but one in a subdirectory of this name, that one.

    Raises:
        BundleNotFoundError: neither a directory here nor a repository on the hub.
        MissingPackageError: a hub id without huggingface_hub installed.
    """
    path = _locate(name)
    inside = path / (kind or "")
    return inside if not (path / MANIFEST).exists() and (inside / MANIFEST).is_file() else path


def bundles_in(name: str | os.PathLike[str]) -> list[Path]:
    """Every bundle that `find_bundle` finds under a name; if there is none, what it would give."""
    found = [find_bundle(name, kind) for kind in KINDS]
    return [path for path in dict.fromkeys(found) if (path / MANIFEST).exists()] or found[:1]


def _locate(name: str | os.PathLike[str]) -> Path:
    if name == TINY:
        return packaged_data(f"models/{TINY}")
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
        return Path(snapshot_download(repo_id, allow_patterns=["*.onnx", "*.data", "*.npz", "*.npy", "*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BundleNotFoundError(
            f"{repo_id!r} is no directory here, and the hub did not deliver it: {str(error).splitlines()[0]}",
            "Check the name and the network, or give the path of a bundle.",
        ) from error
