"""Builds with the real TensorRT-RTX, which needs no GPU for it, and with a stand-in module where TensorRT must misbehave."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.conftest import DATA, ROOT
from tests.support.fake_cuda import Status
from tests.support.fake_gpu import install
from tests.support.mini import store_ranges
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.understanding import _head_spec
from tokenflow_export.tracing.onnx_export import export_graph
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.build import REVISION, build_engine, engine_graph
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.engines.profiles import Profile
from tokenflow_sdk.errors import ArgumentError, BackendError, EngineBuildError
from tokenflow_sdk.model.sampling import MAX_TOP_K, TIES

APIS = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "tensorrt_api").glob("*.json"))}
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "optimization": "IOptimizationProfile",
    "types": "DataType",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "settings": "IRuntimeConfig",
    "cache": "IRuntimeCache",
}


def everyday_or_slow(everyday: list[tuple[str, ...]], slow: list[tuple[str, ...]]) -> list[Any]:
    return [*everyday, *(pytest.param(*values, marks=pytest.mark.slow) for values in slow)]


# Every value is met in some build, not every combination: kernels are chosen by target and type, graphs differ by kind.
# sm121 is a DGX Spark.
TOKENIZERS = everyday_or_slow(
    [(kind, "fp16", "sm120") for kind in ("clip", "vitamin", "siglip", "tiny")],
    [
        ("tiny", "fp32", "sm120"),
        *(("clip", "fp16", "sm121"), ("vitamin", "fp16", "sm80"), ("siglip", "fp16", "sm89"), ("tiny", "fp16", "sm86")),
    ],
)
LANGUAGE_MODELS = everyday_or_slow([("fp16", "sm86"), ("fp32", "sm120")], [("fp16", "sm80"), ("fp16", "sm121")])
BUNDLED_DECODERS = everyday_or_slow(
    [("int8", "sm86"), ("fp8", "sm86"), ("fp8", "sm120")],
    [("int8", "sm80"), ("int8", "sm121"), ("fp8", "sm89")],
)
RTX_ONLY = {
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("", "CudaGraphStrategy"),
    ("", "DynamicShapesKernelSpecializationStrategy"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeCache", "serialize"),
    ("IRuntimeCache", "deserialize"),
}
"""Looked for before use: full TensorRT cannot build for another GPU, leaves CUDA graphs to its user, and compiles at build."""


def names_used() -> set[tuple[str, str]]:
    """(class or module, attribute) for everything of TensorRT that the SDK names, e.g. in `self._context.get_tensor_shape`."""
    used = set()
    for file in (
        "engines/build.py",
        "backends/tensorrt_module.py",
        "backends/tensorrt.py",
        "backends/tensorrt_context.py",
        "backends/engine_file.py",
    ):
        for node in ast.walk(ast.parse((ROOT / "tokenflow_sdk" / file).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner.lstrip("_") == "trt" and not node.attr.startswith("__"):
                used.add(("", node.attr))
            elif owner.lstrip("_") in CLASSES:
                used.add((CLASSES[owner.lstrip("_")], node.attr))
    return used


def test_every_tensorrt_name_exists_in_every_version() -> None:
    used = names_used()
    assert len(used - RTX_ONLY) >= 30
    assert ("IExecutionContext", "execute_async_v3") in used
    assert used >= RTX_ONLY
    assert len(APIS) == 3
    for version, api in APIS.items():
        wanted = used if version.startswith("api_rtx") else used - RTX_ONLY
        missing = [(owner, name) for owner, name in wanted if name not in (api[owner] if owner else api)]
        assert missing == [], version


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux and Windows on x86-64")


def build_all(trt, bundle: Bundle, build_config: BuildConfig, cache: Path) -> None:
    """Every engine of a build config, with progress; a second time they are there."""
    jobs = list(engine_jobs(bundle, build_config, trt))
    assert len(jobs) == len(bundle.graphs)
    for job in jobs:
        shares: list[float] = []
        engine, built = job.run(trt, EngineCache(cache), lambda _, share, seen=shares: seen.append(share))
        assert built
        assert engine.size > 10_000
        assert shares
        assert all(0 < share <= 1 for share in shares)
        assert job.run(trt, EngineCache(cache)) == (engine, False)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_turing_has_no_products_in_float32(trt, precision, mini_bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX knows sm75 (T4, RTX 20), but not for the codebook search, which stays in float32: a named error."""
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    with pytest.raises(EngineBuildError, match=r"cannot build encode.onnx.*SM75.*backend='onnxruntime'"):
        build_all(trt, bundle, BuildConfig(targets=("sm75",), precision=precision), tmp_path)


@pytest.mark.parametrize(("kind", "precision", "target"), TOKENIZERS)
def test_every_tokenizer_graph_builds(trt, kind: str, precision, target: str, mini_bundles, tmp_path: Path) -> None:
    bundle = Bundle.open(mini_bundles(kind), TokenizerConfig)
    build_all(trt, bundle, BuildConfig(targets=(target,), precision=precision, batch=(1, 2, 4)), tmp_path)


