"""`ExecutionContext`: runs an engine in one CUDA stream, with its own buffers and, optionally, CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.backends.session import Array, Tensor
from tokenflow_sdk.bundle.schema import TensorSpec
from tokenflow_sdk.errors import BackendError

__all__ = ["MOST_GRAPHS", "ExecutionContext", "TensorRTCallError"]

B = TypeVar("B", DeviceBuffer, PinnedBuffer)

_ALIGNMENT = 256
"""Alignment in bytes that TensorRT requires of addresses. Allocations have it; slices of arrays may not."""
_TOGETHER = ""
"""Name of the buffers of all inputs that come from the host."""


class TensorRTCallError(Exception):
    """A call of TensorRT returned false. Sessions turn it into a BackendError."""


_MOST_SLACK = 2**26
"""Most bytes that a buffer is made larger than needed."""


MOST_GRAPHS = 64
"""Most sets of shapes of an engine that have a CUDA graph: more than the steps of one kind of request have. Each holds one of
TensorRT's contexts, which works in the memory that all share, and a recording of kernel launches, some hundred kilobytes."""


@dataclass
class _BoundContext:
    """A context of TensorRT's, with the shapes and addresses that it was given last."""

    context: Any
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shapes.get(name) != shape:
            if not self.context.set_input_shape(name, shape):
                raise TensorRTCallError
            self.shapes[name] = shape

    def bind(self, name: str, pointer: int) -> None:
        if self.addresses.get(name) != pointer:
            if not self.context.set_tensor_address(name, pointer):
                raise TensorRTCallError
            self.addresses[name] = pointer

    def enqueue(self, stream: Stream) -> None:
        if not self.context.execute_async_v3(stream.handle):
            raise TensorRTCallError


