from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses import FakeTensorMode

from tests.support.mini_generator import GROUPED, export_quietly, generator_shapes, tokenizer_bundle, write_checkpoint
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.paged_graph import transformer_spec
from tokenflow_export.tracing.onnx_export import GraphSpec, export_graph
from tokenflow_export.tracing.weight_quantization import (
    FULL_PRECISION,
    INT4_BLOCK,
    ExportPrecision,
    quantize_blocks,
    quantize_columns,
    use_matmul,
)
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.errors import ArgumentError, CheckpointError, ParityError
from tokenflow_sdk.generation.scale_loop import ScaleLoop
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.sampling import SamplingParams
from tokenflow_sdk.model.transformer import PagedTransformer

SIDES = (1, 2)
PRECISIONS = [
    ExportPrecision("fp16"),
    ExportPrecision("fp32", "int8"),
    ExportPrecision("fp32", "int4"),
    ExportPrecision("fp16", "int4"),
]

matrices = arrays(np.float32, (2 * INT4_BLOCK, 3), elements=st.floats(-8, 8, width=32))


@given(matrices)
def test_columns_are_within_half_a_step(weight: np.ndarray) -> None:
    q, scale = quantize_columns(weight)
    assert q.dtype == np.int8 and np.abs(q.astype(int)).max() <= 127
    assert (np.abs(q * scale - weight) <= scale / 2 * 1.001).all()


@given(matrices)
def test_blocks_are_within_a_step_and_exact_at_their_largest_value(weight: np.ndarray) -> None:
    q, scale = quantize_blocks(weight)
    steps = np.repeat(scale, INT4_BLOCK, axis=0)
    restored = q.astype(np.float32) * steps
    assert (np.abs(restored - weight) <= np.abs(steps) * 1.001).all()
    blocks, again = weight.reshape(2, INT4_BLOCK, 3), restored.reshape(2, INT4_BLOCK, 3)
    np.testing.assert_allclose(np.abs(again).max(axis=1), np.abs(blocks).max(axis=1), rtol=1e-6, atol=1e-11)


