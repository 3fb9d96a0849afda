"""Traces a module to an ONNX file with standard operators only, and without metadata of the machine it was made on."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from tokenflow_export.tracing.compress_weights import store_in_half, store_resizes
from tokenflow_export.tracing.weight_quantization import ReadWeight, attach_weights, quantize_weights
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry, TensorSpec
from tokenflow_sdk.errors import TokenFlowError
from tokenflow_sdk.files import file_sha256

__all__ = ["OPSET", "GraphSpec", "export_graph", "file_entry"]

OPSET = 20
_INLINE_BYTES = 64 * 2**20
"""A graph with fewer bytes of weights than this is one file; others have their weights in a second file."""


@dataclass(frozen=True)
class GraphSpec:
    """A graph to trace.

    Args:
        name: in the bundle.
        module: what is traced.
        inputs: by name, in order: an example, whose dynamic sizes must be at least 2, and a `torch.export.Dim` for each dynamic
            dimension by its number.
        outputs: their names.
        read: gives a weight by its name in the graph. The module and the examples are then fake tensors, without values.
        weights: quantize the weight matrices to this dtype.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, tuple[Tensor, Mapping[int, Any]]]
    outputs: tuple[str, ...]
    read: ReadWeight | None = None
    weights: Literal["int8", "int4"] | None = None


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise this project's error where a library wrapped it in its own: weights are read while libraries rewrite the graph."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TokenFlowError):
            cause = cause.__cause__
        if cause is None or cause is error:
            raise
        raise cause from None


@_own_errors()
def export_graph(
    spec: GraphSpec,
    directory: Path,
    progress: Callable[[float], None] | None = None,
    compress: bool = False,
    patch_nums: Sequence[int] = (1,),
) -> GraphEntry:
    """Trace a graph, write it, and describe what was written.

    Args:
        spec: the graph.
        directory: where it is written.
        progress: called with the share of the weights that has been written.
        compress: write smaller files that give the same numbers (`tokenflow_export.tracing.compress_weights`).
        patch_nums: the scales whose resize matrices `compress` looks for.

    Raises:
        ArgumentError: the weights cannot be stored in the wanted dtype.
        CheckpointError: a weight cannot be read, or has a value that the dtype of the arithmetic cannot hold.
    """
    model = _trace(spec)
    if spec.weights is not None:
        quantize_weights(model, spec.weights)
    if compress:
        store_resizes(model, patch_nums)
        store_in_half(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name = "tokenflow-sdk"
    domains = set(model.opset_imports) | {node.domain for node in model.graph.all_nodes()}
    assert domains == {""}, f"{spec.name} uses operators outside ONNX: {domains}"
    assert not model.functions, f"{spec.name} holds local functions"
    path = directory / f"{spec.name}.onnx"
    tensors = [value.const_value for value in model.graph.initializers.values()]
    weight_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{path.name}.data" if weight_bytes >= _INLINE_BYTES else None
    report = progress or (lambda _: None)
    ir.save(model, path, external_data=external, callback=lambda _, state: report((state.index + 1) / state.total))
    onnx.checker.check_model(path, full_check=True)
    files = [path] + ([directory / external] if external else [])
    return GraphEntry(
        tuple(file_entry(file) for file in files),
        tuple(map(_tensor_spec, model.graph.inputs)),
        tuple(map(_tensor_spec, model.graph.outputs)),
    )


def _trace(spec: GraphSpec) -> ir.Model:
    program = _capture(spec)
    if spec.read is not None:
        attach_weights(program.model, spec.read)
        program.optimize()
    return program.model


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Leave cyclic garbage where it is.

    Tracing makes and keeps so many objects that looking for garbage among them takes a quarter of its time. The garbage is
    small, because it holds no weights.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_without_garbage_collection()
def _capture(spec: GraphSpec) -> torch.onnx.ONNXProgram:
    """Trace the module. The graph has no weights if the module has none."""
    # PyTorch's exporter logs that torchvision is absent, which is not needed, and warns about its own internals.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            spec.module.eval(),
            tuple(example for example, _ in spec.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=tuple(dict(varying) for _, varying in spec.inputs.values()),
            verbose=False,
            optimize=spec.read is None,
        )
    assert program is not None
    return program


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype and value.shape
    dims = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, dims)


def file_entry(path: Path) -> FileEntry:
    """The name, size and SHA-256 of a file, for bundle.json."""
    return FileEntry(path.name, path.stat().st_size, file_sha256(path))