class ExecutionContext:
    """Runs an engine with any of its optimization profiles. Only one call at a time may use it.

    Each profile has a context of TensorRT's for itself, because changing the profile of one takes time and loses its shapes.
    They share a stream, the buffers of inputs and outputs, and the memory they work in.

    Args:
        cuda: the GPU.
        contexts: TensorRT's contexts, one for each optimization profile, without memory of their own.
        memory: bytes that the engine works in.
        inputs, outputs: tensors of the engine.
        create: makes another of TensorRT's contexts for a profile, or returns None if there is no memory for it: calls whose
            shapes repeat then run as CUDA graphs, see `CudaGraphs`. None: no graphs.
        largest: bytes that buffers of inputs and outputs have at least, by name: a graph holds while its buffers stay.
        keep_alive: objects that must live as long as the context.

    Raises:
        TensorRTCallError: TensorRT refuses a profile.
        BackendError: there is not enough GPU memory, or a CUDA call failed.
    """

    def __init__(
        self,
        cuda: Cuda,
        contexts: Sequence[Any],
        memory: int,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        create: Callable[[int], Any] | None = None,
        largest: Mapping[str, int] = {},
        keep_alive: object = None,
    ) -> None:
        self._cuda, self._inputs, self._outputs = cuda, inputs, outputs
        self._stream = Stream(cuda)
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, PinnedBuffer] = {}
        self._largest = largest
        self._profiles = [_BoundContext(context) for context in contexts]
        memory_buffer = DeviceBuffer(cuda, memory)
        new_context = None if create is None else partial(_new_context, create, self._stream, memory_buffer)
        self._graphs = None if new_context is None else CudaGraphs(cuda, self._stream, new_context)
        # Set after the contexts, because attributes are released in this order.
        self._keep_alive = keep_alive
        self._memory: DeviceBuffer | None = memory_buffer
        for number, context in enumerate(contexts):
            _equip(context, number, self._stream, memory_buffer)

    def run(self, profile: int, feeds: Mapping[str, Tensor], fetch: Sequence[str]) -> list[Array]:
        """Run the engine, wait for it, and return host copies of the outputs named in `fetch`.

        Args:
            profile: number of an optimization profile whose limits hold the inputs.
            feeds: the inputs.
            fetch: names of outputs.

        Raises:
            TensorRTCallError: TensorRT refuses the inputs or the execution.
            BackendError: a CUDA call failed, e.g. because memory ran out.
        """
        shapes = self._run(profile, feeds)
        staged = []
        for spec in (spec for name in fetch for spec in self._outputs if spec.name == name):
            size = _bytes(shapes[spec.name], spec)
            buffer = self._staging_buffer(spec.name, size)
            self._stream.to_host(buffer.pointer, self._device[spec.name].pointer, size)
            staged.append(buffer.view(shapes[spec.name], np.dtype(spec.dtype)))
        self._stream.synchronize()
        return [view.copy() for view in staged]

    def run_resident(self, profile: int, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[CudaArray]:
        """As `run`, but the outputs in `names` stay in GPU memory; the next run overwrites them."""
        shapes = self._run(profile, feeds)
        self._stream.synchronize()
        types = {spec.name: np.dtype(spec.dtype) for spec in self._outputs}
        buffers = ((name, self._device[name]) for name in names)
        return [CudaArray(self._cuda, buffer.pointer, shapes[name], types[name], buffer) for name, buffer in buffers]

    def _run(self, profile: int, feeds: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Enqueue a call; the shapes of its outputs."""
        key = (profile, *(feeds[spec.name].shape for spec in self._inputs))
        repeated = None if self._graphs is None else self._graphs.get(key)
        used = repeated.bound if repeated is not None else self._profiles[profile]
        self._feed(used, feeds)
        shapes = {spec.name: tuple(used.context.get_tensor_shape(spec.name)) for spec in self._outputs}
        for spec in self._outputs:
            used.bind(spec.name, self._device_buffer(spec.name, _bytes(shapes[spec.name], spec)).pointer)
        if self._graphs is None or repeated is None:
            used.enqueue(self._stream)
        elif not self._graphs.run(repeated):
            self._graphs = None
        return shapes

    def close(self) -> None:
        self._stream.synchronize()
        if self._graphs is not None:
            self._graphs.clear()
        self._graphs = None
        self._profiles.clear()
        self._keep_alive = self._memory = None
        self._device.clear()
        self._host.clear()
        self._stream.close()

    def _feed(self, used: _BoundContext, feeds: Mapping[str, Tensor]) -> None:
        on_host: dict[str, Array] = {}
        for spec in self._inputs:
            value = feeds[spec.name]
            used.set_shape(spec.name, value.shape)
            if not isinstance(value, CudaArray):
                on_host[spec.name] = np.asarray(value)
            elif value.pointer % _ALIGNMENT == 0:
                used.bind(spec.name, value.pointer)
            else:
                buffer = self._device_buffer(spec.name, value.nbytes)
                self._stream.on_device(buffer.pointer, value.pointer, value.nbytes)
                used.bind(spec.name, buffer.pointer)
        if on_host:
            self._upload(used, on_host)

    def _upload(self, used: _BoundContext, arrays: Mapping[str, Array]) -> None:
        """Copy inputs to the GPU side by side, in one copy."""
        places, size = {}, 0
        for name, array in arrays.items():
            places[name] = size
            size += _aligned(array.nbytes)
        staging = self._staging_buffer(_TOGETHER, size)
        for name, array in arrays.items():
            np.copyto(staging.view(array.shape, array.dtype, places[name]), array)
        most = sum(_aligned(self._largest.get(name, 0)) for name in arrays)
        buffer = self._device_buffer(_TOGETHER, max(size, most))
        self._stream.to_device(buffer.pointer, staging.pointer, size)
        for name in arrays:
            used.bind(name, buffer.pointer + places[name])

    def _device_buffer(self, name: str, size: int) -> DeviceBuffer:
        """The tensor's GPU buffer, of at least `size` bytes."""
        return self._at_least(DeviceBuffer, self._device, name, max(size, self._largest.get(name, 0)))

    def _staging_buffer(self, name: str, size: int) -> PinnedBuffer:
        return self._at_least(PinnedBuffer, self._host, name, size)

    def _at_least(self, kind: type[B], held: dict[str, B], name: str, size: int) -> B:
        """The tensor's buffer in `held`, replaced if it is smaller than `size`.

        A replacement is a little larger than needed, because some inputs grow a little at every call. The old one is freed
        first, so that there is never memory for both; the stream has no work left that uses it.
        """
        old = held.get(name)
        if old is not None and old.size >= size:
            return old
        slack = 0 if old is None else min(size // 4, _MOST_SLACK)
        held.pop(name, None)
        del old
        held[name] = kind(self._cuda, size + slack)
        return held[name]


def _equip(context: Any, profile: int, stream: Stream, memory: DeviceBuffer) -> None:
    """Give a new context its profile and the memory that it works in."""
    # A new context has profile 0.
    if profile and not context.set_optimization_profile_async(profile, stream.handle):
        raise TensorRTCallError
    stream.synchronize()
    context.set_device_memory(memory.pointer, memory.size)


def _new_context(create: Callable[[int], Any], stream: Stream, memory: DeviceBuffer, profile: int) -> _BoundContext | None:
    context = create(profile)
    if context is None:
        return None
    _equip(context, profile, stream, memory)
    return _BoundContext(context)


@dataclass
class _Repeated:
    """A context of TensorRT's for one set of shapes, and the CUDA graph of its call with the addresses in `recorded`."""

    bound: _BoundContext
    graph: Any = None
    recorded: dict[str, int] | None = None


class CudaGraphs:
    """Runs calls whose shapes repeat as CUDA graphs, which saves the time of launching kernels one by one.

    A graph is valid for the shapes and addresses it was captured with, and as long as its context is not given others. So a set
    of shapes gets a context of its own when it is seen again. Its first call there runs normally, because TensorRT may allocate
    memory and choose kernels in it; the next is captured, and later ones launch the graph. The sets of shapes that were used
    least recently are forgotten. Source: the TensorRT developer guide, "CUDA Graphs".

    Args:
        cuda: the GPU.
        stream: on which calls are enqueued, and on which none runs while this object is used.
        create: makes a context for an optimization profile; None if there is no memory for it.
    """

    def __init__(self, cuda: Cuda, stream: Stream, create: Callable[[int], _BoundContext | None]) -> None:
        self._cuda, self._stream, self._new_context = cuda, stream, create
        self._seen: OrderedDict[tuple[Any, ...], _Repeated | None] = OrderedDict()
        """By profile and shapes, the most recent last; None for those that were seen once."""

    def get(self, key: tuple[Any, ...]) -> _Repeated | None:
        """The context for a call; None at its first.

        Args:
            key: number of the profile, and the shapes of all inputs.
        """
        again = key in self._seen
        found = self._seen.pop(key, None)
        if again and found is None:
            context = self._new_context(key[0])
            found = None if context is None else _Repeated(context)
        self._seen[key] = found
        if len(self._seen) > MOST_GRAPHS:
            self._destroy(self._seen.popitem(last=False)[1])
        return found

    def run(self, call: _Repeated) -> bool:
        """Enqueue a call, or launch its graph.

        Returns:
            False, with a warning logged, if nothing can be captured: this object must not be used any more.
        """
        if call.recorded != call.bound.addresses:
            self._destroy(call)
            call.recorded = dict(call.bound.addresses)
            call.bound.enqueue(self._stream)
            return True
        if call.graph is None:
            call.graph = self._capture(call.bound)
        if call.graph is None:
            call.bound.enqueue(self._stream)
            self._stream.synchronize()
            self.clear()
            return False
        self._stream.launch(call.graph)
        return True

    def _capture(self, bound: _BoundContext) -> Any:
        """Capture a call as an executable CUDA graph; None, with a warning, if that fails."""
        recorded = None
        try:
            self._stream.begin_capture()
            try:
                bound.enqueue(self._stream)
            finally:
                recorded = self._stream.end_capture()
            return self._cuda.call("cudaGraphInstantiate", recorded, 0)
        except (TensorRTCallError, BackendError) as error:
            logging.getLogger("tokenflow_sdk").warning("Going on without CUDA graphs: %s", error or "TensorRT refuses")
            return None
        finally:
            if recorded is not None:
                with suppress(BackendError):
                    self._cuda.call("cudaGraphDestroy", recorded)

    def _destroy(self, call: _Repeated | None) -> None:
        if call is not None and call.graph is not None:
            graph, call.graph = call.graph, None
            self._cuda.call("cudaGraphExecDestroy", graph)

    def clear(self) -> None:
        """Destroy all graphs and their contexts."""
        while self._seen:
            self._destroy(self._seen.popitem()[1])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    return int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
