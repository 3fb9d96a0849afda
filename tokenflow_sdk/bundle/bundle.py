"""`Bundle`: a directory of ONNX graphs and a `bundle.json`, the format in which the exporter hands models to the runtime.

A bundle is data only: nothing in it is unpickled or run as Python. File names have no directory part, and every file is checked
against its SHA-256 in `bundle.json` before a backend loads it. docs/reference/bundle-format.md describes the format.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tokenflow_sdk.arguments import file_path, instance, shown
from tokenflow_sdk.bundle.external_data import check_external_data
from tokenflow_sdk.bundle.hub import HubOptions, fetch, is_hub_id
from tokenflow_sdk.bundle.manifest import MANIFEST, SCHEMA_VERSION, read_manifest
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry
from tokenflow_sdk.bundle.signatures import check_graphs
from tokenflow_sdk.errors import ArgumentError, BundleKindError, BundleNotFoundError, CorruptBundleError
from tokenflow_sdk.files import file_sha256, file_status, packaged_data, reason, write_atomic

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "TINY",
    "Bundle",
    "bundle_kind",
    "bundles_in",
    "find_bundle",
    "open_bundle",
]

CONFIGS: tuple[type[TokenizerConfig] | type[GeneratorConfig] | type[UnderstanderConfig], ...] = (
    TokenizerConfig,
    GeneratorConfig,
    UnderstanderConfig,
)
KINDS = tuple(config.kind for config in CONFIGS)
TINY = "tiny"
"""Name of the trained model that is shipped with the SDK."""
_AGAIN = "Export the bundle again with `tokenflow export`, or fetch it again."


class _Config(Protocol):
    """A frozen dataclass with the model's sizes; `kind` is the kind of bundle it describes."""

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def from_json(cls, data: object) -> Any: ...


C = TypeVar("C", bound=_Config)


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
        sha256: of the bundle.json that was read, which has the hashes of all other files; empty if none was read.

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
    sha256: str = field(default="", compare=False)

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
    def open(cls, path: str | os.PathLike[str], config: type[C], sha256: str | None = None) -> Bundle[C]:
        """Read and validate `bundle.json`, and check that every file exists and has its size; `verify` checks the hashes.

        Args:
            path: the bundle's directory.
            config: the config class of the wanted kind, e.g. `TokenizerConfig`.
            sha256: SHA-256 that bundle.json must have, in hex; None: any.

        Raises:
            ArgumentError: `sha256` is no SHA-256.
            BundleNotFoundError: the directory or its bundle.json does not exist or cannot be read.
            BundleVersionError: the bundle was written for a newer SDK.
            CorruptBundleError: bundle.json is damaged or has another SHA-256; a graph is missing, does not fit the sizes in the
                config, or reads weights from a file that is not listed; a file is missing, or has another size.
            BundleKindError: the bundle is of another kind.
        """
        path = Path(file_path("path", path))
        kind: object = config
        if not (isinstance(kind, type) and issubclass(kind, CONFIGS)):
            raise ArgumentError("config is no class of a bundle's config.", "Give TokenizerConfig, say.")
        data, digest = read_manifest(path, sha256, config.kind)
        for key in ("kind", "config", "graphs", "assets", "parity", "provenance"):
            if key not in data:
                raise CorruptBundleError(f"{path / MANIFEST} has no {key!r}.", _AGAIN)
            if key != "kind" and not isinstance(data[key], dict):
                raise CorruptBundleError(f"{path / MANIFEST}: {key} is not an object.", _AGAIN)
        if data["kind"] != config.kind:
            wanted = f"{'an' if config.kind[0] in 'aeiou' else 'a'} {config.kind}"
            raise BundleKindError(
                f"{path} holds a bundle of kind {data['kind']!r}, not {wanted}.", f"Give the path of {wanted} bundle."
            )
        parsed = config.from_json(data["config"])
        bundle = cls(
            path=path,
            config=parsed,
            graphs={name: GraphEntry.from_json(entry, f"graphs.{name}") for name, entry in data["graphs"].items()},
            assets={name: FileEntry.from_json(entry, f"assets.{name}") for name, entry in data["assets"].items()},
            parity=data["parity"],
            provenance=data["provenance"],
            sha256=digest,
        )
        check_graphs(parsed, bundle.graphs)
        for file in bundle.files():
            bundle._check_size(file)
        for graph in bundle.graphs.values():
            check_external_data(path, graph)
        return bundle

    def portable_name(self, name: str | os.PathLike[str]) -> str | Path:
        """What another process finds this bundle by: the name by which it was found here, or if that is a path, all of it."""
        text = file_path("name", name)
        return text if text == TINY or is_hub_id(name) else self.path.absolute()

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
            digests = list(pool.map(self._digest, entries))
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                raise CorruptBundleError(
                    f"{self.path / entry.name} is damaged: its SHA-256 is not the one in {MANIFEST}.", _AGAIN
                )

    def _digest(self, entry: FileEntry) -> str:
        file = self.path / entry.name
        try:
            return file_sha256(file)
        except (OSError, ValueError) as error:
            raise CorruptBundleError(
                f"{file} cannot be read: {reason(error)}.", "Check its permissions, or fetch it again."
            ) from error

    def _check_size(self, entry: FileEntry) -> None:
        file = self.path / entry.name
        try:
            status = file.stat()
        except (OSError, ValueError) as error:
            raise CorruptBundleError(f"{file} is missing from the bundle ({reason(error)}).", _AGAIN) from None
        if not stat.S_ISREG(status.st_mode):
            raise CorruptBundleError(f"{file} is not a regular file.", _AGAIN)
        if status.st_size != entry.size:
            raise CorruptBundleError(f"{file} is damaged: {status.st_size:,} bytes instead of {entry.size:,}.", _AGAIN)


