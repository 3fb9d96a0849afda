"""Run serialized engines of TensorRT and TensorRT-RTX as sessions, with the part of the Python API that both share.

A session has as many execution contexts as calls can run at once. Each has its own stream, buffers and working memory.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tokenflow_sdk.backends.cuda import Cuda, joined
from tokenflow_sdk.backends.cuda_pages import CudaPages
from tokenflow_sdk.backends.engine_file import load_engine
from tokenflow_sdk.backends.session import Array, Pages, Session, Tensor
from tokenflow_sdk.backends.tensorrt_context import ExecutionContext, TensorRTCallError
from tokenflow_sdk.backends.tensorrt_module import create_or_raise, tensorrt_logger
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.errors import ArgumentError, BackendError, OutputError
from tokenflow_sdk.files import read_regular, write_atomic

__all__ = ["TensorRTSession"]

T = TypeVar("T")

_SIZES_PER_DOUBLING = {"batch": 2, "queries": 4, "table": 4, "seen": 1, "window": 1}
"""How many sizes of a dynamic dimension `padded` gives between one power of two and the next. It adds at most a half, a
quarter or the whole of a size: little to what costs time, more to lists."""

_REBUILD = "Build it again on this machine with `tokenflow build BUNDLE`; if memory ran out, free some first."


class TensorRTSession(Session):
    """A deserialized engine.

    Args:
        engine: file of the serialized engine.
        sha256: what its SHA-256 must be, in lower-case hex.
        name: name of the graph, for error messages.
        entry: the graph's entry in bundle.json.
        trt: the module, from `import_tensorrt`.
        cuda: the GPU.
        execution_contexts: number of calls that can run at once; each context has its own working memory.
        cuda_graphs: run calls whose shapes repeat as CUDA graphs, which saves launch time where calls are short. Inputs and
            outputs then have buffers for the engine's largest shapes from the first call on.
        kernels: file for the kernels that TensorRT-RTX compiles at run time, read now and written by `close`; None keeps none.

    Raises:
        BackendError: the engine was built for another version or GPU, is damaged or cannot be read, or there is not enough GPU
            memory.
    """

    def __init__(
        self,
        engine: Path,
        sha256: str,
        name: str,
        entry: GraphEntry,
        trt: Any,
        cuda: Cuda,
        execution_contexts: int = 1,
        cuda_graphs: bool = False,
        kernels: Path | None = None,
    ) -> None:
        self._trt, self._cuda, self._name, self._graphs = trt, cuda, name, cuda_graphs
        self._log = tensorrt_logger(trt)
        self._kernels = _KernelCache(kernels) if kernels is not None and hasattr(trt, "IRuntimeCache") else None
        with cuda.active():
            self._engine = self._deserialize(engine, sha256)
            super().__init__(
                [_with_engine_dtype(trt, self._engine, spec) for spec in entry.inputs],
                [_with_engine_dtype(trt, self._engine, spec) for spec in entry.outputs],
            )
            self._profiles = [_Profile(self._engine, self.inputs, i) for i in range(self._engine.num_optimization_profiles)]
            self._execution_contexts = execution_contexts
            self._idle: queue.LifoQueue[ExecutionContext | None] = queue.LifoQueue()
            """Execution contexts that no call uses, and None once the session is closed."""
            for _ in range(execution_contexts):
                self._idle.put(self._make_context())

    def _deserialize(self, path: Path, sha256: str) -> Any:
        trt, log = self._trt, self._log
        with log.collect() as messages:
            self._runtime = create_or_raise(trt, messages, lambda: trt.Runtime(log))
            engine = load_engine(trt, self._runtime, path, sha256)
        if engine is None:
            raise BackendError(
                f"The engine of {self._name} does not load in {trt.__name__} {trt.__version__}: "
                f"{'; '.join(messages.errors) or 'it was built for another version or GPU'}.",
                _REBUILD,
            )
        return engine

    def _make_context(self) -> ExecutionContext:
        trt, engine = self._trt, self._engine
        settings = [_settings(trt, engine, self._graphs, self._kernels, profile) for profile in self._profiles]

        def create(profile: int) -> Any:
            return engine.create_execution_context(settings[profile])

        contexts = [create(number) for number in range(len(self._profiles))]
        memory = engine.device_memory_size_v2
        if any(context is None for context in contexts):
            raise BackendError(
                f"GPU {self._cuda.device} has no {memory / 1e6:,.0f} MB left that {self._name} works in.",
                "Open fewer graphs or execution_contexts, build with a smaller --batch-limit, or free memory of others.",
            )
        # TensorRT-RTX records graphs for all shapes by itself.
        replay = create if self._graphs and not hasattr(trt, "CudaGraphStrategy") else None
        largest = self._largest_sizes() if self._graphs else {}
        keep_alive = (settings, self._kernels, engine)
        try:
            return ExecutionContext(self._cuda, contexts, memory, self.inputs, self.outputs, replay, largest, keep_alive)
        except TensorRTCallError:
            raise BackendError(
                f"TensorRT does not take the shapes that the engine of {self._name} was built for.", _REBUILD
            ) from None

    def _largest_sizes(self) -> dict[str, int]:
        """Most bytes of each input and output."""
        return {
            spec.name: max(
                math.prod(dim if isinstance(dim, int) else profile.sizes[dim][1] for dim in spec.shape)
                for profile in self._profiles
            )
            * np.dtype(spec.dtype).itemsize
            for spec in (*self.inputs, *self.outputs)
        }

    @property
    def device(self) -> str:
        return f"cuda:{self._cuda.device}"

    def max_size(self, dim: str) -> int | None:
        return max((profile.sizes[dim][1] for profile in self._profiles if dim in profile.sizes), default=None)

    def limits(self, *dims: str) -> list[tuple[int, ...]]:
        return [tuple(profile.sizes[dim][1] for dim in dims) for profile in self._profiles]

    def padded(self, dim: str, size: int) -> int:
        per_doubling, most = _SIZES_PER_DOUBLING.get(dim), self.max_size(dim)
        if per_doubling is None or most is None:
            return size
        step = max(1, (1 << max(0, (size - 1).bit_length() - 1)) // per_doubling)
        return max(size, min(-(-size // step) * step, most))

    def make_pages(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> Pages:
        return CudaPages(self._cuda, shape, dtype)

    def joined(self, parts: Iterable[Tensor], length: int) -> Tensor:
        return joined(self._cuda, parts, length)

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        return self._run_on_context(feeds, lambda execution, profile: execution.run(profile, feeds, outputs))

    def _infer_resident(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Tensor]:
        return self._run_on_context(feeds, lambda execution, profile: execution.run_resident(profile, feeds, outputs))

    def _run_on_context(self, feeds: Mapping[str, Tensor], run: Callable[[ExecutionContext, int], Sequence[T]]) -> Sequence[T]:
        profile = self._select_profile(feeds)
        execution = self._idle.get()
        if execution is None:
            self._idle.put(None)
            raise BackendError(f"The engine of {self._name} was closed.", "Open the bundle again.")
        try:
            with self._cuda.active(), self._log.collect() as messages:
                return run(execution, profile)
        except TensorRTCallError:
            raise BackendError(
                f"TensorRT failed to run {self._name}: {'; '.join(messages.errors) or 'it does not say why'}.",
                "If memory ran out, use smaller batches (batch_limit=1) or fewer graphs at once.",
            ) from None
        finally:
            self._idle.put(execution)

    def _select_profile(self, feeds: Mapping[str, Tensor]) -> int:
        """Number of the first optimization profile whose limits hold the inputs.

        Raises:
            ArgumentError: no profile holds them.
        """
        sizes = {dim: size for spec in self.inputs for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)}
        misses = []
        for number, profile in enumerate(self._profiles):
            missed = {dim: limits for dim, limits in profile.sizes.items() if not limits[0] <= sizes[dim] <= limits[1]}
            if not missed:
                return number
            misses.append(missed)
        # The error names a limit of the nearest profile: fewest dimensions out of range, then the largest limit.
        nearest = min(misses, key=lambda missed: (len(missed), -max(high for _, high in missed.values())))
        dim, (low, high) = next(iter(nearest.items()))
        raise ArgumentError(
            f"The engine of {self._name} was built for {dim} from {low} to {high}, not {sizes[dim]}.",
            f"Use a batch_limit= of at most {high}, or build another with `tokenflow build --batch-limit`."
            if dim == "batch"
            else "Build it again with a profile that holds it (`tokenflow build`).",
        )

    def close(self) -> None:
        """Wait for running calls and free the engine; later calls raise BackendError. May be called more than once."""
        execution_contexts, self._execution_contexts = self._execution_contexts, 0
        with self._cuda.active():
            idle = [self._idle.get() for _ in range(execution_contexts)]
            if self._kernels is not None:
                self._kernels.save()
            for execution in idle:
                if execution is not None:
                    execution.close()
            self._kernels = self._engine = self._runtime = None
        if execution_contexts:
            self._idle.put(None)


class _Profile:
    """An optimization profile of an engine; `sizes` holds the smallest and the largest size of each dynamic dimension."""

    def __init__(self, engine: Any, inputs: Sequence[TensorSpec], number: int) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        for spec in inputs:
            least, _, most = engine.get_tensor_profile_shape(spec.name, number)
            for dim, low, high in zip(spec.shape, least, most, strict=True):
                if isinstance(dim, str):
                    first = self.sizes.get(dim, (low, high))
                    self.sizes[dim] = max(low, first[0]), min(high, first[1])

    @property
    def has_few_shapes(self) -> bool:
        """Whether calls have few distinct shapes: all but pieces of a prompt, which are one row of any number of queries.

        A generator pads its prompts; see `Session.padded`.
        """
        return self.sizes.get("queries", (1, 1))[1] == 1 or self.sizes.get("batch", (1, 1))[1] > 1


class _KernelCache:
    """Stores TensorRT-RTX's runtime cache, the kernels it compiled for this GPU, in a file for the next start.

    Errors in reading or writing the file are ignored: kernels are then compiled again.

    Args:
        path: the file. TensorRT-RTX itself checks that its content fits the GPU, driver and version.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stored = path, b""
        self._cache: Any = None
        with suppress(OSError):
            self._stored = read_regular(path, 2**30)

    def attach(self, settings: Any) -> None:
        """Give the cache to the settings of an execution context; all contexts of an engine share it."""
        if self._cache is None:
            self._cache = settings.create_runtime_cache()
            if self._stored and not self._cache.deserialize(self._stored):
                self._stored = b""
        settings.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache to the file if it has changed."""
        found = None if self._cache is None else self._cache.serialize()
        if found is not None and (data := bytes(found)) != self._stored:
            with suppress(OutputError):
                write_atomic(self._path, data)


def _settings(trt: Any, engine: Any, cuda_graphs: bool, kernels: _KernelCache | None, profile: _Profile) -> Any:
    """What `create_execution_context` is given: settings of TensorRT-RTX, or TensorRT's way of allocating memory.

    A context works in memory that it is given, so that those of several profiles can share it.
    """
    own_memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return own_memory
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(own_memory)
    # The default, lazy specialization, replaces kernels in the background: results would change between calls, and differ from
    # the certified ones. Eager specialization compiles kernels at the first call of a shape, which pays where shapes repeat.
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    settings.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if profile.has_few_shapes else strategies.NONE
    if cuda_graphs:
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    if kernels is not None:
        kernels.attach(settings)
    return settings


def _with_engine_dtype(trt: Any, engine: Any, spec: TensorSpec) -> TensorSpec:
    """A tensor of bundle.json with the type it has in the engine, e.g. float16 for the pages of half-precision engines."""
    types = trt.DataType
    names = {
        types.FLOAT: "float32",
        types.HALF: "float16",
        # NumPy has no bfloat16. Only pages have this type, and they stay on the GPU, so that only its size matters.
        types.BF16: "uint16",
        types.INT32: "int32",
        types.INT64: "int64",
        types.UINT8: "uint8",
    }
    return TensorSpec(spec.name, names[engine.get_tensor_dtype(spec.name)], spec.shape)