@pytest.mark.parametrize(("precision", "target"), LANGUAGE_MODELS)
def test_every_generator_graph_builds(trt, precision, target: str, mini_generator: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    build_all(trt, bundle, BuildConfig(targets=(target,), precision=precision, pages=64), tmp_path)


@pytest.mark.parametrize(("precision", "target"), LANGUAGE_MODELS)
def test_every_understander_graph_builds(trt, precision, target: str, mini_understander: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(mini_understander, UnderstanderConfig)
    build_all(trt, bundle, BuildConfig(targets=(target,), precision=precision, pages=64), tmp_path)


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_the_head_builds_with_a_whole_vocabulary(trt, dtype, tmp_path: Path) -> None:
    """As many tokens as Qwen2 has: TensorRT sorts and scatters the most that an answer can ask of it."""
    vocabulary, width, context = 152_064, 8, 32_768
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((vocabulary, width)).astype(np.float32))
    config = cast(UnderstanderConfig, SimpleNamespace(width=width, vocabulary=vocabulary))
    directory = cast(HfDirectory, SimpleNamespace(tensor=lambda key: weight))
    dims = {name: torch.export.Dim(name) for name in ("batch", "queries", "seen", "window")}
    with torch.inference_mode():
        entry = export_graph(_head_spec(directory, config, FULL_PRECISION, "", dims), tmp_path, lambda *_: None)
    (tmp_path / "half").mkdir()
    graph = engine_graph(tmp_path / "head.onnx", dtype, tmp_path / "half")
    profile = Profile({"batch": (1, 1, 8), "seen": (1, 64, context), "window": (1, 64, MAX_TOP_K + TIES)})
    assert len(build_engine(trt, graph, entry, [profile], ("sm89",)).plan) > vocabulary * width * 2


@pytest.mark.parametrize("target", ["sm89", *(pytest.param(target, marks=pytest.mark.slow) for target in ["sm80", "sm121"])])
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_the_bundled_model_builds(trt, kind: str, target: str, tmp_path: Path) -> None:
    """In float16, its int8 weights included."""
    bundle = Bundle.open(find_bundle("tiny", kind), TokenizerConfig if kind == "tokenizer" else GeneratorConfig)
    build_all(trt, bundle, BuildConfig(targets=(target,)), tmp_path)


@pytest.mark.parametrize(("dtype", "target"), BUNDLED_DECODERS)
def test_the_bundled_decoder_builds_in_8_bits(trt, target: str, dtype, tmp_path: Path) -> None:
    """int8 for every GPU; fp8 where there is such arithmetic, and elsewhere a refusal before anything is built."""
    path = tmp_path / "tiny"
    shutil.copytree(find_bundle("tiny", "tokenizer"), path)
    bundle = store_ranges(path, 8.0)
    build_config = BuildConfig(targets=(target,), decoder=dtype)
    if dtype == "fp8" and target in ("sm75", "sm80", "sm86"):
        with pytest.raises(EngineBuildError, match=f"{target} has no fp8 arithmetic.*--decoder int8"):
            list(engine_jobs(bundle, build_config, trt))
        return
    jobs = {job.key.graph: job for job in engine_jobs(bundle, build_config, trt)}
    engine, built = jobs["decode"].run(trt, EngineCache(tmp_path / "cache"))
    assert built
    # The weights went in as 8 bits and were not folded back to half.
    graph = engine_graph(path / "decode.onnx", "fp16", tmp_path, (), jobs["decode"].ranges)
    (weight,) = (value for name, value in ir.load(graph).graph.initializers.items() if name == "node_conv2d_4_weight_rounded")
    assert weight.const_value is not None
    assert weight.const_value.tobytes() in engine.path.read_bytes()


@pytest.mark.parametrize(("dtype", "precision"), [("int8", "fp32"), ("fp8", "bf16")])
def test_a_decoder_in_8_bits_builds_in_every_precision(trt, precision, dtype, mini_bundles, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    shutil.copytree(mini_bundles("clip"), path)
    build_config = BuildConfig(targets=("sm89",), precision=precision, decoder=dtype)
    (job,) = (job for job in engine_jobs(store_ranges(path, 8.0), build_config, trt) if job.key.graph == "decode")
    assert job.run(trt, EngineCache(tmp_path / "cache"))[1]


class FakeTrt:
    """TensorRT's shape, with one thing wrong at a time."""

    __name__, __version__ = "fake", "1.0"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
    MemoryPoolType = SimpleNamespace(WORKSPACE=0)
    BuilderFlag = SimpleNamespace(TF32=0)

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

    ProfilingVerbosity = SimpleNamespace(DETAILED=2)

    class IProgressMonitor:
        pass

    def __init__(
        self, parses: bool = True, build_config: bytes | None = b"plan", says: tuple[tuple[int, str], ...] = ()
    ) -> None:
        self.parses, self.build_config, self.says = parses, build_config, says

    def Builder(self, log):  # noqa: N802
        for severity, text in self.says:
            log.log(severity, text)
        config = SimpleNamespace(
            set_memory_pool_limit=lambda *_: None, add_optimization_profile=lambda _: None, clear_flag=lambda _: None
        )
        return SimpleNamespace(
            create_network=lambda flags: flags,
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *_: None),
            build_serialized_network=lambda network, config: self.build_config,
        )

    def OnnxParser(self, network, log):  # noqa: N802
        return SimpleNamespace(
            parse_from_file=lambda path: self.parses,
            num_errors=1,
            get_error=lambda i: SimpleNamespace(desc=lambda: "no such operator"),
        )


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeTrt(parses=False), "cannot read features.onnx: no such operator"),
        (FakeTrt(build_config=None, says=((1, "out of memory"),)), "cannot build features.onnx: out of memory"),
        (FakeTrt(build_config=None), "it does not say why"),
        (FakeTrt(says=((2, "Unused Input: mask"),)), "would ignore an input of features.onnx: Unused Input: mask"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_and_never_an_engine(fake: FakeTrt, words: str, mini_bundle: Path) -> None:
    entry = Bundle.open(mini_bundle, TokenizerConfig).graph("features")
    profile = Profile({"batch": (1, 1, 1)})
    with pytest.raises(EngineBuildError, match=words):
        build_engine(fake, mini_bundle / "features.onnx", entry, [profile], workspace=2**20)
    with pytest.raises(ArgumentError, match="cannot build for 'sm86'.*machine with that GPU"):
        build_engine(FakeTrt(), mini_bundle / "features.onnx", entry, [profile], targets=("sm86",))


def test_without_a_gpu_or_a_target_there_is_nothing_to_build_for(
    trt, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, _ = install(monkeypatch)
    cuda.status = Status(35)
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    with pytest.raises(BackendError, match="no usable GPU here.*--target sm86,sm89,sm120.*driver"):
        list(engine_jobs(bundle, BuildConfig(), trt))
    with pytest.raises(BackendError, match="no usable GPU here.*driver") as caught:
        list(engine_jobs(bundle, BuildConfig("tensorrt"), trt))
    assert "--target" not in caught.value.hint


def structure(model: ir.Model) -> list[str]:
    """A graph as text: every node with its attributes and types, in order; weights by type and shape."""
    lines = []
    for node in model.graph:
        attributes = sorted(map(str, node.attributes.values()))
        lines.append(f"{node.op_type} {attributes} {[str(value.type) for value in node.outputs]}")
    return lines + sorted(f"{value.type} {value.shape}" for value in model.graph.initializers.values())


def test_what_becomes_of_a_graph_has_a_revision(tmp_path: Path) -> None:
    """Engines in caches are told apart by it. Where this fails because a pass was changed: count REVISION up, and store what is
    found now (the message ends with it)."""
    found = {}
    for kind in ("tokenizer", "generator"):
        for path in sorted(find_bundle("tiny", kind).glob("*.onnx")):
            for dtype in ("fp16", "bf16"):
                (tmp_path / dtype).mkdir(exist_ok=True)
                model = ir.load(engine_graph(path, dtype, tmp_path / dtype))  # type: ignore[arg-type]
                text = "\n".join(structure(model))
                found[f"{path.stem} {dtype}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    stored = json.loads((DATA / "engine_graphs.json").read_text())
    assert {"revision": REVISION, "graphs": found} == stored, json.dumps({"revision": REVISION, "graphs": found}, indent=2)


def test_the_command_line(trt, mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "build",
        str(mini_bundle),
        "--target",
        "sm86",
        "--precision",
        "fp32",
        "--batch-limit",
        "2",
        "--cache",
        str(tmp_path),
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.count("built in") == 4
    assert main(words) == 0
    assert capsys.readouterr().out.count("in the cache already") == 4
    assert main(["cache", "list", "--cache", str(tmp_path)]) == 0
    assert "4 engines" in capsys.readouterr().out
    assert main(["cache", "clear", "--cache", str(tmp_path)]) == 0
    assert main(["cache", "list", "--cache", str(tmp_path)]) == 0
    assert "0 engines" in capsys.readouterr().out
    assert main(["build", str(mini_bundle), "--target", "sm90"]) == 2
    assert "cannot build for 'sm90'" in capsys.readouterr().err
    assert main(["build", str(mini_bundle), "--batch-limit", "0"]) == 2
    assert "--batch-limit 0 is no number of images" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["features", "decode"])
def test_an_engine_for_three_targets_is_about_as_large_as_for_one(trt, kind: str, tmp_path: Path) -> None:
    bundle = Bundle.open(find_bundle("tiny", "tokenizer"), TokenizerConfig)
    sizes = []
    for targets in (("sm86",), ("sm86", "sm89", "sm120")):
        (job,) = (job for job in engine_jobs(bundle, BuildConfig(targets=targets), trt) if job.key.graph == kind)
        engine, built = job.run(trt, EngineCache(tmp_path / str(len(targets))))
        assert built
        sizes.append(engine.size)
    assert sizes[1] < 1.3 * sizes[0], sizes
