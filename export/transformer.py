"""A released transformer, of any kind, to the paged graph: traced without weights, which are then read one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from export.config import TransformerConfig
from export.generator_graphs import TransformerGraph
from export.hf_directory import HfDirectory
from export.models.llama import Layer, RmsNorm, Transformer, rope_angles
from export.onnx_export import GraphSpec
from export.precision import Precision, ReadWeight, use_matmul

__all__ = ["hidden_by_layer", "transformer_shapes", "transformer_spec"]

_VARYING = ("batch", "queries", "table", "slots", "page")


def transformer_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes in a released directory."""
    with torch.device("meta"):
        transformer = Transformer(config)
    return {f"model.{key}": tuple(value.shape) for key, value in transformer.state_dict().items()}


def transformer_spec(directory: HfDirectory, config: TransformerConfig, precision: Precision) -> GraphSpec:
    """The paged step. No weight is read before the graph is saved."""
    dims: dict[str, Any] = {name: torch.export.Dim(name) for name in _VARYING}
    rows, pages = {0: dims["batch"], 1: dims["queries"]}, {0: dims["slots"], 1: dims["page"]}
    pool = (config.layers * 5, 16, config.kv_heads, config.head_dim)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(precision.torch_dtype)
    try:
        with FakeTensorMode():
            graph = TransformerGraph(Transformer(config))
            use_matmul(graph)
            counts = [torch.ones(*shape, dtype=torch.int32) for shape in ((2, 3), (2, 3), (2,), (2, 4))]
            inputs = {
                "embeddings": (torch.zeros(2, 3, config.width, dtype=torch.float32), rows),
                "positions": (counts[0], rows),
                "visible": (counts[1], rows),
                "context": (counts[2], {0: dims["batch"]}),
                "block_tables": (counts[3], {0: dims["batch"], 1: dims["table"]}),
                # Two tensors: tracing would take one object given twice for one input.
                "k_pages": (torch.zeros(*pool), pages),
                "v_pages": (torch.zeros(*pool), pages),
            }
    finally:
        torch.set_default_dtype(dtype)
    outputs = ("hidden", "new_k", "new_v")
    return GraphSpec("transformer", graph, inputs, outputs, _reader(directory), precision.weights)


def _reader(directory: HfDirectory) -> ReadWeight:
    """`transformer.x` in the graph is `model.x` in the directory; matrices are [in, out] in the graph."""

    def read(name: str) -> Any:
        tensor = directory.tensor(f"model.{name.removeprefix('transformer.')}")
        return (tensor.T if tensor.ndim == 2 else tensor).contiguous().numpy()

    return read


def hidden_by_layer(directory: HfDirectory, config: TransformerConfig, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """What eager PyTorch computes in float32, as `Transformer.forward`, with one layer in memory at a time."""
    cos, sin = rope_angles(positions, config.head_dim, config.rope_theta)
    none = x.new_zeros(x.shape[0], 0, config.kv_heads, config.head_dim)
    for index in range(config.layers):
        with torch.device("meta"):
            layer = Layer(config)
        x, _, _ = _load(layer, directory, f"model.layers.{index}.")(x, cos, sin, none, none, mask)
    with torch.device("meta"):
        norm = RmsNorm(config.width, config.norm_eps)
    result: Tensor = _load(norm, directory, "model.norm.")(x)
    return result


def _load(module: torch.nn.Module, directory: HfDirectory, prefix: str) -> torch.nn.Module:
    weights = {key: directory.tensor(prefix + key) for key in module.state_dict()}
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval().requires_grad_(False)
