"""A GPU that is not there: device memory is host memory that is watched, and kernels run in tests/support/ptx.py.

Every address that is copied from or to must lie in memory that is allocated and large enough.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.support.ptx import Kernel

ALIGNMENT = 256
KINDS = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)


NAMES = {
    0: "cudaSuccess",
    2: "cudaErrorMemoryAllocation",
    35: "cudaErrorInsufficientDriver",
    100: "cudaErrorNoDevice",
    222: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
}


class Status(int):
    @property
    def name(self) -> str:
        return NAMES.get(self, f"error{int(self)}")


OK = Status(0)


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime`. Attributes of the machine can be changed: `gpus`, `status`, `memory` (bytes), `capability`."""

    cudaStreamNonBlocking = 1  # noqa: N815 - CUDA's name
    cudaMemcpyKind = KINDS  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpus, self.status, self.memory, self.capability = 1, OK, 2**33, (8, 9)
        self.model = b"NVIDIA Fake 4090\0"
        self.current = 0
        """The calling thread's GPU; the machine has one thread."""
        self.contexts = {0}
        """GPUs that the process uses."""
        self.device_memory: dict[int, Any] = {}
        self.host_memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Any]] = {}
        self.capturing: dict[int, list[Any]] = {}
        self.captures = self.launches = 0
        self.modules: dict[int, Kernel] = {}
        self.refuses_kernels = False
        self.calls: Counter[str] = Counter()
        """Calls that give the GPU work, move memory or wait, by name; those of TensorRT's `execute_async_v3` among them."""
        self._numbers = itertools.count(1)

    def __getattribute__(self, name: str) -> Any:
        if re.match("cuda(Memcpy(?!Kind)|Memset|StreamSynchronize|GraphLaunch|Malloc)|cuLaunch", name):
            self.calls[name] += 1
        return super().__getattribute__(name)

    def used(self) -> int:
        return sum(size for _, size in self.device_memory.values())

    def check(self, address: int, size: int, device: bool) -> None:
        blocks = self.device_memory if device else self.host_memory
        inside = any(start <= address and address + size <= start + room for start, (_, room) in blocks.items())
        assert inside, f"{size} bytes at {address:#x} are not {'device' if device else 'pinned'} memory"

    def cudaGetDeviceCount(self):  # noqa: N802
        return (self.status, self.gpus if self.status == 0 else None)

    def cudaGetDeviceProperties(self, device: int):  # noqa: N802
        return (self.status, SimpleNamespace(major=self.capability[0], minor=self.capability[1], name=self.model))

    def cuDevicePrimaryCtxGetState(self, device: int):  # noqa: N802
        return (OK, 0, int(device in self.contexts))

    def cudaGetDevice(self):  # noqa: N802
        return (OK, self.current)

    def cudaSetDevice(self, device: int):  # noqa: N802
        self.current = device
        self.contexts.add(device)
        return (OK,)

    def cudaMemGetInfo(self):  # noqa: N802
        return (OK, self.memory - self.used(), self.memory)

    def _allocate(self, blocks: dict[int, Any], size: int) -> tuple[Status, int]:
        block = (ctypes.c_uint8 * (size + ALIGNMENT))()
        pointer = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        blocks[pointer] = (block, size)
        return (OK, pointer)

    def cudaMalloc(self, size: int):  # noqa: N802
        return self._allocate(self.device_memory, size) if self.used() + size <= self.memory else (Status(2), 0)

    def cudaHostAlloc(self, size: int, flags: int):  # noqa: N802
        return self._allocate(self.host_memory, size)

    def cudaFree(self, pointer: int):  # noqa: N802
        del self.device_memory[pointer]
        return (OK,)

    def cudaFreeHost(self, pointer: int):  # noqa: N802
        del self.host_memory[pointer]
        return (OK,)

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int):  # noqa: N802
        assert stream in self.streams
        self.check(pointer, size, device=True)
        ctypes.memset(pointer, value, size)
        return (OK,)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: int):  # noqa: N802
        assert kind == KINDS.cudaMemcpyDeviceToHost
        self.check(source, size, device=True)
        ctypes.memmove(target, source, size)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int):  # noqa: N802
        assert stream in self.streams
        self.check(target, size, device=kind != KINDS.cudaMemcpyDeviceToHost)
        self.check(source, size, device=kind != KINDS.cudaMemcpyHostToDevice)
        ctypes.memmove(target, source, size)
        return (OK,)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, rows, kind, stream):  # noqa: N802
        assert stream in self.streams
        assert width <= min(target_pitch, source_pitch)
        assert kind == KINDS.cudaMemcpyDeviceToDevice
        for row in range(rows):
            for address in (target + row * target_pitch, source + row * source_pitch):
                self.check(address, width, device=True)
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return (OK,)

    def cudaMemcpy2D(self, target, target_pitch, source, source_pitch, width, rows, kind):  # noqa: N802
        assert kind == KINDS.cudaMemcpyDeviceToHost
        assert width <= min(target_pitch, source_pitch)
        for row in range(rows):
            self.check(source + row * source_pitch, width, device=True)
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return (OK,)

    def cuModuleLoadData(self, image: bytes):  # noqa: N802
        if self.refuses_kernels:
            return (Status(222), None)
        self.modules[number := next(self._numbers)] = Kernel(image.rstrip(b"\0").decode())
        return (OK, number)

    def cuModuleGetFunction(self, module: int, name: bytes):  # noqa: N802
        assert self.modules[module].name == name.decode()
        return (OK, module)

    def cuModuleUnload(self, module: int):  # noqa: N802
        del self.modules[module]
        return (OK,)

    def cuLaunchKernel(self, function, x, y, z, threads, ty, tz, shared, stream, parameters, extra):  # noqa: N802
        assert stream in self.streams
        assert (z, ty, tz, shared, extra) == (1, 1, 1, 0, 0)
        assert 1 <= threads <= 1024
        values, types = parameters
        self.modules[function].run(
            (x, y), threads, [kind(value).value for value, kind in zip(values, types, strict=True)], self
        )
        return (OK,)

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Bytes [n, size] of device memory at n addresses."""
        self._check_all(addresses, size)
        return np.stack([np.frombuffer(ctypes.string_at(int(address), size), np.uint8) for address in addresses])

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self._check_all(addresses, values.shape[1])
        for address, row in zip(addresses, values, strict=True):
            ctypes.memmove(int(address), row.tobytes(), values.shape[1])

    def _check_all(self, addresses: np.ndarray, size: int) -> None:
        assert not (addresses % size).any(), "a thread's address is not aligned"
        starts = np.asarray(sorted(self.device_memory), np.uint64)
        ends = np.asarray([start + self.device_memory[int(start)][1] for start in starts.tolist()], np.uint64)
        found = np.searchsorted(starts, addresses, "right") - 1
        assert (found >= 0).all() and (addresses + np.uint64(size) <= ends[found]).all(), "a thread is out of device memory"

    def cudaStreamCreateWithFlags(self, flags: int):  # noqa: N802
        self.streams.add(number := next(self._numbers))
        return (OK, number)

    def cudaStreamDestroy(self, stream: int):  # noqa: N802
        self.streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int):  # noqa: N802
        assert stream in self.streams
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int):  # noqa: N802
        self.capturing[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int):  # noqa: N802
        return (OK, self.capturing.pop(stream))

    def cudaGraphInstantiate(self, graph: list[Any], flags: int):  # noqa: N802
        self.captures += 1
        self.graphs[number := next(self._numbers)] = graph
        return (OK, number)

    def cudaGraphDestroy(self, graph: list[Any]):  # noqa: N802
        return (OK,)

    def cudaGraphExecDestroy(self, number: int):  # noqa: N802
        del self.graphs[number]
        return (OK,)

    def cudaGraphLaunch(self, number: int, stream: int):  # noqa: N802
        self.launches += 1
        for work in self.graphs[number]:
            work()
        return (OK,)
