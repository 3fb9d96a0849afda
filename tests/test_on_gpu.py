"""What only a GPU can show: `make test-gpu`. Everything here skips, with the reason, where there is none.

With TOKENFLOW_NEED_GPU=1, which `make test-gpu` sets, it fails instead: a run that tried nothing is no success.
The same code paths run everywhere else on a GPU that is not there (tests/support/fake_gpu.py).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import pytest

from tests.conftest import DATA, ROOT
from tests.support.mini_understander import features, pool_is_clean
from tokenflow_sdk import AnswerParams, Generator, Tokenizer, Understander
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.backends.cuda_pages import CudaPages
from tokenflow_sdk.backends.session import HostPages
from tokenflow_sdk.backends.tensorrt import TensorRTSession
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS, import_tensorrt
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.hot_swap import SwappingSession
from tokenflow_sdk.errors import ArgumentError, BackendError, TokenFlowError
from tokenflow_sdk.parity.tokenizer import check_tokenizer
from tokenflow_sdk.pictures.images import psnr

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 64, 64, 3), np.uint8)
MINUTES = 60
PHOTO = ROOT / "examples" / "chelsea.jpg"
EXPECTED = np.load(DATA / "tiny_expected.npz")


pytestmark = pytest.mark.gpu


def do_without(reason: str) -> NoReturn:
    """Skip the test; fail it where a GPU and all that goes with it is needed."""
    if os.environ.get("TOKENFLOW_NEED_GPU"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Asked for before any bundle is made."""
    try:
        Cuda()
    except TokenFlowError as error:
        do_without(str(error))


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if importlib.util.find_spec(FLAVOURS[request.param]) is None:
        do_without(f"{request.param} is not installed; run `pip install {request.param}`")
    architecture = Cuda().architecture
    if request.param == "tensorrt-rtx" and not hasattr(import_tensorrt("tensorrt-rtx").ComputeCapability, architecture.upper()):
        pytest.skip(f"tensorrt-rtx does not build for {architecture}")
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "engines"))
    return str(request.param)


@pytest.fixture
def cuda_provider() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        do_without("this onnxruntime has no CUDA provider; install onnxruntime-gpu")


@pytest.fixture
def cpu(mini_bundle: Path) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        yield tokenizer


SHARE = int(os.environ.get("TOKENFLOW_TEST_SHARE", "1"))
"""By which the calls that look for leaks are divided."""


def free_memory() -> int:
    status, free, _ = Cuda().runtime.cudaMemGetInfo()
    assert int(status) == 0
    return int(free)


def run_on(flavour: str, model: Tokenizer | Generator | Understander) -> bool:
    """Whether engines of that TensorRT run every graph that is open. onnxruntime with CUDA is on `cuda:0` as well."""
    sessions = (model.graphs._sessions if isinstance(model, Tokenizer) else model._runner.model.sessions).values()
    current = [session._current if isinstance(session, SwappingSession) else session for session in sessions]
    return bool(current) and all(
        isinstance(session, TensorRTSession) and session._trt.__name__ == FLAVOURS[flavour] for session in current
    )


