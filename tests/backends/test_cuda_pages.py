"""Key/value pages in GPU memory against NumPy, on a GPU that is not there: its kernel runs in tests/support/ptx.py."""

from __future__ import annotations

import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backends.test_cuda import on_device
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import install
from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.backends.cuda_pages import STORE_TOKENS, CudaPages
from tokenflow_sdk.backends.session import HostPages


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)[0]


@pytest.mark.parametrize("kernel", [True, False])
@given(st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_are_host_pages(gpu: FakeCuda, kernel: bool, data: st.DataObject) -> None:
    """Random writes and copies, in both: tokens of any size, at any places, some of them not stored."""
    gpu.refuses_kernels = not kernel
    layers, pages, size = (data.draw(st.integers(1, 4)) for _ in range(3))
    dim = data.draw(st.sampled_from([3, 4, 8, 300]))
    shape, dtype = (layers, pages, size, 2, dim), np.dtype(data.draw(st.sampled_from(["float32", "float16"])))
    cuda = Cuda()
    host, device = HostPages(shape, dtype), CudaPages(cuda, shape, dtype)
    assert device.page_bytes == host.page_bytes == layers * size * 2 * dim * dtype.itemsize
    for _ in range(3):
        if data.draw(st.booleans()):
            source, target = (data.draw(st.integers(0, pages - 1)) for _ in range(2))
            host.copy_page(source, target)
            device.copy_page(source, target)
        batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
        free = data.draw(st.permutations(range(pages * size)))
        places = np.asarray([*free, *[-1] * (batch * count)][: batch * count], np.int32)
        if data.draw(st.booleans()):
            places = np.sort(places)
        places = places.reshape(batch, count)
        new = np.random.default_rng(0).standard_normal((layers, batch, count, 2, dim)).astype(dtype)
        host.write(new, places)
        device.write(on_device(cuda, new), places)
        if data.draw(st.booleans()):
            np.testing.assert_array_equal(np.asarray(device.slots), np.asarray(host.slots))
    np.testing.assert_array_equal(np.asarray(device.slots), np.asarray(host.slots))
    device.close()
    assert gpu.modules == {}


def test_a_driver_that_takes_no_kernel_is_told_of_once(gpu: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    gpu.refuses_kernels = True
    pages = CudaPages(Cuda(), (2, 3, 4, 1, 8), np.dtype(np.float16))
    for place in (1, 2):
        pages.write(on_device(Cuda(), np.ones((2, 1, 1, 1, 8), np.float16)), np.asarray([[place]], np.int32))
    assert np.asarray(pages.slots).sum() == 2 * 2 * 8
    assert caplog.text.count("stored by copies, which takes longer: cuModuleLoadData failed on GPU 0") == 1


@pytest.mark.parametrize("width", [2, 4])
def test_closed_pages_are_given_back_whoever_holds_them(gpu: FakeCuda, width: int) -> None:
    """Also those that the kernel fills."""
    pages = CudaPages(Cuda(), (2, 3, 4, 1, width), np.dtype(np.float32))
    pages.write(on_device(Cuda(), np.ones((2, 1, 1, 1, width), np.float32)), np.asarray([[4]], np.int32))
    lists = width == 4
    gc.collect()
    # What a copy under way reads is held until it has been waited for.
    assert len(gpu.device_memory) == 2 + lists
    assert np.asarray(pages.slots).sum() == 2 * width
    gc.collect()
    assert len(gpu.device_memory) == 1 + lists
    for _ in range(2):
        pages.close()
    gc.collect()
    assert (gpu.device_memory, gpu.host_memory, gpu.streams, gpu.modules) == ({}, {}, set(), {})


def test_the_kernel_assembles_for_every_architecture(tmp_path: Path) -> None:
    """Where NVIDIA's assembler is installed (`pip install nvidia-cuda-nvcc`)."""
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("ptxas is not installed")
    (tmp_path / "kernel.ptx").write_text(STORE_TOKENS)
    for architecture in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"):
        words = [assembler, f"-arch={architecture}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
        subprocess.run(words, check=True)
