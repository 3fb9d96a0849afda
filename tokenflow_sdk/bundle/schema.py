"""Validated dataclasses for the files, tensors and graphs that `bundle.json` lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from tokenflow_sdk.errors import CorruptBundleError

__all__ = ["MANIFEST", "FileEntry", "GraphEntry", "TensorSpec", "checked_fields", "require"]

MANIFEST = "bundle.json"
_REBUILD = "Export the bundle again with `tokenflow export`, or fetch it again."
DType = Literal["uint8", "int32", "int64", "float16", "float32"]


def checked_fields(cls: type, data: object, where: str) -> dict[str, Any]:
    """Check that a JSON object has exactly the fields of a dataclass, and return it as a dict.

    Args:
        cls: the dataclass.
        data: parsed JSON.
        where: its place in bundle.json, for error messages.

    Raises:
        CorruptBundleError: not an object, or a field is missing or unknown.
    """
    if not isinstance(data, Mapping):
        raise CorruptBundleError(f"bundle.json: {where} is not an object.", _REBUILD)
    names = {field.name for field in fields(cls)}
    wrong = [f"unknown {key!r}" for key in data if key not in names] + [f"no {key!r}" for key in names - set(data)]
    if wrong:
        raise CorruptBundleError(f"bundle.json: {where} has {', '.join(wrong)}.", _REBUILD)
    return dict(data)


def require(condition: bool, where: str, what: str) -> None:
    """Raise CorruptBundleError "bundle.json: `where` `what`." unless the condition holds."""
    if not condition:
        raise CorruptBundleError(f"bundle.json: {where} {what}.", _REBUILD)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Args:
        name: its name in the graph.
        dtype: its NumPy type, e.g. `float32`.
        shape: an int is a fixed size, a string names a dynamic dimension, e.g. `batch`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> TensorSpec:
        """Read an entry from parsed JSON; `where` is its place in bundle.json. Raises CorruptBundleError if it is invalid."""
        values = checked_fields(cls, data, where)
        require(isinstance(values["name"], str), where, "has no name")
        require(values["dtype"] in get_args(DType), where, f"has the unknown dtype {values['dtype']!r}")
        shape = values["shape"]
        require(isinstance(shape, list) and all(type(d) in (int, str) for d in shape), where, "has no usable shape")
        return cls(values["name"], values["dtype"], tuple(shape))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle.

    Args:
        name: its name in the bundle's directory, without any directory part.
        size: its size in bytes.
        sha256: its SHA-256 in hex.
    """

    name: str
    size: int
    sha256: str

    @classmethod
    def from_json(cls, data: object, where: str) -> FileEntry:
        """Read an entry from parsed JSON; `where` is its place in bundle.json. Raises CorruptBundleError if it is invalid."""
        values = checked_fields(cls, data, where)
        name, size, digest = values["name"], values["size"], values["sha256"]
        # What is not printable includes lone surrogates, which no file name can have.
        plain = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:")
        require(plain, where, f"names the file {name!r}, which is not a plain file name")
        require(type(size) is int and size >= 0, where, f"gives the size {size!r}")
        require(isinstance(digest, str) and len(digest) == 64, where, "gives no SHA-256")
        return cls(name, size, digest)


@dataclass(frozen=True)
class GraphEntry:
    """An ONNX graph.

    Args:
        files: the `.onnx` file, then its external data.
        inputs, outputs: its tensors, in order.
    """

    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> GraphEntry:
        """Read an entry from parsed JSON; `where` is its place in bundle.json. Raises CorruptBundleError if it is invalid."""
        values = checked_fields(cls, data, where)
        for key, value in values.items():
            require(isinstance(value, list) and len(value) > 0, where, f"lists no {key}")
        entry = cls(
            tuple(FileEntry.from_json(item, f"{where}.files") for item in values["files"]),
            tuple(TensorSpec.from_json(item, f"{where}.inputs") for item in values["inputs"]),
            tuple(TensorSpec.from_json(item, f"{where}.outputs") for item in values["outputs"]),
        )
        # By other endings backends take a file for another format.
        first = entry.files[0].name
        require(first.endswith(".onnx"), where, f"has the graph {first!r}, which is no .onnx file")
        return entry
