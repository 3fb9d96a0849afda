"""What only a GPU can show: `make test-gpu`. Everything here skips, with the reason, where there is none.

The same code paths run everywhere else on a GPU that is not there (tests/fake_gpu.py).
"""

from __future__ import annotations

import gc
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import DATA, ROOT
from tests.test_understander import features, pool_is_clean
from tokenflow_sdk import AnswerParams, Generator, Tokenizer, Understander
from tokenflow_sdk.backends.base import HostPages
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, CudaPages, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.engine_cache import EngineCache
from tokenflow_sdk.engine_recipe import EnginePlan
from tokenflow_sdk.errors import ArgumentError, BackendError, TokenFlowError
from tokenflow_sdk.images import psnr
from tokenflow_sdk.parity import check_parity
from tokenflow_sdk.tensorrt_module import FLAVOURS, import_tensorrt

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 64, 64, 3), np.uint8)
MINUTES = 60
PHOTO = ROOT / "examples" / "chelsea.jpg"
EXPECTED = np.load(DATA / "tiny_expected.npz")


def why_not() -> str | None:
    """What is missing to use a GPU, in words."""
    try:
        Cuda()
    except TokenFlowError as error:
        return error.message
    return None


missing = why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing is not None, reason=str(missing))]


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if importlib.util.find_spec(FLAVOURS[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    architecture = Cuda().architecture
    if request.param == "tensorrt-rtx" and not hasattr(import_tensorrt("tensorrt-rtx").ComputeCapability, architecture.upper()):
        pytest.skip(f"tensorrt-rtx does not build for {architecture}")
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "engines"))
    return str(request.param)


@pytest.fixture
def cuda_provider() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; install onnxruntime-gpu")


@pytest.fixture
def cpu(mini_bundle: Path) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        yield tokenizer


def free_memory() -> int:
    status, free, _ = Cuda().runtime.cudaMemGetInfo()
    assert int(status) == 0
    return int(free)


