"""A TensorRT that is not there, on the GPU of tests/support/fake_cuda.py: its engines run in onnxruntime.

Every address that is bound to an engine must lie in memory that is allocated and large enough.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.support.fake_cuda import ALIGNMENT, FakeCuda

MAGIC = b"fake engine of "


class FakeTensorRT(ModuleType):
    """A TensorRT whose engines are the graphs themselves. `broken` graphs build, and compute something else."""

    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)
    ILogger = type("ILogger", (), {"Severity": Severity})
    IProgressMonitor = type("IProgressMonitor", (), {})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
    MemoryPoolType = SimpleNamespace(WORKSPACE=0)
    BuilderFlag = SimpleNamespace(TF32=0)
    ProfilingVerbosity = SimpleNamespace(DETAILED=2)
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="static", USER_MANAGED="user")
    IStreamReaderV2 = type("IStreamReaderV2", (), {})
    SeekPosition = SimpleNamespace(SET=0, CUR=1, END=2)
    DataType = SimpleNamespace(FLOAT="float32", HALF="float16", BF16="bfloat16", INT32="int32", INT64="int64", UINT8="uint8")

    def __init__(self, cuda: FakeCuda, version: str = "11.0.fake", name: str = "tensorrt") -> None:
        super().__init__(name)
        self.cuda, self.__version__ = cuda, version
        self.built_on: list[int] = []
        """The thread's GPU at each build."""
        self.broken: set[str] = set()
        self.right_alone: set[str] = set()
        """Graphs whose engines compute the first row of a batch right, and the others not."""
        self.builds: list[str] = []
        self.contexts_left = 1000
        self.capturable = True
        self.profiles_taken = 1000
        """Of an engine; others are refused."""
        self.binds = 0
        self.runs: Counter[str] = Counter()
        """Of each engine, launched graphs included."""
        self.pieces: list[list[int]] = []
        """Sizes of the pieces that each engine was read in."""

    @property
    def architecture(self) -> str:
        return "sm{}{}".format(*self.cuda.capability)

    def stream(self, reader: Any) -> bytes:
        """The plan that a reader gives. As the real one: the size first, by seeking; then whatever is left is asked for, until
        nothing comes; exceptions of the reader are lost."""
        pieces: list[bytes] = []
        try:
            reader.seek(0, self.SeekPosition.END)
            reader.seek(0, self.SeekPosition.SET)
            while piece := reader.read(2**40, 0):
                pieces.append(piece)
        except Exception:
            return b""
        self.pieces.append([len(piece) for piece in pieces])
        return b"".join(pieces)

    def Builder(self, log):  # noqa: N802
        return FakeBuilder(self)

    def OnnxParser(self, network, log):  # noqa: N802
        def parse(path: str) -> bool:
            network.path = Path(path)
            return True

        return SimpleNamespace(parse_from_file=parse)

    def Runtime(self, log):  # noqa: N802
        def deserialize(plan: Any):
            content = plan if isinstance(plan, bytes) else self.stream(plan)
            head, about, model = [*content.split(b"\n", 2), b"", b""][:3]
            if head != MAGIC + self.__version__.encode():
                log.log(self.Severity.ERROR, "the plan is of another version")
                return None
            described = json.loads(about)
            if self.architecture not in described["targets"]:
                log.log(self.Severity.ERROR, "the plan is for another GPU")
                return None
            try:
                return FakeEngine(self, described, model)
            except Exception as error:
                log.log(self.Severity.ERROR, f"the plan is damaged: {error}")
                return None

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
            targets=[self.trt.architecture],
        )
        self.add_targets(config)
        config.add_optimization_profile = lambda profile: config.profiles.append(profile.shapes)
        return config

    def add_targets(self, config: Any) -> None:
        """What TensorRT-RTX's configuration has besides: it may name the GPUs to build for."""
        if not hasattr(self.trt, "ComputeCapability"):
            return

        def set_compute_capability(capability: str, index: int) -> bool:
            assert index < config.num_compute_capabilities
            config.targets[index:] = [capability]
            return True

        config.set_compute_capability = set_compute_capability

    def create_optimization_profile(self):
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *limits: shapes.update({name: limits}))

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        self.trt.builds.append(network.path.stem)
        self.trt.built_on.append(self.trt.cuda.current)
        assert len(config.targets) == getattr(config, "num_compute_capabilities", 1)
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("building", None, 1)
            config.progress_monitor.step_complete("building", 0)
        return make_plan(self.trt, network.path, config.profiles, config.targets)


def make_plan(trt: FakeTensorRT, graph: Path, profiles: list[dict[str, Any]], targets: list[str] | None = None) -> bytes:
    """An engine: its version, its name, limits and targets (None: the GPU that is there), the graph."""
    about = json.dumps({"name": graph.stem, "profiles": profiles, "targets": targets or [trt.architecture]}).encode()
    return b"\n".join([MAGIC + trt.__version__.encode(), about, onnx.load(graph).SerializeToString()])


class FakeEngine:
    device_memory_size_v2 = 10**6
    """Bytes that each of its contexts must be given."""

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

    def create_execution_context(self, settings: Any):
        assert (settings if isinstance(settings, str) else settings.allocation) == "user"
        if self.trt.contexts_left == 0:
            return None
        self.trt.contexts_left -= 1
        return FakeContext(self, None if isinstance(settings, str) else settings)

    def create_runtime_config(self):
        settings = SimpleNamespace(cuda_graph_strategy="disabled", cache=None, create_runtime_cache=lambda: FakeCache(self.trt))
        settings.set_runtime_cache = lambda cache: setattr(settings, "cache", cache)
        settings.set_execution_context_allocation_strategy = lambda strategy: setattr(settings, "allocation", strategy)
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

    ComputeCapability = SimpleNamespace(
        **{f"SM{n}": f"sm{n}" for n in (75, 80, 86, 89, 120, 121)}, CURRENT="current", NONE="none"
    )
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none")
    IRuntimeCache = FakeCache

    def __init__(self, cuda: FakeCuda, version: str = "1.7.fake") -> None:
        super().__init__(cuda, version, "tensorrt_rtx")
        self.compiled = 0


class FakeContext:
    def __init__(self, engine: FakeEngine, settings: Any) -> None:
        self.engine, self.settings, self.shapes, self.addresses, self.profile = engine, settings, {}, {}, 0
        self.memory = (0, 0)
        self.state, self.ready = 0, -1
        """Of shapes and addresses, counted; and which of them was run without capturing."""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.engine.trt.cuda.streams
        self.shapes = {}
        self.profile = profile
        return profile < min(self.engine.num_optimization_profiles, self.engine.trt.profiles_taken)

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = memory, size

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
        cuda.calls["execute_async_v3"] += 1
        assert self.memory[1] >= self.engine.device_memory_size_v2
        cuda.check(*self.memory, device=True)
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
            self.engine.trt.runs[self.engine.name] += 1
            feeds = {node.name: self._view(addresses[node.name], shapes[node.name], node.name) for node in session.get_inputs()}
            for node, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                view = self._view(addresses[node.name], value.shape, node.name)
                view[...] = value if self.engine.name not in self.engine.trt.broken else 0
                if self.engine.name in self.engine.trt.right_alone and node.shape[0] == "batch":
                    view[1:] = 0

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