def check_for_leaks(call: Callable[[int], object], calls: int) -> None:
    """Memory of the GPU and of the process over three windows of calls, after everything was called that a window calls.

    Other processes come and go, and a heap settles, so what counts is the window that grew least.
    """
    calls //= SHARE
    process, grown = psutil.Process(), []
    for number in range(calls // 3):
        call(number)
    for _ in range(3):
        gc.collect()
        gpu, host = free_memory(), process.memory_info().rss
        for number in range(calls):
            call(number)
        gc.collect()
        grown.append((gpu - free_memory(), process.memory_info().rss - host))
    # Where a share of the calls is made, on a GPU that is not there, its memory is counted to the byte.
    for place, most, sizes in zip(("the GPU", "the process"), (2**21 // SHARE, 2**21), zip(*grown, strict=True), strict=True):
        assert min(sizes) < most, f"{place} lost {sizes} bytes in three times {calls} calls"


def check_that_closing_frees(use: Callable[[], object]) -> None:
    """What `use` opened, used and closed is kept, so that nothing but closing gives memory back."""
    closed = [use()]
    gc.collect()
    before = free_memory()
    closed += [use() for _ in range(20)]
    gc.collect()
    assert before - free_memory() < 2**25


@pytest.mark.parametrize("kernel", [True, False])
def test_pages_on_the_gpu_are_host_pages(kernel: bool) -> None:
    """Stored by the kernel, which every driver must take, and by copies."""
    cuda, shape, dtype = Cuda(), (3, 7, 16, 4, 32), np.dtype(np.float16)
    host, device = HostPages(shape, dtype), CudaPages(cuda, shape, dtype)
    assert device._kernel is not None
    if not kernel:
        device._kernel = None
    stream = Stream(cuda)
    for _ in range(20):
        count = int(RNG.integers(1, 60))
        places = RNG.permutation(7 * 16)[:count] if count % 2 else np.arange(5, 5 + count)
        new = RNG.standard_normal((3, 2, count, 4, 32)).astype(dtype)
        pinned, buffer = PinnedBuffer(cuda, new.nbytes), DeviceBuffer(cuda, new.nbytes)
        pinned.view(new.shape, new.dtype)[...] = new
        stream.to_device(buffer.pointer, pinned.pointer, new.nbytes)
        stream.synchronize()
        # Of two rows the second is stored.
        both = np.stack([np.full(count, -1), places]).astype(np.int32)
        host.write(new, both)
        device.write(CudaArray(cuda, buffer.pointer, new.shape, dtype, buffer), both)
        host.copy_page(2, 5)
        device.copy_page(2, 5)
        np.testing.assert_array_equal(np.asarray(device.slots), np.asarray(host.slots))
    stream.close()


@pytest.mark.usefixtures("cuda_provider")
def test_onnxruntime_on_the_gpu(cpu: Tokenizer, mini_bundle: Path, mini_generator: Path, mini_understander: Path) -> None:
    codes = cpu.encode_array(IMAGES)
    with Tokenizer.from_pretrained(mini_bundle, backend="onnxruntime", device="cuda", batch_limit=4) as gpu:
        assert (gpu.encode_array(IMAGES) == codes).mean() > 0.95
        assert psnr(gpu.decode_array(codes), cpu.decode_array(codes)) > 45
        assert gpu.device == "cuda:0"
        latent = cpu.latent(IMAGES)
        # TF32 would move it by some thousandths.
        assert np.abs(gpu.latent(IMAGES) - latent).max() < 5e-4 * np.abs(latent).max()
    with Generator.from_pretrained(mini_generator, backend="onnxruntime", device="cuda") as generator:
        first = generator.generate("w3 w5", seed=7, n=2)
        assert generator.generate("w3 w5", seed=7, n=2).codes == first.codes
        transformer = generator._runner.model.scheduler.loop.transformer
        assert isinstance(transformer._k, CudaPages)
        assert generator.device == "cuda:0"
    with Understander.from_pretrained(mini_understander, backend="onnxruntime", device="cuda") as understander:
        assert isinstance(understander._runner.model.transformer._k, CudaPages)
        assert understander.answer(features(0), "what?", max_tokens=8).token_ids


@pytest.mark.usefixtures("cuda_provider")
def test_the_bundled_model_in_onnxruntime_on_the_gpu() -> None:
    with Tokenizer.from_pretrained("tiny", backend="onnxruntime", device="cuda") as tokenizer:
        assert (np.asarray(tokenizer.encode(PHOTO)) == EXPECTED["chelsea"]).mean() > 0.99
        assert check_tokenizer(tokenizer.graphs).failures() == []
    with Generator.from_pretrained("tiny", backend="onnxruntime", device="cuda") as generator:
        first = generator.generate("a red apple", seed=7, preset="fast")
        assert generator.generate("a red apple", seed=7, preset="fast").codes == first.codes


def test_the_bundled_model_on_engines(flavour: str) -> None:
    """Half precision, by the build config that is taken where none is named; found again by `auto`."""
    with Tokenizer.from_pretrained("tiny", backend=flavour) as tokenizer:
        agreement = (np.asarray(tokenizer.encode(PHOTO)) == EXPECTED["chelsea"]).mean()
        report = check_tokenizer(tokenizer.graphs)
    assert agreement > 0.9
    assert min(report.agreement) >= 0.975
    assert report.decode_psnr >= 45
    with Tokenizer.from_pretrained("tiny") as tokenizer:
        assert run_on(flavour, tokenizer.load("features"))
    with Generator.from_pretrained("tiny", backend=flavour) as generator:
        assert generator.generate("a red apple", seed=7, preset="fast").images[0].size == (256, 256)


def test_what_was_compiled_is_kept(flavour: str, mini_bundle: Path) -> None:
    """TensorRT-RTX compiles kernels at first runs; full TensorRT has compiled at the build."""
    build_config = BuildConfig(precision="fp16", batch=(1, 1, 1))

    def kernels() -> dict[Path, tuple[bytes, int]]:
        with Tokenizer.from_pretrained(mini_bundle, backend=flavour, build_config=build_config) as tokenizer:
            tokenizer.encode_array(IMAGES[:1])
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in EngineCache().directory.glob("*.kernels")}

    kept = kernels()
    assert bool(kept) == (flavour == "tensorrt-rtx")
    # The second start found all that it needed: it had nothing to write.
    assert kernels() == kept
    for path in kept:
        path.write_bytes(b"damaged")
    mended = [data for data, _ in kernels().values() if data != b"damaged"]
    assert bool(mended) == (flavour == "tensorrt-rtx")


def test_the_application_keeps_its_gpu(flavour: str, mini_bundle: Path) -> None:
    runtime = Cuda().runtime
    last = int(runtime.cudaGetDeviceCount()[1]) - 1
    if last == 0:
        pytest.skip("there is only one GPU here")
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, device=f"cuda:{last}") as tokenizer:
        tokenizer.encode_array(IMAGES[:1])
        assert tokenizer.device == f"cuda:{last}"
        assert int(runtime.cudaGetDevice()[1]) == 0


def test_memory_that_is_not_there_is_named() -> None:
    with pytest.raises(BackendError, match=r"GPU 0 has no .* MB left .* MB are free.*batch_limit="):
        DeviceBuffer(Cuda(), 2**50)
    assert DeviceBuffer(Cuda(), 2**20).pointer


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_tokenizer_is_built_certified_and_right(flavour: str, precision, cpu: Tokenizer, mini_bundle: Path) -> None:
    build_config = BuildConfig(precision=precision, batch=(1, 2, 4))
    codes = cpu.encode_array(IMAGES)
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, build_config=build_config, batch_limit=4) as tokenizer:
        assert tokenizer.load().device == "cuda:0"
        assert run_on(flavour, tokenizer)
        for batch in (4, 1, 3):
            assert (tokenizer.encode_array(IMAGES[:batch]) == codes[:batch]).mean() > 0.9
            assert psnr(tokenizer.decode_array(codes[:batch]), cpu.decode_array(codes[:batch])) > 45
        with pytest.raises(ArgumentError, match="built for batch from 1 to 4"):
            tokenizer.graphs.load("encode").run({"images": np.concatenate([IMAGES, IMAGES])})
    for engine in EngineCache().entries():
        assert [certificate["failures"] for certificate in engine.certificates.values()] == [[]]
    with Tokenizer.from_pretrained(
        mini_bundle, backend=flavour, build_config=build_config, batch_limit=4, build=False
    ) as again:
        again.encode_array(IMAGES)


