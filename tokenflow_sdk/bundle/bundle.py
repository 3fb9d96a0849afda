"""`Bundle`: a directory of ONNX graphs and a `bundle.json`, the format in which the exporter hands models to the runtime.

A bundle is data only: nothing in it is unpickled or run as Python. File names have no directory part, and every file is checked
against its SHA-256 in `bundle.json` before a backend loads it. docs/reference/bundle-format.md describes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.arguments import file_path, instance, shown
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry
from tokenflow_sdk.errors import (
    ArgumentError,
    BundleKindError,
    BundleNotFoundError,
    BundleVersionError,
    CorruptBundleError,
    MissingPackageError,
)
from tokenflow_sdk.files import file_status, packaged_data, write_atomic

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
"""Name of the trained model that is shipped with the SDK."""
SCHEMA_VERSION = 1
_MAX_MANIFEST_BYTES = 16 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_AGAIN = "Export the bundle again with `tokenflow export`, or fetch it again."


class _Config(Protocol):
    """A frozen dataclass with the model's sizes; `kind` is the kind of bundle it describes."""

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def from_json(cls, data: object) -> Any: ...


C = TypeVar("C", bound=_Config)
R = TypeVar("R")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle(Generic[C]):
    """A bundle: its directory and the parsed content of its `bundle.json`.

    Args:
        path: the directory.
        config: sizes of the model.
        graphs: the ONNX graphs by name, e.g. `encode`.
        assets: the other files by purpose, e.g. `reference`.
        parity: figures of the check against PyTorch at export; informative.
        provenance: the checkpoint and the package versions it was exported with; informative.

    Example:
        >>> bundle = Bundle.open(find_bundle("tiny", "tokenizer"), TokenizerConfig)
        >>> sorted(bundle.graphs)
        ['decode', 'encode', 'features', 'semantic']
        >>> bundle.verify()
    """

    path: Path
    config: C
    graphs: Mapping[str, GraphEntry] = field(hash=False)
    assets: Mapping[str, FileEntry] = field(hash=False)
    parity: Mapping[str, Any] = field(hash=False)
    provenance: Mapping[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        hint = "Open bundles with Bundle.open."
        object.__setattr__(self, "path", Path(file_path("path", self.path)))
        instance("config", self.config, CONFIGS, hint)
        for name, kind in (("graphs", GraphEntry), ("assets", FileEntry), ("parity", object), ("provenance", object)):
            for key, value in instance(name, getattr(self, name), Mapping, hint).items():
                instance(f"a key of {name}", key, str, hint)
                instance(f"{name}[{key!r}]", value, kind, hint)

    @property
    def in_half(self) -> bool:
        """Whether the model was exported in float16, so that there are no float32 results to compare with."""
        return any(spec.dtype == "float16" for entry in self.graphs.values() for spec in entry.inputs)

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: type[C]) -> Bundle[C]:
        """Read and validate `bundle.json`, and check that every file exists and has its size; `verify` checks the hashes.

        Args:
            path: the bundle's directory.
            config: the config class of the wanted kind, e.g. `TokenizerConfig`.

        Raises:
            BundleNotFoundError: the directory or its bundle.json does not exist or cannot be read.
            BundleVersionError: the bundle was written for a newer SDK.
            CorruptBundleError: bundle.json is damaged, or a file is missing or has another size.
            BundleKindError: the bundle is of another kind.
        """
        path = Path(file_path("path", path))
        kind: object = config
        if not (isinstance(kind, type) and issubclass(kind, CONFIGS)):
            raise ArgumentError("config is no class of a bundle's config.", "Give TokenizerConfig, say.")
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
        """Write `bundle.json`. The exporter does this last, because a directory without it is not a bundle.

        Raises:
            OutputError: the file cannot be written.
        """
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
        """Every file of the bundle except bundle.json."""
        return [file for graph in self.graphs.values() for file in graph.files] + list(self.assets.values())

    def graph(self, name: str) -> GraphEntry:
        """The entry of a graph in bundle.json.

        Raises:
            CorruptBundleError: the bundle has no such graph.
        """
        if not isinstance(name, str) or name not in self.graphs:
            have = ", ".join(self.graphs) or "none"
            raise CorruptBundleError(f"{self.path} has no {shown(name)} graph (it has: {have}).", _AGAIN)
        return self.graphs[name]

    def graph_path(self, name: str) -> Path:
        """Path of a graph's `.onnx` file. Raises as `graph`."""
        return self.path / self.graph(name).files[0].name

    def asset_path(self, name: str) -> Path:
        """Path of an asset's file. Raises as `asset`."""
        return self.path / self.asset(name).name

    def asset(self, name: str) -> FileEntry:
        """The entry of an asset in bundle.json.

        Raises:
            CorruptBundleError: the bundle has no such asset.
        """
        if not isinstance(name, str) or name not in self.assets:
            raise CorruptBundleError(f"{self.path} has no {shown(name)} file.", _AGAIN)
        return self.assets[name]

    def verify(self, *entries: FileEntry) -> None:
        """Compare files with their size and SHA-256 in bundle.json.

        Args:
            entries: the files to check; all files of the bundle if none are given.

        Raises:
            CorruptBundleError: a file differs or is missing. The message names the first one.
        """
        entries = entries or tuple(self.files())
        for entry in entries:
            self._check_size(instance("an entry", entry, FileEntry, "Give entries of this bundle, as bundle.asset(name)."))
        # hashlib releases the GIL, so that two files at a time take half as long.
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
        content = manifest.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleNotFoundError(
            f"There is no bundle at {path} (no {MANIFEST} there).",
            "Give the directory that `tokenflow export tokenizer --out DIR` wrote, or a hub id like org/name.",
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BundleNotFoundError(f"{manifest} cannot be read: {why}.", "Check its name and permissions.") from None
    try:
        data = json.loads(content)
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
    return dict(data)


def load_reference(bundle: Bundle[Any], kind: type[R]) -> R:
    """Load a bundle's `reference.npz`: inputs, and the outputs that engines must reproduce.

    Args:
        bundle: the bundle.
        kind: a dataclass with one field for each array of the file.

    Raises:
        CorruptBundleError: the bundle has no reference, or it is damaged.
    """
    path = bundle.asset_path("reference")
    bundle.verify(bundle.asset("reference"))
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return kind(**{key: arrays[key] for key in arrays.files})
    except (ValueError, TypeError, OSError) as error:
        raise CorruptBundleError(f"{path} is no reference file: {error}.", "Export the bundle again.") from error


def load_codebook(bundle: Bundle[GeneratorConfig]) -> NDArray[np.float32]:
    """Load a generator's codebook, float32 [K, C]; the semantic and the pixel half of each row have unit length.

    Raises:
        CorruptBundleError: the bundle has no codebook, or the file is not a float32 array with K rows.
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
    """The kind that a bundle's `bundle.json` names: `tokenizer`, `generator` or `understander`. Raises as `Bundle.open`."""
    kind = _read_manifest(path).get("kind")
    if not isinstance(kind, str):
        raise CorruptBundleError(f"{path / MANIFEST} has no 'kind'.", _AGAIN)
    return kind


def open_bundle(path: Path) -> Bundle[Any]:
    """Open a bundle of any kind. Raises as `Bundle.open`."""
    kind = bundle_kind(path)
    return Bundle.open(path, next((config for config in CONFIGS if config.kind == kind), TokenizerConfig))


def find_bundle(name: str | os.PathLike[str], kind: str | None = None) -> Path:
    """Resolve the name of a bundle to its directory.

    Args:
        name: a path; `tiny`, the trained model shipped with the SDK; or a Hugging Face hub id (`org/name`), which is downloaded
            once and cached.
        kind: `tokenizer`, `generator` or `understander`. If `name` is not a bundle but has a bundle in a subdirectory of this
            name, that one is meant.

    Returns:
        The directory. A path that does not exist is returned unchanged; `Bundle.open` reports it.

    Raises:
        BundleNotFoundError: a hub id that is not on the hub or cannot be downloaded.
        MissingPackageError: a hub id, and huggingface_hub is not installed.
    """
    path = _locate(name)
    inside = path / (kind or "")
    return inside if file_status(path / MANIFEST) is None and file_status(inside / MANIFEST) is not None else path


def bundles_in(name: str | os.PathLike[str]) -> list[Path]:
    """Directories of all bundles that a name resolves to, one or several kinds.

    If there is none, the list holds the path that `find_bundle` returns, so that opening it reports the error.

    Raises:
        As `find_bundle`.
    """
    found = [find_bundle(name, kind) for kind in KINDS]
    return [path for path in dict.fromkeys(found) if file_status(path / MANIFEST) is not None] or found[:1]


def _locate(name: str | os.PathLike[str]) -> Path:
    file_path("name", name)
    if name == TINY:
        return packaged_data(f"models/{TINY}")
    if not os.fspath(name):
        raise BundleNotFoundError("An empty name is that of no bundle.", "Give a directory, or a hub id like org/name.")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise BundleNotFoundError(f"{name} cannot be found: {error}", "Write the path without ~.") from error
    is_hub_id = isinstance(name, str) and _HUB_ID.fullmatch(name) is not None
    return _from_hub(str(name)) if is_hub_id and not os.path.lexists(path.parent) else path


def _from_hub(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f"{repo_id!r} is no directory here, and fetching it from the hub needs huggingface_hub.",
            "Run `pip install 'tokenflow-sdk[hub]'`, or give the path of a bundle.",
        ) from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.onnx", "*.data", "*.npz", "*.npy", "*.json"]))
    except Exception as error:  # of the hub, its HTTP client, the file system, and ValueError for an invalid name
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleNotFoundError(
            f"{repo_id!r} is no directory here, and the hub did not deliver it: {why}",
            "Check the name and the network, or give the path of a bundle.",
        ) from error
