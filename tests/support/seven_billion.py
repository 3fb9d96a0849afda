"""The released text-to-image model, of 7 billion parameters, as far as planning its memory needs it: without its weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from tests.passes.test_attention import GEOMETRIES
from tests.support.fakes import fake_bundle
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.paged_graph import transformer_shapes, transformer_spec
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.onnx_export import export_graph
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.engines.memory_plan import GraphMemory, MemoryPlan, memory_plans

WITHOUT_TENSORRT = cast(
    Any,
    SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__="1.7",
        ComputeCapability=SimpleNamespace(SM75=1, SM80=1, SM86=1, SM87=1, SM89=1, SM90=1, SM120=1),
    ),
)
SEVEN_BILLION = GeneratorConfig(
    width=4096,
    layers=32,
    kv_heads=32,
    head_dim=128,
    patch_nums=(1, 2, 4, 6, 8, 10, 12, 14, 16),
    codebook_sha256="ab" * 32,
    tokenizer_variant="clipb_256",
    tokenizer="",
    text_size=32_066,
    image_token_start=32_000,
    bos_id=1,
    image_start_ids=(29871, 32_000 + 32_768),
    max_prompt=128,
    negative_prompt="bad",
    preset="fast",
    cfg_scale=7.5,
    codebook_size=32_768,
)
"""The released text-to-image model."""


def layers_graph(path: Path, geometry: TransformerConfig = GEOMETRIES["generator"]) -> GraphEntry:
    """Export layers of a quarter of the width into a directory as `transformer.onnx`."""
    shapes = transformer_shapes(geometry)
    directory = cast(HfDirectory, SimpleNamespace(tensor=lambda key: torch.zeros(shapes[key])))
    with torch.inference_mode():
        return export_graph(transformer_spec(directory, geometry, FULL_PRECISION), path)


def bundle_of_seven_billion(path: Path) -> Bundle[GeneratorConfig]:
    """The released model's bundle with its inputs and outputs as they are. Of its graphs it has the two that work in memory,
    each a small one of the same form: a layer of a quarter of the width, and the `sample` of an eighth of the codes.
    """
    layer = layers_graph(path)
    tiny = Bundle.open(find_bundle("tiny", "generator"), GeneratorConfig)
    shutil.copy(tiny.graph_path("sample"), path)
    graphs = {
        "transformer": with_sizes(layer, {1: 32, 8: 32, 1024: 4096}),
        "sample": with_sizes(tiny.graph("sample"), {256: 4096, 4096: 32_768}),
    }
    return replace(
        cast(Any, fake_bundle()), path=path, config=SEVEN_BILLION, graphs=graphs, assets={"reference": layer.files[0]}
    )


def with_sizes(entry: GraphEntry, sizes: Mapping[int | str, int]) -> GraphEntry:
    """A small graph's entry with the sizes of the whole model."""

    def resized(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(sizes.get(dim, dim) for dim in spec.shape))

    return replace(entry, inputs=tuple(map(resized, entry.inputs)), outputs=tuple(map(resized, entry.outputs)))


def plan_of(bundle: Bundle[GeneratorConfig], build_config: BuildConfig) -> MemoryPlan:
    """With the memory that layers share one after another, which is proportional to the width; that of `sample` grows with the
    number of codes, or less. Weights are counted."""
    jobs = engine_jobs(bundle, build_config.with_overrides(targets=("sm89",)), WITHOUT_TENSORRT)
    (plan,) = memory_plans(jobs, EngineCache(Path("no such cache")))
    transformer, sample = plan.graphs
    width = SEVEN_BILLION.width
    layers = 32 * (4 * width * width + 3 * width * 11_008)
    graphs = (
        replace(transformer, weights=2 * layers, scratch=4 * transformer.scratch),
        replace(sample, weights=2 * SEVEN_BILLION.codebook_size * width, scratch=8 * sample.scratch),
        GraphMemory("embed_text", 2 * SEVEN_BILLION.text_size * width, 0, 0, False),
    )
    return replace(plan, graphs=graphs)
