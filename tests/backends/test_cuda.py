"""GPU memory against NumPy, on a GPU that is not there (tests/support/fake_gpu.py watches every address)."""

from __future__ import annotations

import ctypes
import gc
import importlib
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.support.fake_cuda import FakeCuda, Status
from tests.support.fake_gpu import install
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream, driver_problem, joined
from tokenflow_sdk.backends.cuda_pages import CudaPages
from tokenflow_sdk.errors import BackendError, MissingPackageError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)[0]


def on_device(cuda: Cuda, array: np.ndarray) -> CudaArray:
    stream, pinned = Stream(cuda), PinnedBuffer(cuda, array.nbytes)
    buffer = DeviceBuffer(cuda, array.nbytes)
    pinned.view(array.shape, array.dtype)[...] = array
    stream.to_device(buffer.pointer, pinned.pointer, array.nbytes)
    stream.synchronize()
    stream.close()
    return CudaArray(cuda, buffer.pointer, array.shape, array.dtype, buffer)


def test_arrays_go_there_and_back_and_their_memory_is_freed(gpu: FakeCuda) -> None:
    cuda = Cuda()
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    there = on_device(cuda, array)
    assert (there.ndim, there.nbytes) == (3, 96)
    np.testing.assert_array_equal(np.asarray(there), array)
    np.testing.assert_array_equal(np.asarray(there[1:3], np.float64), array[1:3])
    flat = there.reshape(12, 2)
    np.testing.assert_array_equal(np.asarray(flat[-1:]), array.reshape(12, 2)[-1:])
    with pytest.raises(AssertionError):
        there.reshape(5, 5)
    part = there[2:]
    del there, flat
    np.testing.assert_array_equal(part.numpy(), array[2:])
    del part
    gc.collect()
    assert (gpu.device_memory, gpu.host_memory, gpu.streams) == ({}, {}, set())


