from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import ROOT
from tests.support.mutations import SPECIAL, mutated_bytes, no_hang
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import MANIFEST, Bundle
from tokenflow_sdk.bundle.external_data import check_external_data
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry
from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.files import file_sha256

TINY = ROOT / "models" / "tiny" / "tokenizer"


def listed(path: Path) -> dict[str, object]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The bundled tokenizer, of links as the hub's cache."""
    directory = tmp_path / "bundle"
    directory.mkdir()
    for file in TINY.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def externalize(bundle: Path, change: Callable[[TensorProto], object], *names: str) -> None:
    """Let a weight of the graph `features` be elsewhere, in files by these names."""
    model = onnx.load(TINY / "features.onnx")
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    change(tensor)
    graph = bundle / "features.onnx"
    graph.unlink()
    graph.write_bytes(model.SerializeToString())
    for name in names:
        (bundle / name).write_bytes(data)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["graphs"]["features"]["files"] = [listed(graph), *(listed(bundle / name) for name in names)]
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def at(**entries: object) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def test_weights_in_listed_files_are_read(bundle: Path) -> None:
    externalize(bundle, at(location="features.onnx.data"), "features.onnx.data")
    (bundle.parent / "blobs").mkdir()
    for i, name in enumerate(("features.onnx", "features.onnx.data")):
        (bundle / name).rename(bundle.parent / "blobs" / str(i))
        (bundle / name).symlink_to(Path("..") / "blobs" / str(i))
    with Tokenizer.from_pretrained(TINY, threads=1) as inline, Tokenizer.from_pretrained(bundle, threads=1) as beside:
        codes = inline.codes(np.arange(inline.config.n_codes, dtype=np.int32))
        assert np.array_equal(inline.features(codes), beside.features(codes))


OUTSIDE = [
    "../outside.bin",
    "/proc/self/environ",
    "unlisted.bin",
    "missing.bin",
    "sub/w.bin",
    "./w.bin",
    "W.BIN",
    "",
    "features.onnx",
]


@pytest.mark.parametrize(
    "location", [*OUTSIDE, "encode.onnx", "*/_ORT_MEM_ADDR_/*", "w.bin\0", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_weights_anywhere_else_are_refused(location: str | bytes, bundle: Path) -> None:
    def change(tensor: TensorProto) -> None:
        if isinstance(location, str):
            at(location=location, offset=0)(tensor)
        else:  # not UTF-8, which onnx would refuse to write
            tensor.MergeFromString(b"\x6a\x0f\x0a\x08location\x12\x03" + location)

    (bundle / "unlisted.bin").symlink_to(TINY / "reference.npz")
    externalize(bundle, change, "w.bin")
    with pytest.raises(CorruptBundleError, match=r"features\.onnx reads weights from .*does not list"):
        Bundle.open(bundle, TokenizerConfig)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"offset": 1, "length": 10**6}, r"reads 1000000 bytes from byte 1 of w.bin, which has \d+"),
        ({"offset": -4}, "from byte -4"),
        ({"length": "1e3"}, "1e3 bytes"),
        ({"offset": "9" * 400}, "from byte 999"),
        ({"offset": "\u0663"}, "from byte"),
    ],
)
def test_weights_lie_within_their_file(place: dict[str, Any], words: str, bundle: Path) -> None:
    externalize(bundle, at(location="w.bin", **place), "w.bin")
    with pytest.raises(CorruptBundleError, match=words):
        Bundle.open(bundle, TokenizerConfig)


def test_one_place_is_one_place(bundle: Path) -> None:
    """Readers differ in which of two they take."""

    def change(tensor: TensorProto) -> None:
        for location in ("/etc/passwd", "w.bin"):
            tensor.external_data.add(key="location", value=location)

    externalize(bundle, change, "w.bin")
    with pytest.raises(CorruptBundleError, match="says twice where a tensor is"):
        Bundle.open(bundle, TokenizerConfig)


def outside() -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="elsewhere")
    return tensor


def graph(**fields: Any) -> onnx.GraphProto:
    return onnx.GraphProto(name="g", **fields)


def node(**attribute: Any) -> onnx.NodeProto:
    return onnx.NodeProto(op_type="Constant", output=["c"], attribute=[onnx.AttributeProto(name="value", **attribute)])


PLACES = {
    "initializer": graph(initializer=[outside()]),
    "sparse initializer": graph(sparse_initializer=[onnx.SparseTensorProto(indices=outside())]),
    "attribute": graph(node=[node(t=outside())]),
    "list": graph(node=[node(tensors=[outside()])]),
    "sparse attribute": graph(node=[node(sparse_tensor=onnx.SparseTensorProto(values=outside()))]),
    "sparse list": graph(node=[node(sparse_tensors=[onnx.SparseTensorProto(values=outside())])]),
    "subgraph": graph(node=[node(g=graph(initializer=[outside()]))]),
    "subgraphs": graph(node=[node(graphs=[graph(node=[node(g=graph(initializer=[outside()]))])])]),
}
MODELS = {name: onnx.ModelProto(ir_version=8, graph=found) for name, found in PLACES.items()} | {
    "function": onnx.ModelProto(functions=[onnx.FunctionProto(name="f", node=[node(t=outside())])]),
    "default of a function": onnx.ModelProto(
        functions=[onnx.FunctionProto(name="f", attribute_proto=[onnx.AttributeProto(name="a", t=outside())])]
    ),
    "training": onnx.ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=graph(initializer=[outside()]))]),
}


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check_external_data(path.parent, GraphEntry((FileEntry(path.name, len(content), ""), FileEntry("w.bin", 9, "")), (), ()))


@pytest.mark.parametrize("place", MODELS)
def test_a_tensor_is_found_wherever_it_is(place: str, tmp_path: Path) -> None:
    content = MODELS[place].SerializeToString()
    with pytest.raises(CorruptBundleError, match="reads weights from 'elsewhere'"):
        check(tmp_path / "g.onnx", content)
    entry = GraphEntry((FileEntry("g.onnx", len(content), ""), FileEntry("elsewhere", 4, "")), (), ())
    check_external_data(tmp_path, entry)


def test_a_compiled_graph_is_refused(tmp_path: Path) -> None:
    """It holds the name of a file in an attribute."""
    compiled = helper.make_node("EPContext", [], ["c"], domain="com.microsoft", embed_mode=0, ep_cache_context="../x.bin")
    with pytest.raises(CorruptBundleError, match="compiled for one device"):
        check(tmp_path / "g.onnx", onnx.ModelProto(graph=graph(node=[compiled])).SerializeToString())


def test_any_damage_is_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    contents = [model.SerializeToString() for model in MODELS.values()]
    with no_hang():
        for _ in range(300):
            try:
                check(tmp_path / "g.onnx", mutated_bytes(rng.choice(contents), rng))
            except CorruptBundleError:
                continue


@pytest.mark.parametrize("put", SPECIAL)
def test_what_is_no_file_is_named(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "g.onnx")
    entry = GraphEntry((FileEntry("g.onnx", 0, ""),), (), ())
    with no_hang(), pytest.raises(CorruptBundleError, match="is no ONNX graph"):
        check_external_data(tmp_path, entry)
