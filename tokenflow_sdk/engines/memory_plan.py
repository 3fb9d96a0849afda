"""How much GPU memory a bundle's engines take: from TensorRT's figures where engines exist, estimated before they are built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tokenflow_sdk.bundle.schema import TensorSpec
from tokenflow_sdk.engines.build import rewrite_for_engine
from tokenflow_sdk.engines.cache import EngineCache, EngineKey
from tokenflow_sdk.engines.jobs import EngineJob
from tokenflow_sdk.errors import EngineBuildError
from tokenflow_sdk.passes.graph import import_onnx_ir, load_graph

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RESERVED", "GraphMemory", "MemoryPlan", "memory_plans", "require_fit", "working_memory"]

RESERVED = 10**9
"""Bytes that are left to CUDA's context, compiled kernels, and buffers that grew."""
_POOL = ("k_pages", "v_pages")
_PAGED = (*_POOL, "new_k", "new_v")
"""Tensors that have the engine's own float type; all others have the bundle's."""

_VIEWS = re.compile("Reshape|Unsqueeze|Squeeze|Flatten|Identity|Shape")
"""Operators whose output is their input's memory."""
_FUSED = re.compile(
    f"{_VIEWS.pattern}|Add|Sub|Mul|Div|Sigmoid|Tanh|Erf|Gelu|Relu|Max|Min|Clip|Cast|Where|Less|LessOrEqual|Greater|"
    "GreaterOrEqual|Equal|And|Or|Not|Abs|Neg|Sqrt|Reciprocal|Pow|Exp|Log|Sin|Cos|Range|Slice|Split|Transpose|Gather"
)
"""Operators that become part of the kernel that reads their output, if only one does."""
_MOVING = re.compile(f"{_VIEWS.pattern}|Cast|Transpose|Expand|Slice|Gather")
"""Operators that change no number but its type: a tensor is stored in the narrowest type that it is read in."""
_PRODUCT_WORKSPACE, _CONVOLUTION_WORKSPACE = 2**23, 2**25
"""Bytes that TensorRT's matrix products, and its convolutions of more than one pixel, work in besides inputs and outputs."""


@dataclass(frozen=True)
class GraphMemory:
    """GPU memory of one graph's engine, in bytes.

    Attributes:
        graph: name of the graph.
        weights: of the engine.
        scratch: memory that a call works in at the largest shapes of its optimization profiles.
        buffers: inputs and outputs at their largest, without the key/value pool.
        measured: whether weights and scratch are TensorRT's figures; else they are estimated from the graph.
    """

    graph: str
    weights: int
    scratch: int
    buffers: int
    measured: bool

    @property
    def total(self) -> int:
        return self.weights + self.scratch + self.buffers