def test_arrays_are_joined_there(gpu: FakeCuda) -> None:
    """Each is copied before the next one is made, which may be in the same memory."""
    cuda = Cuda()

    def parts() -> Iterator[CudaArray]:
        there = on_device(cuda, np.zeros((1, 3, 2), np.float32))
        for number in (1, 2):
            ctypes.memmove(there.pointer, np.full(6, number, np.float32).tobytes(), 24)
            yield there

    found = joined(cuda, parts(), 6)
    np.testing.assert_array_equal(np.asarray(found)[0, :, 0], [1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(found.column(4), [[2, 2]])
    del found
    gc.collect()
    assert (gpu.device_memory, gpu.streams) == ({}, set())


def test_machines_without_a_gpu_say_what_is_missing(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no GPU 3 here, only 1.*cuda:0"):
        Cuda(3)
    gpu.status = Status(35)
    with pytest.raises(BackendError, match="no usable GPU here.*InsufficientDriver.*update the NVIDIA driver"):
        Cuda()
    with pytest.raises(BackendError, match="580 or newer.*cuda-bindings<13"):
        Cuda()
    gpu.status = Status(100)
    with pytest.raises(BackendError, match="cudaErrorNoDevice.*CUDA_VISIBLE_DEVICES hides none"):
        Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingPackageError, match="pip install cuda-bindings"):
        Cuda()


def test_memory_that_runs_out_is_named_with_how_much_there_was(gpu: FakeCuda) -> None:
    cuda, gpu.memory = Cuda(), 10**9
    kept = DeviceBuffer(cuda, 6 * 10**8)
    with pytest.raises(BackendError, match=r"no 500 MB left \(400 of 1,000 MB are free\).*batch_limit="):
        DeviceBuffer(cuda, 5 * 10**8)
    del kept
    assert DeviceBuffer(cuda, 5 * 10**8).pointer


def test_a_failing_call_is_named(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cudaStreamSynchronize", lambda stream: (Status(700),))
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed on GPU 0 with error700"):
        Stream(Cuda()).synchronize()


def test_another_gpu_of_the_application_stays_its_own(gpu: FakeCuda) -> None:
    """Whatever is done on GPU 1, the calling thread's GPU is the one it was. One that nobody used stays unused."""
    gpu.gpus, used = 2, []
    gpu.contexts.clear()
    with Cuda(1).active():
        pass
    assert (gpu.current, gpu.contexts) == (1, {1})
    gpu.cudaSetDevice(0)
    cuda = Cuda(1)
    for name in ("cudaMalloc", "cudaFree", "cudaMemcpy2DAsync", "cudaStreamCreateWithFlags", "cudaMemcpy"):
        plain = getattr(gpu, name)
        setattr(gpu, name, lambda *arguments, plain=plain: (used.append(gpu.current), plain(*arguments))[1])
    pages = CudaPages(cuda, (2, 3, 4, 1, 2), np.dtype(np.float32))
    pages.copy_page(0, 1)
    assert not np.asarray(pages.slots).any()
    del pages
    gc.collect()
    assert len(used) == 5
    assert set(used) == {1}
    assert gpu.current == 0


@pytest.mark.parametrize(
    ("initialised", "count", "words"),
    [(0, 2, None), (0, 0, "the NVIDIA driver finds no GPU"), (999, 0, r"finds no GPU \(CUDA error 999\)")],
)
def test_the_driver_is_asked_without_any_package(
    initialised: int, count: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_devices(reference) -> int:
        reference._obj.value = count
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: initialised, cuDeviceGetCount=count_devices)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    problem = driver_problem()
    assert problem is None if words is None else re.search(words, problem or "")

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver_problem() == "there is no NVIDIA driver here"


CALLS = {
    "cudaFree": (0,),
    "cudaFreeHost": (0,),
    "cudaGetDevice": (),
    "cudaGetDeviceCount": (),
    "cudaGetDeviceProperties": (0,),
    "cudaGraphDestroy": (0,),
    "cudaGraphExecDestroy": (0,),
    "cudaGraphInstantiate": (0, 0),
    "cudaGraphLaunch": (0, 0),
    "cudaHostAlloc": (64, 0),
    "cudaMalloc": (64,),
    "cudaMemGetInfo": (),
    "cudaMemcpy": (256, 512, 8, "cudaMemcpyDeviceToHost"),
    "cudaMemcpy2D": (256, 8, 512, 8, 4, 2, "cudaMemcpyDeviceToHost"),
    "cudaMemcpy2DAsync": (256, 8, 512, 8, 4, 2, "cudaMemcpyDeviceToDevice", 0),
    "cudaMemcpyAsync": (256, 512, 8, "cudaMemcpyHostToDevice", 0),
    "cudaMemsetAsync": (256, 0, 8, 0),
    "cudaSetDevice": (0,),
    "cudaStreamBeginCapture": (0, "cudaStreamCaptureModeThreadLocal"),
    "cudaStreamCreateWithFlags": ("cudaStreamNonBlocking",),
    "cudaStreamDestroy": (0,),
    "cudaStreamEndCapture": (0,),
    "cudaStreamSynchronize": (0,),
}
"""Every function of CUDA that the SDK calls, with arguments of the types that it gives; a text names a constant of CUDA's."""


def test_every_call_is_one_that_the_real_bindings_take() -> None:
    """They check names and types before they find that there is no driver."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip(
            "there is a GPU here, on which made-up addresses would be used; tests/test_on_gpu.py calls them with real ones"
        )
    files = ("cuda.py", "cuda_pages.py", "tensorrt_context.py")
    text = "".join((ROOT / "tokenflow_sdk" / "backends" / file).read_text() for file in files)
    # Of the driver the names alone can be looked up.
    driver = importlib.import_module("cuda.bindings.driver")
    assert {name for name in re.findall(r"\"(cu[A-Z]\w+)\"", text) if not hasattr(driver, name)} == set()
    called = set(re.findall(r"\b(cuda[A-Z]\w+?)\b", text))
    constants = {name for name in called if name.startswith(("cudaMemcpyKind", "cudaStreamCaptureMode"))}
    constants |= {name for name in called if re.match("cudaMemcpy(Host|Device)To|cudaStreamNonBlocking|cudaError", name)}
    assert called - constants == set(CALLS)
    kinds = (runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    for name, arguments in CALLS.items():
        real = [
            next(getattr(kind, value) for kind in kinds if hasattr(kind, value)) if isinstance(value, str) else value
            for value in arguments
        ]
        status, *_ = getattr(runtime, name)(*real)
        assert status.name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice"), name