def test_pages_on_the_gpu_are_host_pages() -> None:
    cuda, shape, dtype = Cuda(), (3, 7, 16, 4, 32), np.dtype(np.float16)
    host, device = HostPages(shape, dtype), CudaPages(cuda, shape, dtype)
    stream = Stream(cuda)
    for _ in range(20):
        count = int(RNG.integers(1, 60))
        places = RNG.permutation(7 * 16)[:count] if count % 2 else np.arange(5, 5 + count)
        new = RNG.standard_normal((3, 2, count, 4, 32)).astype(dtype)
        pinned, buffer = PinnedBuffer(cuda, new.nbytes), DeviceBuffer(cuda, new.nbytes)
        pinned.view(new.shape, new.dtype)[...] = new
        stream.to_device(buffer.pointer, pinned.pointer, new.nbytes)
        stream.synchronize()
        host.put(new, 1, places // 16, places % 16)
        device.put(CudaArray(cuda, buffer.pointer, new.shape, dtype, buffer), 1, places // 16, places % 16)
        host.copy(2, 5)
        device.copy(2, 5)
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
        transformer = generator._running.scheduler.loop.transformer
        assert isinstance(transformer._k, CudaPages)
        assert generator.device == "cuda:0"
    with Understander.from_pretrained(mini_understander, backend="onnxruntime", device="cuda") as understander:
        assert isinstance(understander._running.transformer._k, CudaPages)
        assert understander.answer(features(0), "what?", max_tokens=8).token_ids


@pytest.mark.usefixtures("cuda_provider")
def test_the_bundled_model_in_onnxruntime_on_the_gpu() -> None:
    with Tokenizer.from_pretrained("tiny", backend="onnxruntime", device="cuda") as tokenizer:
        assert (np.asarray(tokenizer.encode(PHOTO)) == EXPECTED["chelsea"]).mean() > 0.99
        assert check_parity(tokenizer).failures() == []
    with Generator.from_pretrained("tiny", backend="onnxruntime", device="cuda") as generator:
        first = generator.generate("a red apple", seed=7, preset="fast")
        assert generator.generate("a red apple", seed=7, preset="fast").codes == first.codes


def test_the_bundled_model_on_engines(flavour: str) -> None:
    """Half precision, by the plan that is taken where none is named; found again by `auto`."""
    with Tokenizer.from_pretrained("tiny", backend=flavour) as tokenizer:
        agreement = (np.asarray(tokenizer.encode(PHOTO)) == EXPECTED["chelsea"]).mean()
        report = check_parity(tokenizer)
    assert agreement > 0.9
    assert min(report.agreement) >= 0.975
    assert report.decode_psnr >= 45
    with Tokenizer.from_pretrained("tiny") as tokenizer:
        assert tokenizer.load("features").device == "cuda:0"
    with Generator.from_pretrained("tiny", backend=flavour) as generator:
        assert generator.generate("a red apple", seed=7, preset="fast").images[0].size == (256, 256)


def test_what_was_compiled_is_kept(flavour: str, mini_bundle: Path) -> None:
    """TensorRT-RTX compiles kernels at first runs; full TensorRT has compiled at the build."""
    plan = EnginePlan(precision="fp16", batch=(1, 1, 1))
    for _ in range(2):
        with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan) as tokenizer:
            tokenizer.encode_array(IMAGES[:1])
    kept = list(EngineCache().directory.glob("*.kernels"))
    assert bool(kept) == (flavour == "tensorrt-rtx")
    for path in kept:
        path.write_bytes(b"damaged")
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan) as tokenizer:
        tokenizer.encode_array(IMAGES[:1])


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
    plan = EnginePlan(precision=precision, batch=(1, 2, 4))
    codes = cpu.encode_array(IMAGES)
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan, batch_limit=4) as tokenizer:
        assert tokenizer.load().device == "cuda:0"
        for batch in (4, 1, 3):
            assert (tokenizer.encode_array(IMAGES[:batch]) == codes[:batch]).mean() > 0.9
            assert psnr(tokenizer.decode_array(codes[:batch]), cpu.decode_array(codes[:batch])) > 45
        with pytest.raises(ArgumentError, match="built for batch from 1 to 4"):
            tokenizer._session("encode").run({"images": np.concatenate([IMAGES, IMAGES])})
    for engine in EngineCache().entries():
        assert engine.certificate["failures"] == []
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan, batch_limit=4, build=False) as again:
        again.encode_array(IMAGES)


def test_lanes_and_cuda_graphs_change_nothing(flavour: str, mini_bundle: Path) -> None:
    plan = EnginePlan(precision="fp32", batch=(1, 1, 2))
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan) as plain:
        expected = [plain.encode_array(image[None]) for image in IMAGES]
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan, lanes=3, cuda_graphs=True) as tokenizer:
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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_generator_is_built_certified_and_repeats_itself(flavour: str, precision, mini_generator: Path) -> None:
    plan = EnginePlan(precision=precision, batch=(1, 1, 2), pages=200)
    with Generator.from_pretrained(mini_generator, backend=flavour, plan=plan) as generator:
        assert generator.device == "cuda:0"
        first = generator.generate("w3 w5", seed=7, n=2)
        assert generator.generate("w3 w5", seed=7, n=2).codes == first.codes
        assert first.images[0].size == (64, 64)
        together = generator.generate_batch(["w3 w5", "w7", "w1 w2 w4"], seed=7, n=2)
        assert len(together) == 3
        pool = generator._running.scheduler.loop.transformer.pool
        assert pool.free > pool.pages - 16


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_understander_is_built_certified_and_answers(flavour: str, precision, mini_understander: Path) -> None:
    """More questions at once than the engines take; in float32 the first tokens are those of the CPU."""
    params = AnswerParams(max_tokens=40, stop_ids=())
    asked = [(features(i % 2), "what? " * (1 + 20 * i)) for i in range(5)]
    with Understander.from_pretrained(mini_understander, device="cpu", backend="onnxruntime") as on_cpu:
        expected = [answer.token_ids for answer in on_cpu.answer_batch(asked, params=params)]
    plan = EnginePlan(precision=precision, batch=(1, 1, 2), pages=200)
    for cuda_graphs in (False, True):
        with Understander.from_pretrained(
            mini_understander, backend=flavour, plan=plan, cuda_graphs=cuda_graphs
        ) as understander:
            assert understander.device == "cuda:0"
            found = [answer.token_ids for answer in understander.answer_batch(asked, params=params)]
            assert [len(tokens) for tokens in found] == [40] * 5
            if precision == "fp32":
                assert sum(a[:5] == b[:5] for a, b in zip(found, expected, strict=True)) >= 4
            penalised = replace(params, max_tokens=300, repetition_penalty=1.3, temperature=1.5, top_k=288)
            assert len(understander.answer(features(0), "what?", params=penalised).token_ids) == 300
            assert pool_is_clean(understander)
            understander.tokenizer.close()


