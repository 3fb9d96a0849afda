"""Attention in the form that TensorRT fuses: the same numbers, and a fused kernel in every engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.conftest import DATA
from tests.support.mini_generator import GROUPED, export_quietly, generator_shapes, tokenizer_bundle, write_checkpoint
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.paged_graph import transformer_shapes, transformer_spec
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.onnx_export import export_graph
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build import build_engine, engine_graph
from tokenflow_sdk.engines.profiles import Profile
from tokenflow_sdk.passes.attention import repeat_key_value_heads

BASE = TransformerConfig(
    width=1024,
    layers=1,
    heads=8,
    kv_heads=8,
    head_dim=128,
    mlp_width=2752,
    norm_eps=1e-6,
    rope_theta=1e4,
    norm_placement="pre",
    qk_norm=False,
    qkv_bias=False,
)
GEOMETRIES = {
    "generator": replace(BASE, norm_placement="output", qk_norm=True),
    "llama": BASE,
    "qwen": replace(BASE, width=1792, heads=14, kv_heads=2, qkv_bias=True),
}
"""One layer of each released geometry: heads of 128, and Qwen2.5's seven query heads for each of keys and values."""
TARGETS = ("sm80", "sm86", "sm89", "sm120")
EVERY_DAY = (("qwen", "fp16", "sm86"), ("qwen", "bf16", "sm120"), ("generator", "fp16", "sm89"))
BUILDS = [
    pytest.param(geometry, dtype, target, marks=[] if (geometry, dtype, target) in EVERY_DAY else pytest.mark.slow)
    for geometry in GEOMETRIES
    for dtype in ("fp16", "bf16")
    for target in TARGETS
    if geometry != "llama" or (dtype, target) in (("fp16", "sm89"), ("bf16", "sm80"))  # the generator's heads are the same
]
FIGURES = json.loads((DATA / "engine_figures.json").read_text())
"""Of one layer: kernels in a step, and the megabytes it works in at 16 rows of 256 queries that see 1,056 keys."""


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One layer of a geometry as an exported graph; each is traced once."""
    made: dict[str, tuple[Path, GraphEntry]] = {}

    def get(name: str) -> tuple[Path, GraphEntry]:
        if name not in made:
            config, path = GEOMETRIES[name], tmp_path_factory.mktemp(name)
            shapes = transformer_shapes(config)
            directory = cast(HfDirectory, SimpleNamespace(tensor=lambda key: torch.full(shapes[key], 0.01)))
            with torch.inference_mode():
                made[name] = path / "transformer.onnx", export_graph(transformer_spec(directory, config, FULL_PRECISION), path)
        return made[name]

    return get


@pytest.mark.parametrize(("geometry", "dtype", "target"), BUILDS)
def test_every_engine_has_fused_attention(layer, geometry: str, dtype: Any, target: str, tmp_path: Path) -> None:
    """And no more kernels or memory than are on record, so that neither grows unnoticed."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux and Windows on x86-64")
    graph, entry = layer(geometry)
    sizes = {"batch": (1, 2, 16), "queries": (1, 64, 256), "table": (1, 25, 50), "slots": (512,) * 3, "page": (16,) * 3}
    built = build_engine(trt, engine_graph(graph, dtype, tmp_path), entry, [Profile(sizes)], (target,))
    assert built.figures["fused_attentions"] == 1
    recorded = FIGURES[geometry]
    assert built.figures["kernels"] <= recorded["kernels"]
    assert built.figures["activation_bytes"] <= recorded["activation_mb"] * 1e6
    assert 0 < built.figures["weights_bytes"] < len(built.plan)


def test_the_form_for_engines_gives_the_same_numbers(tmp_path: Path) -> None:
    """Grouped heads, in a batch with one row without a past."""
    checkpoint = write_checkpoint(tmp_path / "hf", GROUPED, generator_shapes(GROUPED, 44, 500, (1, 2)), 40, 500)
    bundle = export_quietly(checkpoint, tokenizer_bundle(tmp_path / "tok", (1, 2), 500), tmp_path / "bundle")
    model = ir.load(bundle / "transformer.onnx")
    assert repeat_key_value_heads(model) == 1
    assert repeat_key_value_heads(model) == 0
    ir.save(model, tmp_path / "repeated.onnx")
    onnx.checker.check_model(tmp_path / "repeated.onnx", full_check=True)
    rng = np.random.default_rng(0)
    heads = next(value.shape for value in model.graph.inputs if value.name == "k_pages")[2:]
    feeds = {
        "embeddings": rng.standard_normal((2, 3, 64), np.float32),
        "positions": np.tile(np.arange(3, dtype=np.int32), (2, 1)),
        "visible": np.tile(np.arange(1, 4, dtype=np.int32), (2, 1)),
        "context": np.array([0, 5], np.int32),
        "block_tables": np.array([[0], [1]], np.int32),
        "k_pages": rng.standard_normal((4, 16, *heads), np.float32),
        "v_pages": rng.standard_normal((4, 16, *heads), np.float32),
    }
    paths = (bundle / "transformer.onnx", tmp_path / "repeated.onnx")
    expected, found = (onnxruntime.InferenceSession(path).run(None, feeds) for path in paths)
    for right, value in zip(expected, found, strict=True):
        np.testing.assert_allclose(value, right, atol=1e-5)


def test_other_graphs_stay_as_they_are(mini_bundles, layer) -> None:
    """The encoders' attention, and heads that are not grouped, have the form already."""
    for path in (mini_bundles("clip") / "encode.onnx", layer("generator")[0]):
        model = ir.load(path)
        before = [node.name for node in model.graph]
        assert repeat_key_value_heads(model) == 0
        assert [node.name for node in model.graph] == before