def bundle_kind(path: Path) -> str:
    """The kind that a bundle's `bundle.json` names: `tokenizer`, `generator` or `understander`. Raises as `Bundle.open`."""
    kind = read_manifest(path)[0].get("kind")
    if not isinstance(kind, str):
        raise CorruptBundleError(f"{path / MANIFEST} has no 'kind'.", _AGAIN)
    return kind


def open_bundle(path: Path, sha256: str | None = None) -> Bundle[Any]:
    """Open a bundle of any kind. Arguments and errors as in `Bundle.open`."""
    kind = bundle_kind(path)
    return Bundle.open(path, next((config for config in CONFIGS if config.kind == kind), TokenizerConfig), sha256)


def find_bundle(name: str | os.PathLike[str], kind: str | None = None, hub: HubOptions | None = None) -> Path:
    """Resolve the name of a bundle to its directory.

    Args:
        name: a path; `tiny`, the trained model shipped with the SDK; or a Hugging Face hub id (`org/name`), which is downloaded
            once and cached. What is written like a path, or may be one in a directory that exists, is never asked of the hub.
        kind: `tokenizer`, `generator` or `understander`. If `name` is not a bundle but has a bundle in a subdirectory of this
            name, that one is meant.
        hub: what is fetched of a hub id, and how.

    Returns:
        The directory. A path that does not exist is returned unchanged; `Bundle.open` reports it.

    Raises:
        ArgumentError: a revision of something that is not on the hub.
        BundleNotFoundError: a hub id that is not on the hub or cannot be downloaded.
        MissingPackageError: a hub id, and huggingface_hub is not installed.
    """
    return _of_kind(_locate(name, hub), kind)


def bundles_in(name: str | os.PathLike[str], hub: HubOptions | None = None) -> list[Path]:
    """Directories of all bundles that a name resolves to, one or several kinds. Arguments as in `find_bundle`.

    If there is none, the list holds the path that `find_bundle` returns, so that opening it reports the error.

    Raises:
        As `find_bundle`.
    """
    path = _locate(name, hub)
    found = [_of_kind(path, kind) for kind in KINDS]
    return [path for path in dict.fromkeys(found) if file_status(path / MANIFEST) is not None] or found[:1]


def _of_kind(path: Path, kind: str | None) -> Path:
    inside = path / (kind or "")
    return inside if file_status(path / MANIFEST) is None and file_status(inside / MANIFEST) is not None else path


def _locate(name: str | os.PathLike[str], hub: HubOptions | None) -> Path:
    path = _as_path(name)
    hub = HubOptions() if hub is None else instance("hub", hub, HubOptions, "Give HubOptions(...).")
    if is_hub_id(name):
        return fetch(str(name), hub)
    if hub.revision is not None:
        raise ArgumentError(
            f"revision={hub.revision!r} is for models on the hub, and {name} is none.",
            "Leave it out; sha256= pins any bundle.",
        )
    return path


def _as_path(name: str | os.PathLike[str]) -> Path:
    file_path("name", name)
    if name == TINY:
        return packaged_data(f"models/{TINY}")
    if not os.fspath(name):
        raise BundleNotFoundError("An empty name is that of no bundle.", "Give a directory, or a hub id like org/name.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise BundleNotFoundError(f"{name} cannot be found: {error}", "Write the path without ~.") from error