def test_an_understander_changes_over_and_chats_go_on(flavour: str, mini_understander: Path) -> None:
    options = {"backend": flavour, "plan": EnginePlan(precision="fp32", pages=200), "serve_while_building": True}
    with Understander.from_pretrained(mini_understander, **options) as understander:  # type: ignore[arg-type]
        chat = understander.chat(features(0))
        chat.ask("what?", max_tokens=8)
        assert understander.wait_for_engines(10 * MINUTES)
        assert understander.device == "cuda:0"
        chat.ask("and?", max_tokens=8)
        assert len(chat.turns) == 2
        assert pool_is_clean(understander)


def test_ten_thousand_calls_leak_nothing(flavour: str, mini_bundle: Path) -> None:
    """Memory of the GPU and of the process, after a thousand calls, when all is compiled, and after ten thousand."""
    plan = EnginePlan(precision="fp16", batch=(1, 1, 4))
    codes = RNG.integers(0, 500, (4, 30), np.int32)
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan, batch_limit=4) as tokenizer:
        session = tokenizer._session("features")
        process = psutil.Process()
        for number in range(10_000):
            session.run({"code_indices": codes[: 1 + number % 4]})
            if number == 1000:
                gpu, host = free_memory(), process.memory_info().rss
        assert gpu - free_memory() < 2**24
        assert process.memory_info().rss - host < 2**26
    gc.collect()


def test_closing_gives_the_memory_back(flavour: str, mini_bundle: Path) -> None:
    plan = EnginePlan(precision="fp16", batch=(1, 1, 4))

    def use() -> None:
        with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan) as tokenizer:
            tokenizer.encode_array(IMAGES[:1])
        gc.collect()

    use()
    before = free_memory()
    for _ in range(5):
        use()
    assert before - free_memory() < 2**25


def test_a_cut_engine_is_built_again(flavour: str, mini_bundle: Path) -> None:
    plan = EnginePlan(precision="fp16", batch=(1, 1, 1))
    Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan).close()
    for path in EngineCache().directory.glob("*.engine"):
        path.write_bytes(path.read_bytes()[:-100])
    with Tokenizer.from_pretrained(mini_bundle, backend=flavour, plan=plan) as tokenizer:
        tokenizer.encode_array(IMAGES[:1])


def test_serving_goes_on_while_engines_are_built(flavour: str, mini_bundle: Path, cpu: Tokenizer) -> None:
    plan = EnginePlan(precision="fp32", batch=(1, 1, 1))
    options = {"backend": flavour, "plan": plan, "serve_while_building": True}
    with Tokenizer.from_pretrained(mini_bundle, **options) as tokenizer:  # type: ignore[arg-type]
        expected = cpu.encode_array(IMAGES[:1])
        assert (tokenizer.encode_array(IMAGES[:1]) == expected).mean() > 0.9
        assert tokenizer.wait_for_engines(10 * MINUTES)
        assert tokenizer.device == "cuda:0"
        assert (tokenizer.encode_array(IMAGES[:1]) == expected).mean() > 0.9
