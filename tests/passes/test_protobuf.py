"""Compared with the protobuf library, which the onnx package brings."""

from __future__ import annotations

import pytest
from onnx import AttributeProto, GraphProto, TensorProto, helper

from tokenflow_sdk.passes.protobuf import encoded, fields

TENSOR = TensorProto(dims=[3, 300, 2**40], data_type=1, name="Gewicht ü", raw_data=b"\x00\xff" * 100, float_data=[1.5])


def test_reads_what_the_library_wrote() -> None:
    data = TENSOR.SerializeToString()
    found = [(number, data[at] if isinstance(at, slice) else at) for number, at in fields(data, slice(0, len(data)))]
    assert [value for number, value in found if number == 1] == list(TENSOR.dims)
    assert (8, TENSOR.name.encode()) in found
    assert (9, TENSOR.raw_data) in found


def test_steps_over_numbers_of_fixed_width() -> None:
    data = AttributeProto(name="alpha", f=1.5, type=AttributeProto.FLOAT).SerializeToString()
    assert [number for number, _ in fields(data, slice(0, len(data)))] == [1, 20]


def test_the_library_reads_what_is_written() -> None:
    content = encoded(*((1, size) for size in TENSOR.dims), (2, 1), (8, TENSOR.name), (9, TENSOR.raw_data))
    expected = TensorProto()
    expected.CopyFrom(TENSOR)
    expected.ClearField("float_data")
    assert TensorProto.FromString(content) == expected
    assert AttributeProto.FromString(encoded((1, "axis"), (3, -1), (20, 2))) == helper.make_attribute("axis", -1)


def test_messages_within_messages() -> None:
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [], [], [TENSOR])
    data = graph.SerializeToString()
    again = encoded(*((n, data[at] if isinstance(at, slice) else at) for n, at in fields(data, slice(0, len(data)))))
    assert GraphProto.FromString(again) == graph


@pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x08", b"\x0b", b"\x08" + b"\xff" * 11, b"\x0d\x00"])
def test_damage_is_an_error(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(fields(data, slice(0, len(data))))
