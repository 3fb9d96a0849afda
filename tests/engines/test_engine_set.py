"""Tokenizer and Generator on TensorRT engines, from building to certificates and changing over, on a machine that is not there.

tests/support/fake_gpu.py pretends to be TensorRT and CUDA; the SDK's side of calls, the cache and the comparisons are real.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.support.mini import bundled_tokenizer, store_ranges
from tests.support.on_engines import FP32, IMAGES, certificate_of, on_engines, records
from tokenflow_export.precision.calibrate import magnitudes
from tokenflow_export.precision.search import store
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.errors import (
    ArgumentError,
    BackendError,
    CorruptBundleError,
    EngineBuildError,
    EngineRefusedError,
    MissingPackageError,
    OutputError,
)
from tokenflow_sdk.generation.scale_loop import ImageState, ScaleLoop
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR


def test_a_tokenizer_on_engines_gives_the_same(machine, mini_bundle: Path, tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode_array(IMAGES)
    with on_engines(mini_bundle, batch_limit=3, execution_contexts=2, cuda_graphs=True) as engines:
        np.testing.assert_array_equal(engines.encode_array(IMAGES), expected)
        # onnxruntime computes upsampling otherwise (passes/cpu.py), with other roundings.
        difference = np.subtract(engines.decode_array(expected), tokenizer.decode_array(expected), dtype=int)
        assert np.abs(difference).max() <= 1
        assert engines.device == "cuda:0"
        assert engines.wait_for_engines()
    assert sorted(machine[1].builds) == ["decode", "encode", "features", "semantic"]
    for record in records():
        assert certificate_of(record)["failures"] == []
        assert min(certificate_of(record)["figures"]["agreement"]) == 1
    with on_engines(mini_bundle) as again:
        again.encode_array(IMAGES[:1])
    assert len(machine[1].builds) == 4


def test_half_precision_engines_pass_by_their_own_tolerances(machine, mini_bundle: Path, tokenizer: Tokenizer) -> None:
    with on_engines(mini_bundle, build_config=BuildConfig(batch=(1, 1, 2))) as engines:
        found = engines.encode_array(IMAGES[:2])
    figures = certificate_of(records()[0])["figures"]
    assert figures["decode_psnr"] > 45
    assert 0 < figures["semantic_error"] < 0.1
    assert (found == tokenizer.encode_array(IMAGES[:2])).mean() > 0.9


@pytest.mark.parametrize(("graph", "words"), [("decode", "decoded pictures agree to"), ("encode", "codes agree|flipped")])
def test_an_engine_that_computes_something_else_is_refused(machine, graph: str, words: str, mini_bundle: Path) -> None:
    machine[1].broken.add(graph)
    for _ in range(2):
        with pytest.raises(
            EngineRefusedError, match=rf"fp32 engines of clip.* on sm89 is refused.*({words}).*precision-search"
        ):
            on_engines(mini_bundle)
    assert len(machine[1].builds) == 4
    (certificate,) = {json.dumps(certificate_of(record)) for record in records()}
    assert json.loads(certificate)["failures"]
    machine[1].broken.clear()
    engines = Engines(Bundle.open(mini_bundle, TokenizerConfig), FP32)
    assert engines.recertify().passed
    assert engines.prepare(build=False).passed


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_decoder_in_8_bits_is_judged_by_its_own_bar(machine, dtype, tmp_path: Path) -> None:
    """Ranges a quarter as wide as they should be are refused, and engines of other build configs are untouched by it."""
    right, wrong = (bundled_tokenizer(tmp_path / name) for name in ("right", "wrong"))
    bundle = Bundle.open(right, TokenizerConfig)
    found = magnitudes(bundle, TokenizerReference.load(bundle).code_indices, (1.0,), ProgressSteps(Console(quiet=True)))
    build_config = BuildConfig("tensorrt", decoder=dtype, batch=(1, 1, 1))
    passed = Engines(store_ranges(right, {name: float(row[0]) for name, row in found.items()}), build_config).prepare()
    assert passed.figures["decode_psnr"] > EIGHT_BIT_PSNR
    assert min(passed.figures["agreement"]) > 0.975
    with pytest.raises(EngineRefusedError, match=r"refused: decoded pictures agree to .*without --decoder"):
        Engines(store_ranges(wrong, {name: float(row[0]) / 4 for name, row in found.items()}), build_config).prepare()
    assert {record["key"]["precision"].partition(" (")[0] for record in records()} == {f"fp16, {dtype} decoder"}
    assert Engines(Bundle.open(right, TokenizerConfig), build_config).prepare(build=False).passed
    assert len(Engines(bundle, BuildConfig("tensorrt", batch=(1, 1, 1))).missing()) == 4


def test_a_decoder_in_8_bits_needs_ranges(machine, mini_bundle: Path, bundle_copy: Path, capsys) -> None:
    words = ["build", str(mini_bundle), "--backend", "tensorrt", "--decoder", "int8"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "does not say which magnitudes its decoder reads" in error
    assert f"tokenflow export calibrate {mini_bundle} --images photos/" in error
    with pytest.raises(EngineBuildError, match="cannot be built in fp8"):
        on_engines(mini_bundle, build_config=BuildConfig("tensorrt", decoder="fp8"))
    with Tokenizer.from_pretrained(mini_bundle, build_config=BuildConfig(decoder="int8")) as tokenizer:
        tokenizer.load("features")
        assert tokenizer.device == "cpu"
    bundle = store_ranges(bundle_copy, 4.0)
    machine[0].capability = (8, 6)
    with pytest.raises(EngineBuildError, match=r"sm86 has no fp8 arithmetic; GPUs from sm89 on have.*--decoder int8"):
        Engines(bundle, BuildConfig("tensorrt", decoder="fp8"))
    for content, kind, words_ in (
        ({}, CorruptBundleError, "no list of magnitudes"),
        ({"int8": {"decode": []}}, CorruptBundleError, "no list of magnitudes"),
        ({"int8": {"decode": {"a": -1}}}, CorruptBundleError, "not above 0"),
        ({"int8": {"decode": {}}}, EngineBuildError, "No convolution of .* may be computed in int8"),
    ):
        store(bundle, "ranges", content, {})
        with pytest.raises(kind, match=words_):
            Engines(Bundle.open(bundle_copy, TokenizerConfig), BuildConfig("tensorrt", decoder="int8"))


def test_a_generator_has_no_such_decoder(machine, mini_generator: Path) -> None:
    build_config = BuildConfig("tensorrt", decoder="int8")
    jobs = Engines(Bundle.open(mini_generator, GeneratorConfig), build_config).jobs
    assert {job.key.precision for job in jobs.values()} == {"fp16"}


def test_nothing_is_built_where_that_was_ruled_out(machine, mini_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"no engine yet for encode, fp32, sm89.*tokenflow build .* --backend tensorrt"):
        on_engines(mini_bundle, build=False)
    assert machine[1].builds == []


def test_engines_that_do_not_fit_the_gpu_are_not_built(machine, mini_bundle: Path) -> None:
    """By the memory of the GPU, or of the one that the build config names. A cache that has them is used."""
    machine[0].memory = 1_050_000_000
    with pytest.raises(EngineBuildError, match=r"The engines for .* take 1\.\d GB.*the GPU has 1\.1 GB\. Lower --batch"):
        on_engines(mini_bundle)
    machine[0].memory = 2**33
    with pytest.raises(EngineBuildError, match=r"the GPU has 0\.5 GB"):
        on_engines(mini_bundle, build_config=FP32.with_overrides(memory_gb=0.5))
    assert machine[1].builds == []
    on_engines(mini_bundle).close()
    on_engines(mini_bundle, build_config=FP32.with_overrides(memory_gb=0.5)).close()


@pytest.mark.parametrize("damage", ["cut", "foreign", "version"])
def test_stale_engines_are_built_again_and_never_loaded(machine, damage: str, mini_bundle: Path) -> None:
    on_engines(mini_bundle).close()
    for path in EngineCache().directory.glob("*.engine"):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "foreign":
            path.write_bytes(path.read_bytes()[:-7] + b"another")
    if damage == "version":
        machine[1].__version__ = "12.0"
    with on_engines(mini_bundle) as again:
        again.encode_array(IMAGES[:1])
    assert len(machine[1].builds) == 8


def test_engines_are_built_on_the_gpu_that_they_are_for(machine, mini_bundle: Path) -> None:
    machine[0].gpus = 2
    with on_engines(mini_bundle, device="cuda:1") as tokenizer:
        tokenizer.encode_array(IMAGES[:1])
        assert tokenizer.device == "cuda:1"
    assert machine[1].built_on == [1] * 4
    assert machine[0].current == 0


def test_a_generator_on_engines_draws_the_same(machine, mini_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And captures one CUDA graph for each shape; later requests like the first only launch them, in few calls a step."""
    cuda, trt = machine
    steps: list[dict[str, int]] = []

    def counted(loop: ScaleLoop, images: Sequence[ImageState]) -> None:
        cuda.calls.clear()
        sample_pass(loop, images)
        steps.append(dict(cuda.calls))

    sample_pass = ScaleLoop.sample_pass
    with Generator.from_pretrained(mini_generator, backend="onnxruntime") as generator:
        expected = generator.generate("w3 w5", seed=7, n=3, preset="paper")
        single = generator.generate("w7", seed=1, preset="fast")
    build_config = BuildConfig(precision="fp32", batch=(1, 1, 4), pages=70)
    with Generator.from_pretrained(
        mini_generator, backend="tensorrt", build_config=build_config, cuda_graphs=True
    ) as generator:
        assert generator.device == "cuda:0"
        cuda.captures = 0
        for _ in range(4):
            before, cuda.launches, trt.runs, steps[:] = cuda.captures, 0, Counter(), []
            with monkeypatch.context() as patch:
                patch.setattr(ScaleLoop, "sample_pass", counted)
                found = generator.generate("w3 w5", seed=7, n=3, preset="paper")
        scales = len(generator.bundle.config.patch_nums)
        # The embeddings and the transformer's step of each scale and of the prompt, and each scale's passes.
        assert before == 2 * scales + 3 * (scales - 1) + 1
        assert (cuda.captures, cuda.launches) == (before, sum(trt.runs.values()))
        # Six rows. Pages that images share with their prompt are copied one by one at the first scale that is stored.
        copied = [step.pop("cudaMemcpy2DAsync", 0) for step in steps]
        assert [sum(step.values()) < 20 for step in steps] == [True] * len(steps)
        assert [step.get("cuLaunchKernel", 0) for step in steps].count(2) == scales - 2
        assert max(copied) <= 2 * 6
        assert sum(copied[2:]) == 0
        assert [codes.indices.tolist() for codes in found.codes] == [codes.indices.tolist() for codes in expected.codes]
        assert generator.generate("w7", seed=1, preset="fast").codes == single.codes
        assert found.images[0].size == (64, 64)
        pool = generator._runner.model.scheduler.loop.transformer.pool
        assert pool.pages == 70
    figures = [certificate_of(record)["figures"] for record in records() if record["key"]["graph"] == "transformer"]
    assert figures[0]["same_choice"] == 1