@dataclass(frozen=True)
class MemoryPlan:
    """GPU memory of a bundle's engines for one GPU architecture, in bytes.

    Attributes:
        target: the architecture, e.g. sm86.
        graphs: one for each engine.
        pool: keys and values; 0 for a tokenizer.
    """

    target: str
    graphs: tuple[GraphMemory, ...]
    pool: int

    @property
    def total(self) -> int:
        """Everything, `RESERVED` included."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """What the memory is for."""
        graphs = self.graphs
        return {
            "weights": sum(graph.weights for graph in graphs),
            "pages": self.pool,
            "scratch": sum(graph.scratch for graph in graphs),
            "inputs and outputs": sum(graph.buffers for graph in graphs),
            "CUDA": RESERVED,
        }

    def __str__(self) -> str:
        listed = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items() if size)
        return f"{self.total / 1e9:.1f} GB of GPU memory ({listed})"


def memory_plans(jobs: Iterable[EngineJob], cache: EngineCache, estimate: bool = True) -> list[MemoryPlan]:
    """The memory that engines take when all graphs are open with one execution context each, one plan for each target.

    Args:
        jobs: of one bundle or of several that run together.
        cache: whose engines' figures are used.
        estimate: where there are none, estimate; False leaves out targets with such an engine.

    Raises:
        MissingPackageError: an engine does not exist yet, and onnx_ir is not installed.
        CorruptBundleError: a graph cannot be read.
    """
    measured = {entry.key: entry.figures for entry in cache.entries()}
    estimates: dict[tuple[str, str], tuple[int, int]] = {}
    graphs: dict[str, list[GraphMemory]] = {}
    pools: dict[str, int] = {}
    unknown: set[str] = set()
    for job in jobs:
        found = _figures(measured, job.key)
        place = (str(job.graph), job.key.precision)
        if found is None and not estimate:
            unknown.add(job.key.target)
            continue
        if found is None and place not in estimates:
            estimates[place] = _estimate(job)
        weights, scratch = found or estimates[place]
        tensors = {spec.name: _largest(spec, job) for spec in (*job.entry.inputs, *job.entry.outputs)}
        pool = sum(tensors.pop(name, 0) for name in _POOL)
        pools[job.key.target] = pools.get(job.key.target, 0) + pool
        memory = GraphMemory(job.key.graph, weights, scratch, sum(tensors.values()), found is not None)
        graphs.setdefault(job.key.target, []).append(memory)
    return [MemoryPlan(target, tuple(found), pools[target]) for target, found in graphs.items() if target not in unknown]


def require_fit(plan: MemoryPlan, memory: int) -> None:
    """Check that engines fit a GPU.

    Args:
        plan: of all engines that run on it together.
        memory: of the GPU, in bytes.

    Raises:
        EngineBuildError: they do not.
    """
    if plan.total <= memory:
        return
    if plan.parts["weights"] + RESERVED > memory:
        hint = "Take a GPU with more memory, or export the model again with `--weights int4`."
    elif plan.pool:
        hint = "Lower --pages (with it a generator's pictures at once), --batch-limit, or both."
    else:
        hint = "Lower --batch-limit."
    raise EngineBuildError(f"The engines for {plan.target} take {plan}; the GPU has {memory / 1e9:.1f} GB.", hint)


def _figures(measured: Mapping[EngineKey, Mapping[str, object]], key: EngineKey) -> tuple[int, int] | None:
    """Weights and scratch of the engine of a key, if TensorRT has logged both."""
    figures = measured.get(key, {})
    weights, scratch = figures.get("weights_bytes"), figures.get("activation_bytes")
    return (weights, scratch) if type(weights) is int and type(scratch) is int else None


def _largest(spec: TensorSpec, job: EngineJob) -> int:
    """Most bytes of an input or output."""
    half = job.build_config.precision != "fp32"
    item = 2 if half and spec.name in _PAGED else np.dtype(spec.dtype).itemsize
    dims = [[dim if isinstance(dim, int) else profile.sizes[dim][2] for dim in spec.shape] for profile in job.profiles]
    return max(map(math.prod, dims)) * item


def _estimate(job: EngineJob) -> tuple[int, int]:
    """Weights and scratch of an engine that is not built."""
    config = job.build_config
    half = None if config.precision == "fp32" else config.precision
    model = load_graph(job.graph)
    rewrite_for_engine(model, half, job.pinned, job.ranges)
    largest = [{dim: sizes[2] for dim, sizes in profile.sizes.items()} for profile in job.profiles]
    return _weights(model), max(working_memory(model, sizes, half is not None) for sizes in largest)


def _weights(model: ir.Model) -> int:
    """Bytes of the constants that a graph reads, in the types in which it reads them."""
    constants = _constants(model.graph)
    read = {value for node in model.graph for value in node.inputs if value in constants and not set(node.outputs) <= constants}
    counts = _Counts({})
    return int(sum(counts.of(value) * _read_item(value) for value in read if value is not None))


def _constants(graph: ir.Graph) -> set[ir.Value | None]:
    """A graph's weights and what is computed from them alone, which TensorRT does once. None, a missing input, is one."""
    found: set[ir.Value | None] = {None, *graph.initializers.values()}
    for node in graph:
        if found.issuperset(node.inputs):
            found |= set(node.outputs)
    return found


