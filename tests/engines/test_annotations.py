from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fakes import fake_bundle
from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import PINNED, RANGES, Annotations, decoder_ranges, pinned_nodes
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.errors import CorruptBundleError, EngineBuildError
from tokenflow_sdk.passes.quantize import ActivationRanges


def annotated(directory: Path, name: str, content: object) -> Bundle[TokenizerConfig]:
    """A bundle with one annotation: JSON, or bytes as they are."""
    path = directory / f"{name}.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return replace(fake_bundle(), path=directory, assets={name: file_entry(path)})


def test_nothing_is_pinned_where_nobody_searched() -> None:
    assert pinned_nodes(fake_bundle(), "fp16") == {}


def test_pinned_nodes_are_listed_by_precision_and_graph(tmp_path: Path) -> None:
    content = {"fp16": {"encode": ["a", "b"], "decode": []}, "bf16": {"encode": ["c"]}}
    bundle = annotated(tmp_path, PINNED, content)
    assert pinned_nodes(bundle, "fp16") == {"encode": ("a", "b"), "decode": ()}
    assert pinned_nodes(bundle, "bf16") == {"encode": ("c",)}
    assert pinned_nodes(bundle, "fp32") == {}


def test_openvino_pins_nothing_and_a_decoder_may_differ(tmp_path: Path) -> None:
    bundle = annotated(tmp_path, PINNED, {"bf16": {"encode": ["c"]}})
    assert Annotations.of(bundle, BuildConfig(precision="bf16")).key("encode").startswith("bf16, 1 pinned")
    assert Annotations.of(bundle, BuildConfig("openvino", precision="bf16")).key("encode") == "bf16"
    found = Annotations.of(bundle, BuildConfig("openvino", precision="fp32", decoder="bf16"))
    assert [found.precision_of(graph) for graph in ("encode", "decode", "features")] == ["fp32", "bf16", "fp32"]
    assert found.key("encode") == found.key("decode") == "fp32, bf16 decoder"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", [], 5, None, {"fp16": []}, {"fp16": {"encode": 5}}])
def test_a_damaged_list_of_nodes_is_named(tmp_path: Path, content: object) -> None:
    bundle = annotated(tmp_path, PINNED, content)
    with pytest.raises(CorruptBundleError, match=r"pinned\.json is no list of nodes: .*precision-search` again"):
        pinned_nodes(bundle, "fp16")


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_ranges_are_listed_by_type(tmp_path: Path, dtype) -> None:
    bundle = annotated(tmp_path, RANGES, {"int8": {"decode": {"a": 1, "b": 2.5}}, "fp8": {"decode": {"a": 3}}})
    expected = {"int8": {"a": 1.0, "b": 2.5}, "fp8": {"a": 3.0}}
    assert decoder_ranges(bundle, dtype) == ActivationRanges(dtype, expected[dtype])


def test_without_ranges_the_command_that_measures_them_is_named() -> None:
    with pytest.raises(EngineBuildError, match="cannot be built in int8.*tokenflow export calibrate nowhere --images photos/"):
        decoder_ranges(fake_bundle(), "int8")


def test_a_decoder_of_which_no_convolution_may_be_rounded_is_named(tmp_path: Path) -> None:
    bundle = annotated(tmp_path, RANGES, {"int8": {"decode": {}}})
    with pytest.raises(EngineBuildError, match="No convolution of .* may be computed in int8.*Build without --decoder"):
        decoder_ranges(bundle, "int8")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", [], None, {}, {"fp8": {"decode": {"a": 1}}}, {"int8": {}}, {"int8": {"decode": [1]}}]
    + [{"int8": {"decode": {"a": value}}} for value in (None, "x", [1])],
)
def test_a_damaged_list_of_magnitudes_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(CorruptBundleError, match=r"ranges\.json is no list of magnitudes: .*calibrate"):
        decoder_ranges(annotated(tmp_path, RANGES, content), "int8")


@pytest.mark.parametrize("value", ["0", "-1.5", "NaN", "Infinity"])
def test_a_magnitude_is_above_0(tmp_path: Path, value: str) -> None:
    content = b'{"int8": {"decode": {"a": 1.0, "b": ' + value.encode() + b"}}}"
    with pytest.raises(CorruptBundleError, match="magnitudes that are not above 0.*calibrate"):
        decoder_ranges(annotated(tmp_path, RANGES, content), "int8")


@pytest.mark.parametrize(("name", "content"), [(PINNED, {"fp16": {}}), (RANGES, {"int8": {"decode": {"a": 1.0}}})])
def test_a_file_that_is_not_the_bundles_own_is_not_read(tmp_path: Path, name: str, content: object) -> None:
    bundle = annotated(tmp_path, name, content)
    (tmp_path / f"{name}.json").write_text(json.dumps(content).replace("}", " }", 1))
    with pytest.raises(CorruptBundleError, match=rf"{name}\.json is damaged"):
        _ = pinned_nodes(bundle, "fp16") if name == PINNED else decoder_ranges(bundle, "int8")
