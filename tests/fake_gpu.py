"""A GPU and a TensorRT that are not there: device memory is host memory that is watched, and engines run in onnxruntime.

Every address that is copied from or to, or bound to an engine, must lie in memory that is allocated and large enough.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

ALIGNMENT = 256
MAGIC = b"fake engine of "
KINDS = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)


NAMES = {0: "cudaSuccess", 2: "cudaErrorMemoryAllocation", 35: "cudaErrorInsufficientDriver", 100: "cudaErrorNoDevice"}


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
        self.launches = 0
        self._numbers = itertools.count(1)

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


class FakeTensorRT(ModuleType):
    """A TensorRT whose engines are the graphs themselves. `broken` graphs build, and compute something else."""

    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)
    ILogger = type("ILogger", (), {"Severity": Severity})
    IProgressMonitor = type("IProgressMonitor", (), {})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
    MemoryPoolType = SimpleNamespace(WORKSPACE=0)
    BuilderFlag = SimpleNamespace(TF32=0)
    ComputeCapability = SimpleNamespace(SM86="sm86", SM89="sm89")
    DataType = SimpleNamespace(FLOAT="float32", HALF="float16", BF16="bfloat16", INT32="int32", INT64="int64", UINT8="uint8")

    def __init__(self, cuda: FakeCuda, version: str = "11.0.fake", name: str = "tensorrt") -> None:
        super().__init__(name)
        self.cuda, self.__version__ = cuda, version
        self.built_on: list[int] = []
        """The thread's GPU at each build."""
        self.broken: set[str] = set()
        self.builds: list[str] = []
        self.contexts_left = 1000
        self.capturable = True
        self.profiles_taken = 1000
        """Of an engine; others are refused."""
        self.binds = 0

    def Builder(self, log):  # noqa: N802
        return FakeBuilder(self)

    def OnnxParser(self, network, log):  # noqa: N802
        def parse(path: str) -> bool:
            network.path = Path(path)
            return True

        return SimpleNamespace(parse_from_file=parse)

    def Runtime(self, log):  # noqa: N802
        def deserialize(plan: bytes):
            head, about, model = [*plan.split(b"\n", 2), b"", b""][:3]
            if head != MAGIC + self.__version__.encode():
                log.log(self.Severity.ERROR, "the plan is of another version")
                return None
            return FakeEngine(self, json.loads(about), model)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class FakeBuilder:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    def create_network(self, flags: int):
        return SimpleNamespace(path=None)

    def create_builder_config(self):
        config = SimpleNamespace(
            progress_monitor=None,
            profiles=[],
            set_memory_pool_limit=lambda *_: None,
            clear_flag=lambda flag: None,
            set_compute_capability=lambda capability, index: None,
        )
        config.add_optimization_profile = lambda profile: config.profiles.append(profile.shapes)
        return config

    def create_optimization_profile(self):
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *limits: shapes.update({name: limits}))

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        self.trt.builds.append(network.path.stem)
        self.trt.built_on.append(self.trt.cuda.current)
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("building", None, 1)
            config.progress_monitor.step_complete("building", 0)
        return make_plan(self.trt, network.path, config.profiles)


def make_plan(trt: FakeTensorRT, graph: Path, profiles: list[dict[str, Any]]) -> bytes:
    """An engine: its version, its name and limits, the graph."""
    about = json.dumps({"name": graph.stem, "profiles": profiles}).encode()
    return b"\n".join([MAGIC + trt.__version__.encode(), about, onnx.load(graph).SerializeToString()])


