from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from tests.support.small_language_model import SIZES, state_of, transformers_model, write_directory
from tokenflow_export.checkpoints.architecture import read_architecture
from tokenflow_export.language_model.paged_graph import hidden_by_layer, transformer_spec
from tokenflow_export.models.llama import Layer
from tokenflow_export.precision.emulate_half import emulate, emulated_graph
from tokenflow_export.tracing.onnx_export import export_graph
from tokenflow_export.tracing.weight_quantization import ExportPrecision
from tokenflow_sdk.passes.graph import load_graph

WIDTH, QUERIES = 64, 8
TRIGGER, OUTLIER, NEURON = 2, 5, 7
"""Channels of the residual stream, and a neuron of both MLPs."""


def outlier_model(directory: Path, size: float) -> tuple[Path, np.ndarray, np.ndarray, float]:
    """An exported Qwen2 in which, as in Qwen2.5, the first token gets massive activations in a channel: each of two MLPs adds
    `size`.

    Returns:
        The float16 export, embeddings, the hidden states of float32, and the largest value of the residual stream.
    """
    values = SIZES | {"model_type": "llava_qwen", "hidden_size": WIDTH, "intermediate_size": 96, "tie_word_embeddings": False}
    state = state_of(transformers_model(values))
    for index, (channel, excited) in enumerate(((TRIGGER, 8.0), (OUTLIER, 8.0))):
        mlp = f"model.layers.{index}.mlp."
        state[f"model.layers.{index}.post_attention_layernorm.weight"][channel] = 1
        for name in ("gate_proj", "up_proj"):
            state[f"{mlp}{name}.weight"][NEURON] = 0
            state[f"{mlp}{name}.weight"][NEURON, channel] = 3
        state[f"{mlp}down_proj.weight"][OUTLIER, NEURON] = size / (3 * excited) ** 2
    # The final norm of such models leaves little of the channel.
    state["model.norm.weight"][OUTLIER] = 0
    found = write_directory(directory, values, state)
    config = read_architecture(found, "pre")
    export_graph(transformer_spec(found, config, ExportPrecision("fp16")), directory)
    torch.manual_seed(1)
    x = torch.randn(1, QUERIES, WIDTH)
    x[:, :, TRIGGER] = 0
    x[:, 0, TRIGGER] = 1000
    peaks: list[float] = []
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()[None]
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: peaks.append(float(output[0].abs().max())) if isinstance(module, Layer) else None
    )
    try:
        with torch.inference_mode():
            hidden = hidden_by_layer(found, config, x, torch.arange(QUERIES)[None], mask)[0]
    finally:
        hook.remove()
    return directory / "transformer.onnx", x.numpy(), hidden.numpy(), max(peaks)


def run(graph: Path, embeddings: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph)
    pool = np.zeros((2, 16, SIZES["num_key_value_heads"], WIDTH // SIZES["num_attention_heads"]), np.float32)
    feeds = {
        "embeddings": embeddings,
        "positions": np.arange(QUERIES, dtype=np.int32)[None],
        "visible": np.arange(1, QUERIES + 1, dtype=np.int32)[None],
        "context": np.zeros(1, np.int32),
        "block_tables": np.zeros((1, 1), np.int32),
        "k_pages": pool,
        "v_pages": pool,
    }
    found: np.ndarray = session.run(["hidden"], feeds)[0][0]
    return found


def run_export(graph: Path, embeddings: np.ndarray, directory: Path) -> np.ndarray:
    """The export itself, every tensor rounded as a GPU would."""
    model = load_graph(graph)
    emulate(model, "fp16")
    ir.save(model, directory / "emulated.onnx")
    return run(directory / "emulated.onnx", embeddings)


def least_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / norms).min())


def test_sums_beyond_float16_are_right_in_a_float16_export(tmp_path: Path) -> None:
    graph, x, expected, peak = outlier_model(tmp_path, 4e4)
    assert 65_504 < peak < 1e5
    assert least_cosine(run_export(graph, x, tmp_path), expected) > 0.999
    # And in engines that are made of it.
    assert least_cosine(run(emulated_graph(graph, "fp16", tmp_path), x), expected) > 0.999


def test_products_beyond_float16_need_engines_in_bfloat16(tmp_path: Path) -> None:
    """What one matrix product gives must fit the type of products; a float16 export can be built in bfloat16."""
    graph, x, expected, peak = outlier_model(tmp_path, 9e4)
    assert peak > 1.5e5
    assert not np.isfinite(run_export(graph, x, tmp_path)[0]).any()
    assert least_cosine(run(emulated_graph(graph, "bf16", tmp_path), x), expected) > 0.99