def test_lanes_and_cuda_graphs_change_nothing(flavour: str, mini_bundle: Path) -> None:
    build_config = BuildConfig(precision="fp32", batch=(1, 1, 2))
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, build_config=build_config) as plain:
        expected = [plain.encode_array(image[None]) for image in IMAGES]
    with Tokenizer.from_pretrained(
        mini_bundle, backend=flavour, build_config=build_config, execution_contexts=3, cuda_graphs=True
    ) as tokenizer:
        for _ in range(4):
            for image, codes in zip(IMAGES, expected, strict=True):
                np.testing.assert_array_equal(tokenizer.encode_array(image[None]), codes)
        found: list[bool] = []

        def work() -> None:
            for image, codes in zip(IMAGES, expected, strict=True):
                found.append(np.array_equal(tokenizer.encode_array(image[None]), codes))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 16


def test_cuda_graphs_follow_batches_that_change(flavour: str, mini_bundle: Path) -> None:
    """Other pictures in every call, so that what an earlier one left would be seen; `encode` runs twice with each."""
    build_config = BuildConfig(precision="fp32", batch=(1, 1, 2))
    calls = [np.roll(IMAGES, number, axis=0)[: 1 + number % 2] for number in range(8)]
    found: dict[bool, list[list[np.ndarray]]] = {}
    for cuda_graphs in (False, True):
        options = {"backend": flavour, "build_config": build_config, "batch_limit": 2, "cuda_graphs": cuda_graphs}
        with Tokenizer.from_pretrained(mini_bundle, **options) as tokenizer:  # type: ignore[arg-type]
            found[cuda_graphs] = [
                [tokenizer.latent(images), codes := tokenizer.encode_array(images), tokenizer.decode_array(codes)]
                for images in calls
            ]
    for plain, replayed in zip(found[False], found[True], strict=True):
        for expected, array in zip(plain, replayed, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_generator_is_built_certified_and_repeats_itself(flavour: str, precision, mini_generator: Path) -> None:
    build_config = BuildConfig(precision=precision, batch=(1, 1, 2), pages=200)
    with Generator.from_pretrained(mini_generator, backend=flavour, build_config=build_config) as generator:
        assert run_on(flavour, generator)
        first = generator.generate("w3 w5", seed=7, n=2)
        assert generator.generate("w3 w5", seed=7, n=2).codes == first.codes
        assert first.images[0].size == (64, 64)
        together = generator.generate_batch(["w3 w5", "w7", "w1 w2 w4"], seed=7, n=2)
        assert len(together) == 3
        pool = generator._runner.model.scheduler.loop.transformer.pool
        assert pool.free > pool.pages - 16
        # A picture takes a step for the prompt and one for each scale.
        check_for_leaks(lambda number: generator.generate("w3 w5", seed=number), 30)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_understander_is_built_certified_and_answers(flavour: str, precision, mini_understander: Path) -> None:
    """More questions at once than the engines take. In float32 the first tokens are those of the CPU; graphs change none."""
    params = AnswerParams(max_tokens=40, stop_ids=())
    asked = [(features(i % 2), "what? " * (1 + 20 * i)) for i in range(5)]
    with Understander.from_pretrained(mini_understander, device="cpu", backend="onnxruntime") as on_cpu:
        expected = [answer.token_ids for answer in on_cpu.answer_batch(asked, params=params)]
    build_config = BuildConfig(precision=precision, batch=(1, 1, 2), pages=200)
    penalised = replace(params, max_tokens=300, repetition_penalty=1.3, temperature=1.5, top_k=288)
    answers: dict[bool, list[tuple[int, ...]]] = {}
    for cuda_graphs in (False, True):
        with Understander.from_pretrained(
            mini_understander, backend=flavour, build_config=build_config, cuda_graphs=cuda_graphs
        ) as understander:
            assert run_on(flavour, understander)
            found = [answer.token_ids for answer in understander.answer_batch(asked, params=params)]
            assert [len(tokens) for tokens in found] == [40] * 5
            if precision == "fp32":
                assert sum(a[:5] == b[:5] for a, b in zip(found, expected, strict=True)) >= 4
            long = understander.answer(features(0), "what?", params=penalised).token_ids
            assert len(long) == 300
            assert pool_is_clean(understander)
            answers[cuda_graphs] = [*found, long]
            understander.tokenizer.close()
    assert answers[True] == answers[False]


def test_an_understander_changes_over_and_chats_go_on(flavour: str, mini_understander: Path) -> None:
    options = {"backend": flavour, "build_config": BuildConfig(precision="fp32", pages=200), "serve_while_building": True}
    with Understander.from_pretrained(mini_understander, **options) as understander:  # type: ignore[arg-type]
        chat = understander.chat(features(0))
        chat.ask("what?", max_tokens=8)
        assert understander.wait_for_engines(10 * MINUTES)
        assert run_on(flavour, understander)
        chat.ask("and?", max_tokens=8)
        assert len(chat.turns) == 2
        assert pool_is_clean(understander)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_ten_thousand_calls_leak_nothing(flavour: str, cuda_graphs: bool, mini_bundle: Path) -> None:
    """TensorRT-RTX compiles before the first window: only the batch varies, so it does that at first runs, not behind them."""
    build_config = BuildConfig(precision="fp16", batch=(1, 1, 2))
    codes = RNG.integers(0, 500, (2, 30), np.int32)
    options = {"backend": flavour, "build_config": build_config, "batch_limit": 2, "cuda_graphs": cuda_graphs}
    with Tokenizer.from_pretrained(mini_bundle, **options) as tokenizer:  # type: ignore[arg-type]
        encode, features = tokenizer.graphs.load("encode"), tokenizer.graphs.load("features")

        def call(number: int) -> None:
            # Three calls of a graph are alike, so that CUDA graphs are captured, launched and given up again and again.
            batch = 1 + number // 6 % 2
            if number % 2:
                encode.run({"images": IMAGES[:batch]})
            else:
                features.run({"code_indices": codes[:batch]})

        check_for_leaks(call, 3000)


def test_closing_a_tokenizer_gives_its_memory_back(flavour: str, mini_bundle: Path) -> None:
    build_config = BuildConfig(precision="fp16", batch=(1, 1, 4))
    codes = RNG.integers(0, 500, (1, 30), np.int32)

    def use() -> Tokenizer:
        with Tokenizer.from_pretrained(mini_bundle, backend=flavour, build_config=build_config) as tokenizer:
            for name in tokenizer.bundle.graphs:
                tokenizer.graphs.load(name).run({"images": IMAGES[:1]} if name == "encode" else {"code_indices": codes})
        return tokenizer

    check_that_closing_frees(use)


def test_closing_a_generator_gives_its_memory_back(flavour: str, mini_generator: Path) -> None:
    """Its pages are 4 MB, so that 20 pools would be seen."""
    build_config = BuildConfig(precision="fp16", batch=(1, 1, 2), pages=2000)

    def use() -> Generator:
        with Generator.from_pretrained(mini_generator, backend=flavour, build_config=build_config) as generator:
            assert generator._runner.model.transformer.page_bytes * 2000 > 2**21
            generator.generate("w3 w5", seed=7)
        generator.tokenizer.close()
        return generator

    check_that_closing_frees(use)


def test_a_cut_engine_is_built_again(flavour: str, mini_bundle: Path) -> None:
    build_config = BuildConfig(precision="fp16", batch=(1, 1, 1))
    Tokenizer.from_pretrained(mini_bundle, backend=flavour, build_config=build_config).close()
    for path in EngineCache().directory.glob("*.engine"):
        path.write_bytes(path.read_bytes()[:-100])
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, build_config=build_config) as tokenizer:
        tokenizer.encode_array(IMAGES[:1])


def test_serving_goes_on_while_engines_are_built(flavour: str, mini_bundle: Path, cpu: Tokenizer) -> None:
    build_config = BuildConfig(precision="fp32", batch=(1, 1, 1))
    options = {"backend": flavour, "build_config": build_config, "serve_while_building": True}
    with Tokenizer.from_pretrained(mini_bundle, **options) as tokenizer:  # type: ignore[arg-type]
        expected = cpu.encode_array(IMAGES[:1])
        assert (tokenizer.encode_array(IMAGES[:1]) == expected).mean() > 0.9
        assert tokenizer.wait_for_engines(10 * MINUTES)
        assert run_on(flavour, tokenizer.load())
        assert (tokenizer.encode_array(IMAGES[:1]) == expected).mean() > 0.9
