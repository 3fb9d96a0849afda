"""GPU memory against NumPy, on a GPU that is not there (tests/fake_gpu.py watches every address)."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fake_gpu import FakeCuda, Status, install
from tokenflow_sdk.backends.base import HostPages
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, CudaPages, DeviceBuffer, PinnedBuffer, Stream
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


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_are_host_pages(gpu: FakeCuda, data: st.DataObject) -> None:
    """Random writes and copies, in both."""
    layers, pages, size = (data.draw(st.integers(1, 4)) for _ in range(3))
    shape, dtype = (layers, pages, size, 2, 3), np.dtype(data.draw(st.sampled_from(["float32", "float16"])))
    cuda = Cuda()
    host, device = HostPages(shape, dtype), CudaPages(cuda, shape, dtype)
    assert device.page_bytes == host.page_bytes == layers * size * 6 * dtype.itemsize
    for _ in range(4):
        if data.draw(st.booleans()):
            source, target = (data.draw(st.integers(0, pages - 1)) for _ in range(2))
            host.copy(source, target)
            device.copy(source, target)
        places = np.asarray(data.draw(st.lists(st.integers(0, pages * size - 1), min_size=1, unique=True)))
        batch = data.draw(st.integers(1, 3))
        new = np.random.default_rng(0).standard_normal((layers, batch, len(places), 2, 3)).astype(dtype)
        row = data.draw(st.integers(0, batch - 1))
        host.put(new, row, places // size, places % size)
        device.put(on_device(cuda, new), row, places // size, places % size)
        np.testing.assert_array_equal(np.asarray(device.slots), np.asarray(host.slots))


def test_machines_without_a_gpu_say_what_is_missing(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no GPU 3 here, only 1.*cuda:0"):
        Cuda(3)
    gpu.status = Status(35)
    with pytest.raises(BackendError, match="no usable GPU here.*InsufficientDriver.*update the NVIDIA driver"):
        Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingPackageError, match="pip install cuda-python"):
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