def test_int8_in_half_precision_is_refused() -> None:
    with pytest.raises(ArgumentError, match="computes in float32"):
        ExportPrecision("fp16", "int8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("precision") / "hf"
    return write_checkpoint(directory, GROUPED, generator_shapes(GROUPED, 44, 500, SIDES), 40, 500, shards=2)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[str, Bundle[GeneratorConfig]]:
    tokenizer = tokenizer_bundle(checkpoint.parent / "tok", SIDES, 500)
    found = {}
    for precision in (FULL_PRECISION, *PRECISIONS):
        out = export_quietly(checkpoint, tokenizer, checkpoint.parent / precision.name.replace(" ", "_"), precision)
        found[precision.name] = Bundle.open(out, GeneratorConfig)
    return found


def test_no_weight_is_read_before_the_graph_is_written_and_then_one_at_a_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = HfDirectory(checkpoint)
    read: list[str] = []
    real = HfDirectory.tensor
    monkeypatch.setattr(HfDirectory, "tensor", lambda self, key: read.append(key) or real(self, key))
    from tokenflow_export.checkpoints.architecture import read_architecture
    from tokenflow_export.tracing.onnx_export import _trace

    model = _trace(transformer_spec(directory, read_architecture(directory, "output"), ExportPrecision("fp32", "int8")))
    assert not [key for key in read if "proj" in key]
    lazy = [value for value in model.graph.initializers.values() if "proj.weight" in str(value.name)]
    assert len(lazy) == 7
    assert all(isinstance(value.const_value, ir.LazyTensor) for value in lazy)


def test_sizes_and_types(bundles: dict[str, Bundle[GeneratorConfig]]) -> None:
    """Matrices in the bits asked for and nothing outside ONNX; pages in the type of the arithmetic."""
    matrix_count = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    kinds = {
        "fp32": (onnx.TensorProto.FLOAT, np.float32),
        "fp16": (onnx.TensorProto.FLOAT16, np.float16),
        "int8 in fp32": (onnx.TensorProto.INT8, np.float32),
        "int4 in fp32": (onnx.TensorProto.INT4, np.float32),
        "int4 in fp16": (onnx.TensorProto.INT4, np.float16),
    }
    for name, (kind, pages) in kinds.items():
        entry = bundles[name].graph("transformer")
        graph = onnx.load(bundles[name].path / entry.files[0].name).graph
        found = sum(
            int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == kind and len(tensor.dims) == 2
        )
        assert found >= matrix_count
        assert {np.dtype(spec.dtype) for spec in entry.inputs if spec.name.endswith("pages")} == {np.dtype(pages)}
        assert {spec.dtype for spec in entry.inputs if spec.name == "embeddings"} == {"float32"}
        assert {node.domain for node in graph.node} == {""}
        assert bundles[name].provenance["precision"] == name


def test_every_8_bit_product_has_zero_points_and_shares_none_for_its_weight(
    bundles: dict[str, Bundle[GeneratorConfig]],
) -> None:
    """Without one onnxruntime before 1.30 aborts on x86; with a shared one no version opens the graph there."""
    graph = onnx.load(bundles["int8 in fp32"].graph_path("transformer")).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node.input for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == len({inputs[3] for inputs in products}) == 7
    assert all(values[inputs[3]].dtype == np.int8 and values[inputs[3]] == 0 for inputs in products)


def test_agreement_is_measured_and_orderly(bundles: dict[str, Bundle[GeneratorConfig]]) -> None:
    errors = {name: bundle.parity["hidden_error"] for name, bundle in bundles.items()}
    assert errors["fp32"] < 1e-5 < errors["fp16"] < errors["int8 in fp32"] < errors["int4 in fp32"]
    assert bundles["fp32"].parity["same_code"] == 1
    assert bundles["int8 in fp32"].parity["hidden_cosine"] > 0.999


def paged(bundle: Bundle[GeneratorConfig]) -> PagedTransformer:
    entry, c = bundle.graph("transformer"), bundle.config
    session = OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu"))
    return PagedTransformer(session, c.layers, c.kv_heads, c.head_dim, pages=24, page_size=4)


@pytest.mark.parametrize("name", ["fp32", "int8 in fp32"])
def test_a_row_is_the_same_in_any_batch(bundles: dict[str, Bundle[GeneratorConfig]], name: str) -> None:
    transformer = paged(bundles[name])
    # Rows of very different size: a scale that a batch shared would spoil the small ones.
    x = np.random.default_rng(0).standard_normal((4, 6, 64)).astype(np.float32) * np.array([1, 0.1, 10, 1])[:, None, None]
    x = x.astype(np.float32)
    positions = np.tile(np.arange(6, dtype=np.int32), (4, 1))
    visible = positions + 1
    tables = [PageTable(transformer.pool) for _ in range(4)]
    together = transformer.step(x, positions, visible, tables, [0] * 4, width=2).hidden
    for row in range(4):
        one = slice(row, row + 1)
        alone = transformer.step(x[one], positions[one], visible[one], tables[one], [0], width=2).hidden
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8 in fp32", "int4 in fp32", "int4 in fp16"])
def test_a_batch_of_eight_draws_what_each_request_draws_alone(bundles: dict[str, Bundle[GeneratorConfig]], name: str) -> None:
    bundle, transformer = bundles[name], paged(bundles[name])
    sessions = {
        graph: OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu"))
        for graph, entry in bundle.graphs.items()
    }
    loop = ScaleLoop(bundle.config, sessions, transformer, np.load(bundle.path / "codebook.npy"))
    prefixes = [loop.prefill(range(2, 4 + i)) for i in range(2)]

    def drawn(seeds: list[int]) -> list[list[int]]:
        pictures = [loop.start(SamplingParams(seed=seed), 0, *prefixes) for seed in seeds]
        while pictures[0].scale < len(SIDES):
            loop.sample_pass(pictures)
        for picture in pictures:
            picture.release()
        return [np.concatenate(picture.codes).tolist() for picture in pictures]

    together = drawn(list(range(8)))
    assert len({tuple(codes) for codes in together}) > 1
    assert together == [drawn([seed])[0] for seed in range(8)]


def test_int4_needs_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before any graph is traced."""
    monkeypatch.delattr("tokenflow_export.language_model.bundle_writer.export_graph")
    sizes = GROUPED | {"intermediate_size": 90}
    checkpoint = write_checkpoint(tmp_path / "hf", sizes, generator_shapes(sizes, 44, 500, SIDES), 40, 500)
    tokenizer = tokenizer_bundle(tmp_path / "tok", SIDES, 500)
    with pytest.raises(ArgumentError, match="90 inputs, which is no multiple of 32"):
        export_quietly(checkpoint, tokenizer, tmp_path / "out", ExportPrecision("fp32", "int4"))
    assert not (tmp_path / "out").exists()


def test_a_graph_that_is_wrong_in_low_precision_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tokenflow_export.tracing.weight_quantization.quantize_columns",
        lambda w: (np.ones(w.shape, np.int8), np.ones(w.shape[1], np.float32)),
    )
    tokenizer = tokenizer_bundle(tmp_path / "tok", SIDES, 500)
    with pytest.raises(ParityError, match="cosine of at least 0.98 is accepted in int8"):
        export_quietly(checkpoint, tokenizer, tmp_path / "out", ExportPrecision("fp32", "int8"))
    assert not (tmp_path / "out").exists()


class Half(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 3, bias=False, dtype=torch.float16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("value", [65504.0, 1e5])
def test_weights_that_float16_cannot_hold_are_named(value: float, tmp_path: Path) -> None:
    """Those that are read when a graph is written, and tables that a graph is traced with."""
    weight, half = torch.full((2, 3), value), ExportPrecision("fp16")
    with FakeTensorMode():
        graph = Half()
        use_matmul(graph)
        x = torch.zeros(2, 2, dtype=torch.float16)
    spec = GraphSpec("half", graph, {"x": (x, {})}, ("y",), lambda _: weight.numpy())
    if value > 65504:
        with pytest.raises(CheckpointError, match="layer.weight has values that are too large for float16"):
            export_graph(spec, tmp_path)
        with pytest.raises(CheckpointError, match="table has values that are too large for fp16"):
            half.cast(weight, "table")
    else:
        export_graph(spec, tmp_path)
        assert torch.equal(half.cast(weight, "table"), weight.half())
    assert torch.equal(ExportPrecision("fp32").cast(weight, "table"), weight)
