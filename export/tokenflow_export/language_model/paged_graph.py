"""Makes the paged transformer graph of a language model. It is traced without weights, which are then read one at a time.

The same graph runs prefill, every scale and every token. Keys and values are stored in pages: the graph gathers those that the
block table of each row names, attends to them and to the step's own, and returns the step's own, which the caller stores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.models.llama import Layer, RmsNorm, Transformer, rope_angles, score_bias
from tokenflow_export.tracing.onnx_export import GraphSpec
from tokenflow_export.tracing.weight_quantization import ExportPrecision, ReadWeight, use_matmul

__all__ = ["TransformerGraph", "hidden_by_layer", "transformer_shapes", "transformer_spec"]

_VARYING = ("batch", "queries", "table", "slots", "page")


class TransformerGraph(nn.Module):
    """One step of the transformer over paged keys and values.

    Inputs: embeddings float32 [B, Q, H]; positions int32 [B, Q], for RoPE; visible int32 [B, Q], how many of the step's keys
    each query sees, from the first on (q + 1 for query q is causal, Q for all is bidirectional); context int32 [B], how many
    cached tokens each row has; block_tables int32 [B, P]; k_pages and v_pages [layers * N, page, kv_heads, D], in the dtype of
    the weight matrices. Outputs: hidden float32 [B, Q, H], after the final norm; new_k and new_v [layers, B, Q, kv_heads, D].
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        visible: Tensor,
        context: Tensor,
        block_tables: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, batch, length = self.config, embeddings.shape[0], embeddings.shape[1]
        slots = block_tables.shape[1] * k_pages.shape[1]
        seen = torch.arange(slots)[None, None] < context[:, None, None]
        own = torch.arange(length)[None, None] < visible[..., None]
        bias = score_bias(torch.cat([seen.expand(batch, length, slots), own], dim=-1))
        cos, sin = rope_angles(positions, config.head_dim, config.rope_theta)
        # Keys and values are gathered head by head, as the products of attention read them, so nothing is transposed.
        page = k_pages.shape[1]
        tokens = (block_tables[..., None] * page + torch.arange(page, dtype=torch.int32)).reshape(batch, 1, slots)
        rows = tokens * config.kv_heads + torch.arange(config.kv_heads, dtype=torch.int32)[None, :, None]
        layer_rows = k_pages.shape[0] // config.layers * page * config.kv_heads
        keys, values = k_pages.flatten(0, 2), v_pages.flatten(0, 2)
        x, new_k, new_v = embeddings, [], []
        for index, layer in enumerate(self.transformer.layers):
            past = tuple(F.embedding(rows + index * layer_rows, pool) for pool in (keys, values))
            x, k, v = layer(x, cos, sin, past, bias)
            new_k.append(k)
            new_v.append(v)
        return self.transformer.norm(x), torch.stack(new_k), torch.stack(new_v)


def transformer_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the transformer by its key in a released directory."""
    with torch.device("meta"):
        transformer = Transformer(config)
    return {f"model.{key}": tuple(value.shape) for key, value in transformer.state_dict().items()}


def transformer_spec(directory: HfDirectory, config: TransformerConfig, precision: ExportPrecision) -> GraphSpec:
    """The paged transformer graph, to be traced. Its weights are read when the graph is saved."""
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
                # Two tensors, because tracing makes one input of a tensor that is given twice.
                "k_pages": (torch.zeros(*pool), pages),
                "v_pages": (torch.zeros(*pool), pages),
            }
    finally:
        torch.set_default_dtype(dtype)
    outputs = ("hidden", "new_k", "new_v")
    return GraphSpec("transformer", graph, inputs, outputs, _reader(directory), precision.weights)


def _reader(directory: HfDirectory) -> ReadWeight:
    """Reads weights by their names in the graph: `transformer.x` is `model.x` in the directory, and matrices are [in, out]."""

    def read(name: str) -> Any:
        tensor = directory.tensor(f"model.{name.removeprefix('transformer.')}")
        return (tensor.T if tensor.ndim == 2 else tensor).contiguous().numpy()

    return read


def hidden_by_layer(
    directory: HfDirectory,
    config: TransformerConfig,
    x: Tensor,
    positions: Tensor,
    mask: Tensor,
    rounded: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute `Transformer.forward` in float32 with one layer in memory at a time: hidden states [B, Q, H].

    Args:
        directory: the checkpoint.
        config: sizes of its transformer.
        x: embeddings [B, Q, H].
        positions: int32 [B, Q].
        mask: bool [B, Q, Q], true where a query sees a key.
        rounded: applied to every weight matrix [out, in], if given.
    """
    cos, sin = rope_angles(positions, config.head_dim, config.rope_theta)
    bias = score_bias(mask)
    for index in range(config.layers):
        with torch.device("meta"):
            layer = Layer(config)
        x, _, _ = _load(layer, directory, f"model.layers.{index}.", rounded)(x, cos, sin, None, bias)
    with torch.device("meta"):
        norm = RmsNorm(config.width, config.norm_eps)
    result: Tensor = _load(norm, directory, "model.norm.")(x)
    return result


def _load(
    module: torch.nn.Module, directory: HfDirectory, prefix: str, rounded: Callable[[Tensor], Tensor] | None = None
) -> torch.nn.Module:
    weights = {key: directory.tensor(prefix + key) for key in module.state_dict()}
    if rounded is not None:
        weights = {key: rounded(weight) if weight.ndim == 2 else weight for key, weight in weights.items()}
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval().requires_grad_(False)
