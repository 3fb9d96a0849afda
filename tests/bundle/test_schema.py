from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry, TensorSpec, checked_fields, require
from tokenflow_sdk.errors import CorruptBundleError

FILE = {"name": "encode.onnx", "size": 5, "sha256": "ab" * 32}
TENSOR = {"name": "images", "dtype": "uint8", "shape": ["batch", 8, 8, 3]}
GRAPH = {"files": [FILE, FILE | {"name": "encode.data"}], "inputs": [TENSOR], "outputs": [TENSOR, TENSOR | {"name": "more"}]}
ENTRIES: dict[type, Mapping[str, Any]] = {FileEntry: FILE, TensorSpec: TENSOR, GraphEntry: GRAPH}
NO_NAMES = ("", ".", "..", "a/b", "/a", "a\\b", "c:a", "a\0", 5, None)
FIELDS = [(kind, key) for kind, data in ENTRIES.items() for key in data]


def read(kind: Any, data: object) -> Any:
    return kind.from_json(data, "here")


def test_entries_are_read_whole() -> None:
    file, tensor = FileEntry("encode.onnx", 5, "ab" * 32), TensorSpec("images", "uint8", ("batch", 8, 8, 3))
    assert read(FileEntry, FILE) == file
    assert read(TensorSpec, TENSOR) == tensor
    assert read(GraphEntry, GRAPH) == GraphEntry(
        (file, FileEntry("encode.data", 5, "ab" * 32)), (tensor,), (tensor, TensorSpec("more", "uint8", ("batch", 8, 8, 3)))
    )
    assert str(tensor) == "images uint8[batch, 8, 8, 3]"
    assert str(TensorSpec("x", "float32", ())) == "x float32[]"


@pytest.mark.parametrize(("kind", "key"), FIELDS)
def test_a_missing_field_is_named(kind: type, key: str) -> None:
    data = {name: value for name, value in ENTRIES[kind].items() if name != key}
    with pytest.raises(CorruptBundleError, match=rf"bundle\.json: here has no '{key}'\. Export the bundle again"):
        read(kind, data)


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_unknown_field_is_named(kind: type) -> None:
    with pytest.raises(CorruptBundleError, match=r"here has unknown 'surprise'\."):
        read(kind, ENTRIES[kind] | {"surprise": 1})


@pytest.mark.parametrize("data", [None, [], "x", 5])
@pytest.mark.parametrize("kind", ENTRIES)
def test_what_is_no_object_is_named(kind: type, data: object) -> None:
    with pytest.raises(CorruptBundleError, match=r"here is not an object\."):
        read(kind, data)


@pytest.mark.parametrize(
    ("kind", "key", "value", "words"),
    [
        *((FileEntry, "name", name, "names the file .* not a plain file name") for name in NO_NAMES),
        *((FileEntry, "size", size, "gives the size") for size in (-1, 1.0, "1", None, True)),
        *((FileEntry, "sha256", digest, "gives no SHA-256") for digest in ("ab" * 31, "ab" * 33, None, 5)),
        *((TensorSpec, "name", name, "has no name") for name in (None, 5, ["x"])),
        *((TensorSpec, "dtype", dtype, "has the unknown dtype") for dtype in ("object", "float64", "", None, 5)),
        *((TensorSpec, "shape", shape, "has no usable shape") for shape in (None, "x", 5, [1.5], [True], [[1]], {"a": 1})),
        *((GraphEntry, key, value, f"lists no {key}") for key in GRAPH for value in ([], None, {}, "x", 5)),
        (GraphEntry, "files", [FILE | {"size": -1}], "gives the size -1"),
        (GraphEntry, "inputs", [TENSOR, TENSOR | {"dtype": "x"}], "has the unknown dtype 'x'"),
        (GraphEntry, "outputs", [5], "is not an object"),
    ],
)
def test_a_value_that_cannot_be_is_named(kind: type, key: str, value: object, words: str) -> None:
    inner = rf"\.{key}" if kind is GraphEntry and not words.startswith("lists") else ""
    with pytest.raises(CorruptBundleError, match=f"bundle.json: here{inner} {words}"):
        read(kind, ENTRIES[kind] | {key: value})


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float16", "float32"])
def test_every_dtype_of_graphs_is_known(dtype: str) -> None:
    assert read(TensorSpec, TENSOR | {"dtype": dtype}).dtype == dtype


@dataclass(frozen=True)
class Pair:
    first: int
    second: str


def test_all_that_is_wrong_with_fields_is_said_at_once() -> None:
    assert checked_fields(Pair, {"second": "b", "first": 1}, "pair") == {"first": 1, "second": "b"}
    with pytest.raises(CorruptBundleError, match="pair has unknown 'third', no 'second'"):
        checked_fields(Pair, {"first": 1, "third": 3}, "pair")


def test_what_is_required_is_named_with_its_place() -> None:
    require(True, "config", "is wrong")
    with pytest.raises(CorruptBundleError, match=r"^bundle\.json: config is wrong\. Export the bundle again with"):
        require(False, "config", "is wrong")
