"""TensorRT and TensorRT-RTX: a serialized engine as a `Session`. One class for both, by the API that they share.

A session has one or more lanes: an execution context with a stream and memory of its own, so that as many calls run at once.
Results may stay on the GPU (`run_resident`) and be fed to another session there.
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tokenflow_sdk.backends.base import Array, Pages, Session, Tensor
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, CudaPages, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.config import GraphEntry, TensorSpec
from tokenflow_sdk.engine_build import make_log, started
from tokenflow_sdk.errors import ArgumentError, BackendError

__all__ = ["TensorRTSession"]

T = TypeVar("T")
_ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be multiples of; CUDA's own always are, parts of an array may not be."""
_CAPTURED = 16
"""CUDA graphs that a lane keeps, one for each set of shapes and addresses."""


class TensorRTSession(Session):
    """One engine.

    Args:
        engine: serialized.
        name: of the graph, for messages.
        entry: what bundle.json says of the graph's inputs and outputs.
        trt: the module, from `import_tensorrt`.
        cuda: the GPU.
        lanes: calls that may run at once; each has its own working memory.
        cuda_graphs: replay calls with shapes seen before as one launch. Saves launch time where a call is short.

    Raises:
        BackendError: the engine does not fit this TensorRT or GPU, or memory is short.
    """

    def __init__(
        self,
        engine: bytes,
        name: str,
        entry: GraphEntry,
        trt: Any,
        cuda: Cuda,
        lanes: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        self._trt, self._cuda, self._name, self._graphs = trt, cuda, name, cuda_graphs
        cuda.activate()
        self._log = make_log(trt)
        self._runtime = started(trt, self._log, lambda: trt.Runtime(self._log))
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise BackendError(
                f"The engine of {name} does not load in {trt.__name__} {trt.__version__}: "
                f"{'; '.join(self._log.errors) or 'it was built for another version or GPU'}.",
                "Build it again on this machine with `tokenflow build BUNDLE`.",
            )
        super().__init__(
            [_typed(trt, self._engine, spec) for spec in entry.inputs],
            [_typed(trt, self._engine, spec) for spec in entry.outputs],
        )
        self._limits = {spec.name: self._engine.get_tensor_profile_shape(spec.name, 0) for spec in self.inputs}
        self._lanes = [self._make_lane() for _ in range(lanes)]
        self._idle: queue.LifoQueue[_Lane] = queue.LifoQueue()
        for lane in self._lanes:
            self._idle.put(lane)

    def _make_lane(self) -> _Lane:
        context = _make_context(self._trt, self._engine, self._graphs)
        if context is None:
            size = self._engine.device_memory_size_v2
            raise BackendError(
                f"GPU {self._cuda.device} has no {size / 1e6:,.0f} MB left that {self._name} works in.",
                "Open fewer graphs or lanes, build with a smaller --batch, or free memory of other processes.",
            )
        replay = self._graphs and not hasattr(self._trt, "CudaGraphStrategy")
        return _Lane(self._cuda, context, self.inputs, self.outputs, replay)

    @property
    def device(self) -> str:
        return f"cuda:{self._cuda.device}"

    def largest(self, dim: str) -> int | None:
        found = [
            most
            for spec in self.inputs
            for name, most in zip(spec.shape, self._limits[spec.name][2], strict=True)
            if name == dim
        ]
        return min(found, default=None)

    def make_pages(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> Pages:
        return CudaPages(self._cuda, shape, dtype)

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        return self._on_lane(feeds, lambda lane: lane.run(feeds, outputs))

    def _infer_resident(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Tensor]:
        return self._on_lane(feeds, lambda lane: lane.run_resident(feeds, outputs))

    def _on_lane(self, feeds: Mapping[str, Tensor], run: Callable[[_Lane], Sequence[T]]) -> Sequence[T]:
        self._check_limits(feeds)
        self._cuda.activate()
        lane = self._idle.get()
        try:
            return run(lane)
        except _Refused:
            raise BackendError(
                f"TensorRT failed to run {self._name}: {'; '.join(list(self._log.errors)[-3:]) or 'it does not say why'}.",
                "If memory ran out, use smaller batches (batch_limit=1) or fewer graphs at once.",
            ) from None
        finally:
            self._idle.put(lane)

    def _check_limits(self, feeds: Mapping[str, Tensor]) -> None:
        for spec in self.inputs:
            least, _, most = self._limits[spec.name]
            for dim, low, size, high in zip(spec.shape, least, feeds[spec.name].shape, most, strict=True):
                if not low <= size <= high:
                    raise ArgumentError(
                        f"The engine of {self._name} was built for a {dim} of {low} to {high}, not {size}.",
                        f"Use a batch_limit= of at most {high}, or build another with `tokenflow build --batch`."
                        if dim == "batch"
                        else "Build it again with a profile that holds it (`tokenflow build`).",
                    )

    def close(self) -> None:
        self._cuda.activate()
        for lane in self._lanes:
            lane.close()
        self._lanes = []
        self._engine = self._runtime = None


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """TensorRT returned false."""


class _Lane:
    """A context, its stream and its memory. Used by one call at a time."""

    def __init__(
        self, cuda: Cuda, context: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], replay: bool
    ) -> None:
        self._cuda, self._context, self._inputs, self._outputs = cuda, context, inputs, outputs
        self._stream = Stream(cuda)
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, PinnedBuffer] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[int, ...]] = {}
        self._replay = _Replay(cuda, self._stream) if replay else None

    def run(self, feeds: Mapping[str, Tensor], fetch: Sequence[str]) -> list[Array]:
        """Run the engine and wait; copies of the outputs in `fetch`.

        Raises:
            _Refused: TensorRT refuses.
            BackendError: CUDA does.
        """
        for spec in self._inputs:
            self._feed(spec, feeds[spec.name])
        for spec in self._outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            self._bound[spec.name] = shape
            self._bind(spec.name, self._room(spec.name, _bytes(shape, spec)).pointer)
        self._execute()
        staged = []
        for spec in (spec for name in fetch for spec in self._outputs if spec.name == name):
            size = _bytes(self._bound[spec.name], spec)
            buffer = self._staging(spec.name, size)
            self._stream.to_host(buffer.pointer, self._device[spec.name].pointer, size)
            staged.append(buffer.view(self._bound[spec.name], np.dtype(spec.dtype)))
        self._stream.synchronize()
        return [view.copy() for view in staged]

    def run_resident(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[CudaArray]:
        """As `run`, with the outputs where they lie; the next run overwrites them."""
        self.run(feeds, fetch=())
        types = {spec.name: np.dtype(spec.dtype) for spec in self._outputs}
        rooms = ((name, self._device[name]) for name in names)
        return [CudaArray(self._cuda, room.pointer, self._bound[name], types[name], room) for name, room in rooms]

    def close(self) -> None:
        self._stream.synchronize()
        if self._replay is not None:
            self._replay.clear()
        self._context = None
        self._device.clear()
        self._host.clear()
        self._stream.close()

    def _feed(self, spec: TensorSpec, value: Tensor) -> None:
        if self._bound.get(spec.name) != value.shape:
            if not self._context.set_input_shape(spec.name, value.shape):
                raise _Refused
            self._bound[spec.name] = value.shape
        if isinstance(value, CudaArray):
            if value.pointer % _ALIGNMENT == 0:
                self._bind(spec.name, value.pointer)
                return
            buffer = self._room(spec.name, value.nbytes)
            self._stream.on_device(buffer.pointer, value.pointer, value.nbytes)
            self._bind(spec.name, buffer.pointer)
            return
        array = np.asarray(value)
        staging = self._staging(spec.name, array.nbytes)
        np.copyto(staging.view(array.shape, array.dtype), array)
        buffer = self._room(spec.name, array.nbytes)
        self._stream.to_device(buffer.pointer, staging.pointer, array.nbytes)
        self._bind(spec.name, buffer.pointer)

    def _bind(self, name: str, pointer: int) -> None:
        if self._addresses.get(name) != pointer:
            if not self._context.set_tensor_address(name, pointer):
                raise _Refused
            self._addresses[name] = pointer

    def _room(self, name: str, size: int) -> DeviceBuffer:
        """The tensor's device memory, at least `size` bytes; never shrinks."""
        if name not in self._device or self._device[name].size < size:
            self._device[name] = DeviceBuffer(self._cuda, size)
        return self._device[name]

    def _staging(self, name: str, size: int) -> PinnedBuffer:
        if name not in self._host or self._host[name].size < size:
            self._host[name] = PinnedBuffer(self._cuda, size)
        return self._host[name]

    def _execute(self) -> None:
        if self._replay is None:
            self._enqueue()
        else:
            key = (*sorted(self._bound.items()), *sorted(self._addresses.items()))
            self._replay.run(key, self._enqueue)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise _Refused


class _Replay:
    """CUDA graphs of a lane: a call seen for the second time is captured, and launched as one from then on.

    The first time is left alone because TensorRT may still allocate and choose then.
    """

    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream
        self._seen: OrderedDict[Any, Any] = OrderedDict()

    def run(self, key: Any, enqueue: Any) -> None:
        if key not in self._seen:
            enqueue()
            self._seen[key] = None
            if len(self._seen) > _CAPTURED:
                self._destroy(self._seen.popitem(last=False)[1])
            return
        self._seen.move_to_end(key)
        if self._seen[key] is None:
            self._seen[key] = self._capture(enqueue)
        self._stream.launch(self._seen[key])

    def _capture(self, enqueue: Any) -> Any:
        self._stream.begin_capture()
        try:
            enqueue()
        finally:
            graph = self._stream.end_capture()
        executable = self._cuda.call("cudaGraphInstantiate", graph, 0)
        self._cuda.call("cudaGraphDestroy", graph)
        return executable

    def clear(self) -> None:
        while self._seen:
            self._destroy(self._seen.popitem()[1])

    def _destroy(self, executable: Any) -> None:
        if executable is not None:
            self._cuda.call("cudaGraphExecDestroy", executable)


def _make_context(trt: Any, engine: Any, cuda_graphs: bool) -> Any:
    """An execution context, or None where memory is short. TensorRT-RTX replays graphs by itself when told to."""
    if not cuda_graphs or not hasattr(trt, "CudaGraphStrategy"):
        return engine.create_execution_context()
    settings = engine.create_runtime_config()
    settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(settings)


def _typed(trt: Any, engine: Any, spec: TensorSpec) -> TensorSpec:
    """The bundle's tensor with the type that the engine gives it: half pages in half-precision engines."""
    types = trt.DataType
    names = {
        types.FLOAT: "float32",
        types.HALF: "float16",
        # NumPy has no bfloat16; such pages never leave the GPU, so only their size matters.
        types.BF16: "uint16",
        types.INT32: "int32",
        types.INT64: "int64",
        types.UINT8: "uint8",
    }
    return TensorSpec(spec.name, names[engine.get_tensor_dtype(spec.name)], spec.shape)


def _bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    return int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