def test_wrong_options_and_missing_packages_are_named(machine, mini_bundle: Path, mini_generator: Path, monkeypatch) -> None:
    with pytest.raises(ArgumentError, match="no backend 'tvm'.*auto, onnxruntime, openvino, tensorrt, tensorrt-rtx"):
        Tokenizer.from_pretrained(mini_bundle, backend="tvm")
    with pytest.raises(ArgumentError, match="serve_while_building=True builds TensorRT engines"):
        Tokenizer.from_pretrained(mini_bundle, serve_while_building=True)
    with pytest.raises(ArgumentError, match="execution_contexts=0 runs nothing"):
        on_engines(mini_bundle, execution_contexts=0)
    with pytest.raises(ArgumentError, match="no build config 'abacus'"):
        on_engines(mini_bundle, build_config="abacus")
    with pytest.raises(ArgumentError, match="pages of 16 tokens"):
        Generator.from_pretrained(mini_generator, tokenizer=mini_bundle, backend="tensorrt", page_size=4)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"tokenflow-sdk\[tensorrt\]"):
        on_engines(mini_bundle)


def test_a_cache_that_cannot_be_written_is_named(machine, mini_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=r"cannot be written.*TOKENFLOW_CACHE"):
        on_engines(mini_bundle)


def test_the_command_line(machine, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(mini_bundle)]) == 0
    assert "no engine built yet for encode" in capsys.readouterr().out
    assert main(["build", str(mini_bundle), "--backend", "tensorrt", "--precision", "fp16"]) == 0
    assert "certified: codes agree" in capsys.readouterr().out
    assert main(["info", str(mini_bundle)]) == 0
    assert "runs on tensorrt" in capsys.readouterr().out
    assert main(["verify", str(mini_bundle), "--backend", "tensorrt"]) == 0
    assert "certified" in capsys.readouterr().out
    assert main(["cache", "list"]) == 0
    assert "passed" in capsys.readouterr().out


