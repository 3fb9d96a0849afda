"""Memory of engines: estimates against real builds of TensorRT-RTX, the build configs of the SDK, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import FakeTensorRT
from tests.support.seven_billion import SEVEN_BILLION, WITHOUT_TENSORRT, bundle_of_seven_billion, plan_of
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle, open_bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, TokenizerConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.engines.memory_plan import RESERVED, GraphMemory, MemoryPlan, memory_plans, require_fit
from tokenflow_sdk.engines.profiles import images_at_once
from tokenflow_sdk.errors import EngineBuildError


@pytest.mark.parametrize(
    ("kind", "graph", "batch"),
    [
        ("tokenizer", "semantic", 8),
        ("generator", "sample", 8),
        pytest.param("tokenizer", "decode", 8, marks=pytest.mark.slow),
        pytest.param("tokenizer", "encode", 8, marks=pytest.mark.slow),
    ],
)
def test_estimates_are_near_what_tensorrt_says(kind: str, graph: str, batch: int, tmp_path: Path) -> None:
    """And a plan takes TensorRT's figures once the engine is there."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux and Windows on x86-64")
    bundle = Bundle.open(find_bundle("tiny", kind), TokenizerConfig if kind == "tokenizer" else GeneratorConfig)
    build_config = BuildConfig(targets=("sm89",), batch=(1, 1, batch))
    (job,) = (job for job in engine_jobs(bundle, build_config, trt) if job.key.graph == graph)
    cache = EngineCache(tmp_path)
    estimate = only(memory_plans([job], cache))
    assert not estimate.measured
    job.run(trt, cache)
    truth = only(memory_plans([job], cache))
    assert truth.measured
    assert 0.8 <= estimate.scratch / truth.scratch <= 1.5
    assert 0.9 <= estimate.weights / truth.weights <= 1.1
    assert estimate.buffers == truth.buffers


def only(plans: list[MemoryPlan]) -> GraphMemory:
    ((memory,),) = (plan.graphs for plan in plans)
    return memory


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Bundle[GeneratorConfig]:
    return bundle_of_seven_billion(tmp_path_factory.mktemp("7b"))


@pytest.mark.parametrize(("name", "images"), [("l4", 4), ("rtx4090", 4), ("h100", 8), ("jetson-orin", 2)])
def test_build_configs_fit_the_released_model(name: str, images: int, seven_billion: Bundle[GeneratorConfig]) -> None:
    """With as many pictures at once as they say, and 1.5 GB left for the tokenizer that decodes them."""
    build_config = BuildConfig.from_file(name)
    assert images_at_once(SEVEN_BILLION, build_config) == images
    plan = plan_of(seven_billion, build_config)
    assert 12.9e9 < plan.parts["weights"] < 13.9e9
    pages = build_config.pages or SEVEN_BILLION.default_pages()
    assert plan.pool == pages * 2 * PAGE_SIZE * 32 * 4096 * 2
    require_fit(plan, int(build_config.memory_gb * 1e9 - 1.5e9))


def test_a_plan_that_exceeds_the_gpu_is_refused_with_what_to_lower(seven_billion: Bundle[GeneratorConfig]) -> None:
    plan = plan_of(seven_billion, BuildConfig())
    with pytest.raises(
        EngineBuildError, match=r"for sm89 take 2\d\.\d GB .*pages 5\.6.*the GPU has 24\.0 GB.*--pages.*--batch-limit"
    ):
        require_fit(plan, 24 * 10**9)
    with pytest.raises(EngineBuildError, match="GPU with more memory.*--weights int4"):
        require_fit(plan, 12 * 10**9)
    tokenizer = MemoryPlan("sm86", (GraphMemory("decode", 10**9, 10**9, 10**9, True),), 0)
    assert tokenizer.total == 3 * 10**9 + RESERVED
    require_fit(tokenizer, tokenizer.total)
    with pytest.raises(EngineBuildError, match=r"4\.0 GB of GPU memory \(weights 1\.0 \+ scratch 1\.0.*Lower --batch-limit\."):
        require_fit(tokenizer, tokenizer.total - 1)


def test_the_largest_profile_decides(seven_billion: Bundle[GeneratorConfig]) -> None:
    jobs = list(engine_jobs(seven_billion, BuildConfig(targets=("sm86", "sm89"), pages=341), WITHOUT_TENSORRT))
    whole = memory_plans(jobs, EngineCache(Path("no such cache")))
    assert [plan.target for plan in whole] == ["sm86,sm89"]
    for job, memory in zip(jobs, whole[0].graphs, strict=False):
        assert len(job.profiles) == 3
        alone = [only(memory_plans([replace(job, profiles=(profile,))], EngineCache(Path("none")))) for profile in job.profiles]
        assert memory.scratch == max(one.scratch for one in alone) > min(one.scratch for one in alone)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_graph_of_every_kind_has_a_plan(
    precision: Any, mini_bundle: Path, mini_generator: Path, mini_understander: Path
) -> None:
    """With the pool once, in the engine's type, and the transformer's new keys and values in buffers."""
    for path in (mini_bundle, mini_generator, mini_understander):
        bundle = open_bundle(path)
        build_config = BuildConfig(targets=("sm89",), precision=precision, pages=20)
        (plan,) = memory_plans(engine_jobs(bundle, build_config, WITHOUT_TENSORRT), EngineCache(path / "none"))
        assert [graph.graph for graph in plan.graphs] == list(bundle.graphs)
        config = bundle.config
        values = 20 * 2 * PAGE_SIZE * config.layers * config.kv_heads * config.head_dim if "transformer" in bundle.graphs else 0
        assert plan.pool == values * (2 if precision == "fp16" else 4)
        assert all(graph.weights > 0 and graph.buffers > 0 for graph in plan.graphs)


def test_the_command_line_plans_before_it_builds(
    machine: tuple[FakeCuda, FakeTensorRT], mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda, trt = machine
    cuda.memory = 2 * 10**9
    words = ["build", str(mini_bundle), "--backend", "tensorrt"]
    assert main([*words, "--plan"]) == 0
    assert capsys.readouterr().out.count("estimated") == 4
    assert main([*words, "--memory-gb", "0.9"]) == 2
    assert "the GPU has 0.9 GB" in " ".join(capsys.readouterr().err.split())
    cuda.memory = 10**9
    assert main(words) == 2
    assert trt.builds == []
    assert main([*words, "--memory-gb", "2"]) == 0
    assert len(trt.builds) == 4
    capsys.readouterr()
    assert main(["build", str(mini_bundle), "--config", "cpu", "--plan"]) == 2
    assert "no plan" in capsys.readouterr().err


def test_info_shows_the_memory_of_engines(machine, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    cache = EngineCache()
    for job in engine_jobs(bundle, BuildConfig("tensorrt"), machine[1]):
        with cache.building(job.key):
            pass
        cache.put(job.key, b"engine", job.build_config.to_json(), {"weights_bytes": 10**9, "activation_bytes": 2 * 10**9})
    assert main(["info", str(mini_bundle)]) == 0
    assert "13.0 GB of GPU memory (weights 4.0 + scratch 8.0" in " ".join(capsys.readouterr().out.split())
