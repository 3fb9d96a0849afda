"""Compares a graph in two backends or precisions tensor by tensor, with Polygraphy, to find where results begin to differ.

The first is always the bundle's float32 graph in onnxruntime. The second is the graph that engines are built from, in TensorRT,
or in onnxruntime with half precision emulated (`tokenflow_export.precision.emulate_half`).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokenflow_export.precision.emulate_half import emulated_graph
from tokenflow_sdk.backends.tensorrt_module import require_installed
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.engines.build_config import Precision
from tokenflow_sdk.errors import MissingPackageError

__all__ = ["Drift", "inspect_graph"]

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Drift:
    """How much a tensor differs: `relative` is the RMS of the difference divided by the RMS of the tensor."""

    name: str
    shape: tuple[int, ...]
    relative: float


def inspect_graph(
    bundle: Bundle[TokenizerConfig], graph: str, feeds: dict[str, NDArray[Any]], precision: Precision, backend: Backend
) -> list[Drift]:
    """Compare all tensors that both runs compute, in the order of the graph.

    Args:
        bundle: of a tokenizer.
        graph: the name of one of its graphs.
        feeds: its inputs, in a batch of 1, because all intermediate tensors are kept in memory.
        precision: of the second run.
        backend: of the second run.

    Raises:
        MissingPackageError: Polygraphy or TensorRT is not installed.
    """
    if backend == "tensorrt-rtx":
        # Polygraphy reads this when it imports TensorRT.
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    try:
        from polygraphy import constants
        from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
        from polygraphy.comparator import Comparator
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingPackageError(
            f"Polygraphy is not installed ({error}).", "Run `pip install 'tokenflow-sdk[inspect]'`."
        ) from error
    G_LOGGER.module_severity = G_LOGGER.ERROR
    path = bundle.graph_path(graph)

    def in_onnxruntime(file: Path, name: str, outputs: Any = constants.MARK_ALL) -> Any:
        marked = ModifyOutputs(OnnxFromPath(str(file)), outputs=outputs)
        return OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(marked), providers=["cpu"]), name=name)

    half = None if precision == "fp32" else precision
    with tempfile.TemporaryDirectory() as work:
        if backend == "onnxruntime":
            second = path if half is None else emulated_graph(path, half, Path(work))
            runner = in_onnxruntime(second, "second", _tensors(second))
        else:
            require_installed(backend)
            runner = _in_tensorrt(engine_graph(path, half, Path(work)), feeds)
        results = Comparator.run([in_onnxruntime(path, "first"), runner], data_loader=[feeds])
    (_, (first,)), (_, (other,)) = results.items()
    return [
        Drift(name, tuple(first[name].shape), _relative(first[name], other[name]))
        for name in first
        if name in other and first[name].dtype.kind == "f" and first[name].shape == other[name].shape
    ]


def _tensors(graph: Path) -> list[str]:
    """The names of the float32 tensors that a graph computes."""
    values = (value for node in ir.load(graph).graph for value in node.outputs)
    return [str(value.name) for value in values if value.dtype == ir.DataType.FLOAT]


def _in_tensorrt(graph: Path, feeds: dict[str, NDArray[Any]]) -> Any:
    from polygraphy import constants
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineFromNetwork,
        ModifyNetworkOutputs,
        NetworkFromOnnxPath,
        Profile,
        TrtRunner,
    )

    profile = Profile()
    for name, array in feeds.items():
        profile.add(name, array.shape, array.shape, array.shape)
    network = ModifyNetworkOutputs(NetworkFromOnnxPath(str(graph), strongly_typed=True), outputs=constants.MARK_ALL)
    return TrtRunner(EngineFromNetwork(network, config=CreateConfig(profiles=[profile])), name="second")


def _relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    exact = a.astype(np.float64)
    size = float(np.sqrt(np.mean(np.square(exact))))
    return float(np.sqrt(np.mean(np.square(b.astype(np.float64) - exact)))) / max(size, 1e-30)