FLEET = BuildConfig(targets=("sm120", "sm86", "sm89"), precision="fp32", batch=(1, 1, 2))


def rtx_tokenizer(bundle: Path, **options: object) -> Tokenizer:
    config = FLEET.with_overrides(targets=())
    return on_engines(bundle, **{"backend": "tensorrt-rtx", "build_config": config, "build": False} | options)


def test_one_engine_runs_on_a_whole_fleet(machine, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Built once, found and compared on GPUs of each target, and on no other."""
    words = ["--backend", "tensorrt-rtx", "--precision", "fp32", "--batch-limit", "2"]
    for done in ("built in", "in the cache already"):
        assert main(["build", str(mini_bundle), "--target", "sm120,sm86,sm89,sm86", *words]) == 0
        out = capsys.readouterr().out
        assert out.count(done) == 4
        assert out.count("sm86,sm89,sm120") == 4
        assert "certified" in out
    rtx = sys.modules["tensorrt_rtx"]
    for capability, architecture in (((8, 9), "sm89"), ((8, 6), "sm86")):
        machine[0].capability = capability
        for _ in range(2):
            with rtx_tokenizer(mini_bundle) as tokenizer:
                tokenizer.encode_array(IMAGES[:1])
                assert tokenizer.device == "cuda:0"
            # Also those that were compiled when it was compared are kept.
            assert len(list(EngineCache().directory.glob(f"*.{architecture}.kernels"))) == 4
        with Tokenizer.from_pretrained(mini_bundle, device="cuda:0", build=False) as tokenizer:
            assert tokenizer.load("features").device == "cuda:0"
    assert len(rtx.builds) == 4
    assert {tuple(record["certificates"]) for record in records()} == {("sm89", "sm86")}
    assert main(["cache", "list"]) == 0
    assert "sm86 passed, sm89 passed, sm120 not yet" in " ".join(capsys.readouterr().out.split())
    assert main(["info", str(mini_bundle)]) == 0
    assert "sm86,sm89,sm120" in capsys.readouterr().out
    machine[0].capability = (8, 0)
    with pytest.raises(BackendError, match="no engine yet for encode, fp32, sm80"):
        rtx_tokenizer(mini_bundle)
    with pytest.raises(BackendError, match=r"is for sm120, sm86, sm89, and GPU 0 is sm80.*add sm80 to its targets"):
        rtx_tokenizer(mini_bundle, build_config=FLEET)


def test_each_kind_of_gpu_compares_the_engine_itself(machine, mini_bundle: Path) -> None:
    """What passed on one may be refused on another; and what is refused there goes on here."""
    assert main(["build", str(mini_bundle), *["--target", "sm86,sm89", "--precision", "fp32", "--batch-limit", "2"]]) == 0
    sys.modules["tensorrt_rtx"].broken.add("decode")
    machine[0].capability = (8, 6)
    with pytest.raises(EngineRefusedError, match="on sm86 is refused"):
        rtx_tokenizer(mini_bundle)
    sys.modules["tensorrt_rtx"].broken.clear()
    machine[0].capability = (8, 9)
    rtx_tokenizer(mini_bundle).close()


def test_a_damaged_engine_never_runs(machine, mini_bundle: Path) -> None:
    """It is seen when it is loaded, in the same pass; where building was ruled out, that is an error."""
    on_engines(mini_bundle).close()
    path = next(
        EngineCache().directory / f"{job.key.digest}.engine"
        for job in Engines(Bundle.open(mini_bundle, TokenizerConfig), FP32).jobs.values()
        if job.key.graph == "features"
    )
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    codes = np.zeros((1, 30), np.int32)
    with on_engines(mini_bundle, build=False) as tokenizer, pytest.raises(BackendError, match=r"is damaged.*tokenflow build"):
        tokenizer.graphs.load("features").run({"code_indices": codes})
    with on_engines(mini_bundle) as tokenizer:
        tokenizer.graphs.load("features").run({"code_indices": codes})
    assert machine[1].builds.count("features") == 2
    assert len(machine[1].builds) == 5


def test_an_engine_of_an_earlier_layout_is_named(machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tokenflow_sdk.engines.jobs.REVISION", "1")
        on_engines(mini_bundle).close()
    with pytest.raises(BackendError, match=r"no engine yet for encode, .* \(one of layout 1 is in the cache.*tokenflow build"):
        on_engines(mini_bundle, build=False)
    on_engines(mini_bundle).close()
    machine[1].__version__ = "12.0"
    with pytest.raises(BackendError, match=r"no engine yet for encode, .* \(one of tensorrt 11.0.fake is in the cache\)"):
        on_engines(mini_bundle, build=False)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_targets_that_this_tensorrt_does_not_know(machine, backend: str, mini_bundle: Path, capsys) -> None:
    assert main(["build", str(mini_bundle), "--backend", backend, "--target", "sm86,sm90,current"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    if backend == "tensorrt":
        assert "cannot build for 'sm86', 'sm90', 'current'. Build on a machine with that GPU and without --target" in error
        return
    assert "cannot build for 'sm90', 'current'. Choose from: sm75,sm80,sm86,sm89,sm120,sm121." in error
    assert "such as sm90, are built by full TensorRT on a machine with that GPU: `--backend tensorrt`" in error
    machine[0].capability = (9, 0)
    assert main(["build", str(mini_bundle), "--backend", backend]) == 2
    assert "cannot build for 'sm90'" in capsys.readouterr().err