class FakeEngine:
    device_memory_size_v2 = 10**6

    def __init__(self, trt: FakeTensorRT, about: dict[str, Any], model: bytes) -> None:
        self.trt, self.name, self.profiles = trt, about["name"], about["profiles"]
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, settings)
        self.types = {
            node.name: {"tensor(float)": "float32", "tensor(float16)": "float16"}.get(node.type, node.type[7:-1])
            for node in (*self.session.get_inputs(), *self.session.get_outputs())
        }

    def get_tensor_dtype(self, name: str) -> str:
        return self.types[name]

    def get_tensor_profile_shape(self, name: str, profile: int):
        return tuple(map(tuple, self.profiles[profile][name]))

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def create_execution_context(self, settings: Any = None):
        if self.trt.contexts_left == 0:
            return None
        self.trt.contexts_left -= 1
        return FakeContext(self, settings)

    def create_runtime_config(self):
        settings = SimpleNamespace(cuda_graph_strategy="disabled", cache=None, create_runtime_cache=lambda: FakeCache(self.trt))
        settings.set_runtime_cache = lambda cache: setattr(settings, "cache", cache)
        return settings


class FakeCache:
    """What TensorRT-RTX compiled: a kernel for each engine and shape. One of another version is refused."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.version, self.kernels = trt.__version__, set()

    def serialize(self) -> bytes:
        return json.dumps([self.version, sorted(self.kernels)]).encode()

    def deserialize(self, data: bytes) -> bool:
        try:
            version, kernels = json.loads(data)
        except ValueError:
            return False
        if version == self.version:
            self.kernels |= set(kernels)
        return bool(version == self.version)


class FakeTensorRTRTX(FakeTensorRT):
    """One that compiles kernels at a context's first run of some shapes, and replays graphs by itself."""

    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none")
    IRuntimeCache = FakeCache

    def __init__(self, cuda: FakeCuda, version: str = "1.7.fake") -> None:
        super().__init__(cuda, version, "tensorrt_rtx")
        self.compiled = 0


class FakeContext:
    def __init__(self, engine: FakeEngine, settings: Any) -> None:
        self.engine, self.settings, self.shapes, self.addresses, self.profile = engine, settings, {}, {}, 0
        self.state, self.ready = 0, -1
        """Of shapes and addresses, counted; and which of them was run without capturing."""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.engine.trt.cuda.streams
        self.shapes = {}
        self.profile = profile
        return profile < min(self.engine.num_optimization_profiles, self.engine.trt.profiles_taken)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
            self.state += 1
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            dim: size
            for node in self.engine.session.get_inputs()
            for dim, size in zip(node.shape, self.shapes[node.name], strict=True)
            if isinstance(dim, str)
        }
        shape = next(node.shape for node in self.engine.session.get_outputs() if node.name == name)
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGNMENT == 0
        self.engine.trt.binds += 1
        self.addresses[name] = address
        self.state += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda, work = self.engine.trt.cuda, self._work(dict(self.addresses), dict(self.shapes))
        if self.settings is not None and self.settings.cache is not None:
            kernel = f"{self.engine.name} {sorted(self.shapes.items())}"
            self.engine.trt.compiled += kernel not in self.settings.cache.kernels
            self.settings.cache.kernels.add(kernel)
        if stream in cuda.capturing:
            assert self.ready == self.state, "captured right after a change"
            cuda.capturing[stream].append(work)
            return self.engine.trt.capturable
        self.ready = self.state
        work()
        return True

    def _work(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]):
        session, state = self.engine.session, self.state

        def run() -> None:
            assert self.state == state, "a CUDA graph of other shapes or addresses was launched"
            feeds = {node.name: self._view(addresses[node.name], shapes[node.name], node.name) for node in session.get_inputs()}
            for node, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                view = self._view(addresses[node.name], value.shape, node.name)
                view[...] = value if self.engine.name not in self.engine.trt.broken else 0

        return run

    def _view(self, address: int, shape: tuple[int, ...], name: str) -> np.ndarray:
        dtype = np.dtype(self.engine.types[name])
        size = int(np.prod(shape)) * dtype.itemsize
        self.engine.trt.cuda.check(address, size, device=True)
        memory = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


def install(monkeypatch: Any) -> tuple[FakeCuda, FakeTensorRT]:
    """Put both, and TensorRT-RTX, in the place of the real modules."""
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRTRTX(cuda))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    package = ModuleType("cuda.bindings")
    package.runtime = package.driver = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return cuda, trt