def working_memory(model: ir.Model, sizes: Mapping[str, int], fused_attention: bool) -> int:
    """Estimate the memory that a call of an engine works in: the most that the graph's intermediate tensors take at one time.

    Tensors are taken to live from the node that writes them to the last that reads them, but for those that TensorRT never
    writes: results of elementwise operators with one reader, parts of outputs, and scores of fused attention. To this come
    the workspaces of matrix products and convolutions. docs/explanation/decisions.md says how far this is from the truth.

    Args:
        model: the graph that TensorRT is given.
        sizes: of its dynamic dimensions.
        fused_attention: whether attention runs as one kernel, as it does in half precision.
    """
    graph = model.graph
    counts, constants = _Counts(sizes), _constants(graph)
    ends = _written_into_outputs(graph)
    sources: dict[ir.Value, set[ir.Value]] = {}
    """The stored tensors that a value is computed from when it is read."""
    lives: dict[ir.Value, tuple[int, int]] = {}
    for place, node in enumerate(graph):
        if constants.issuperset(node.outputs):
            continue
        reads: set[ir.Value] = set()
        for value in node.inputs:
            if value is not None and value not in constants:
                reads |= sources.get(value, {value})
        for value in node.outputs:
            counts.of(value)
            if value not in ends and _is_folded(value, fused_attention):
                sources[value] = reads
            else:
                lives[value] = (place, place)
                lives |= {read: (lives[read][0], place) for read in reads if read in lives}
    change = np.zeros(len(lives) and len(graph) + 1, np.int64)
    for value, (first, last) in lives.items():
        # An output that the graph itself reads is kept a second time.
        if value.dtype is not None and (value not in ends or (value.is_graph_output() and value.uses())):
            size = counts.of(value) * _read_item(value)
            change[first] += size
            change[last + 1] -= size
    return int(change.cumsum().max(initial=0)) + _workspace(graph)


class _Counts:
    """Numbers of elements of a graph's tensors at given sizes of its dynamic dimensions."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._dims: dict[str, object] = {}
        self._counts: dict[ir.Value, int] = {}

    def of(self, value: ir.Value) -> int:
        """Elements of a tensor. One without a shape, e.g. of a pass, is taken to be as large as the largest it is made of."""
        if value not in self._counts:
            node, dims = value.producer(), [None] if value.shape is None else [self._dim(dim) for dim in value.shape]
            if all(isinstance(dim, int) for dim in dims):
                self._counts[value] = math.prod(dim for dim in dims if isinstance(dim, int))
            else:
                made_of = () if node is None else (v for v in node.inputs if v is not None and not v.is_initializer())
                self._counts[value] = max(map(self.of, made_of), default=0)
        return self._counts[value]

    def _dim(self, dim: int | ir.SymbolicDim) -> object:
        if isinstance(dim, int):
            return dim
        text = str(dim)
        if text not in self._dims:
            self._dims[text] = dim.evaluate(self._sizes)
        return self._dims[text]


def _written_into_outputs(graph: ir.Graph) -> set[ir.Value]:
    """The graph's outputs, and the parts that they are joined from."""
    found: set[ir.Value] = set()
    pending = list(graph.outputs)
    while pending:
        value = pending.pop()
        found.add(value)
        node = value.producer()
        if node is not None and (_VIEWS.fullmatch(node.op_type) or node.op_type == "Concat"):
            pending += [part for part in node.inputs if part is not None and part.producer() is not None]
    return found


def _is_folded(value: ir.Value, fused_attention: bool) -> bool:
    """Whether a tensor is never written to memory."""
    node = value.producer()
    assert node is not None
    if _VIEWS.fullmatch(node.op_type) or (
        node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].is_graph_input()
    ):
        return True
    if fused_attention and (node.op_type == "Softmax" or _becomes_attention(value)):
        return True
    return _FUSED.fullmatch(node.op_type) is not None and len(value.uses()) == 1


def _becomes_attention(value: ir.Value) -> bool:
    """Whether a tensor is only read, directly or through elementwise operators, by a softmax."""
    uses = list(value.uses())
    while len(uses) == 1:
        node = uses[0].node
        if not _FUSED.fullmatch(node.op_type):
            return str(node.op_type) == "Softmax"
        uses = list(node.outputs[0].uses())
    return False


def _item(value: ir.Value) -> float:
    """Bytes of an element. TensorRT's indices have 32 bits."""
    onnx_ir = import_onnx_ir()
    dtype = value.dtype
    return 0 if dtype is None else 4 if dtype == onnx_ir.DataType.INT64 else float(dtype.itemsize)


def _read_item(value: ir.Value) -> float:
    """Bytes of an element in the widest type in which a tensor is read, if that is narrower than its own."""
    read = (_read_item(use.node.outputs[0]) if _MOVING.fullmatch(use.node.op_type) else math.inf for use in value.uses())
    return min(_item(value), max(read, default=math.inf))


def _workspace(graph: ir.Graph) -> int:
    operators = {node.op_type for node in graph}
    kernels = (node.inputs[1].shape for node in graph if node.op_type == "Conv" and node.inputs[1] is not None)
    if any(shape is not None and max(shape.numpy()[2:], default=1) > 1 for shape in kernels):
        return _CONVOLUTION_WORKSPACE
    return _PRODUCT_WORKSPACE if operators & {"Conv", "ConvTranspose", "MatMul", "Gemm"} else 0
