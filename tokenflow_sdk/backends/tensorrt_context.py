"""`ExecutionContext`: runs an engine in one CUDA stream, with its own buffers and, optionally, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.backends.session import Array, Tensor
from tokenflow_sdk.bundle.schema import TensorSpec
from tokenflow_sdk.errors import BackendError

__all__ = ["ExecutionContext", "TensorRTCallError"]

B = TypeVar("B", DeviceBuffer, PinnedBuffer)

_ALIGNMENT = 256
"""Alignment in bytes that TensorRT requires of addresses. Allocations have it; slices of arrays may not."""


class TensorRTCallError(Exception):
    """A call of TensorRT returned false. Sessions turn it into a BackendError."""


_MOST_SLACK = 2**26
"""Most bytes that a buffer is made larger than needed."""


@dataclass
class _ProfileContext:
    """TensorRT's context of one optimization profile, with the shapes and addresses that it was given last."""

    context: Any
    replay: CudaGraphReplay | None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)

    def bind(self, name: str, pointer: int) -> None:
        if self.addresses.get(name) != pointer:
            if not self.context.set_tensor_address(name, pointer):
                raise TensorRTCallError
            self.addresses[name] = pointer


class ExecutionContext:
    """Runs an engine with any of its optimization profiles. Only one call at a time may use it.

    Each profile has a context of TensorRT's for itself, because changing the profile of one takes time and loses its shapes.
    They share a stream, the buffers of inputs and outputs, and the memory they work in.

    Args:
        cuda: the GPU.
        contexts: TensorRT's contexts, one for each optimization profile, without memory of their own.
        memory: bytes that the engine works in.
        inputs, outputs: tensors of the engine.
        replay: record repeated calls as a CUDA graph; see `CudaGraphReplay`.
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
        replay: bool,
        keep_alive: object = None,
    ) -> None:
        self._cuda, self._inputs, self._outputs = cuda, inputs, outputs
        self._stream = Stream(cuda)
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, PinnedBuffer] = {}
        self._profiles = [
            _ProfileContext(context, CudaGraphReplay(cuda, self._stream) if replay else None) for context in contexts
        ]
        # Set after the contexts, because attributes are released in this order.
        self._keep_alive = keep_alive
        self._memory: DeviceBuffer | None = DeviceBuffer(cuda, memory)
        for number, context in enumerate(contexts):
            # A new context has profile 0.
            if number and not context.set_optimization_profile_async(number, self._stream.handle):
                raise TensorRTCallError
            self._stream.synchronize()
            context.set_device_memory(self._memory.pointer, memory)

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
        used = self._profiles[profile]
        for spec in self._inputs:
            self._feed(used, spec, feeds[spec.name])
        for spec in self._outputs:
            shape = tuple(used.context.get_tensor_shape(spec.name))
            used.shapes[spec.name] = shape
            used.bind(spec.name, self._device_buffer(spec.name, _bytes(shape, spec)).pointer)
        self._execute(used)
        staged = []
        for spec in (spec for name in fetch for spec in self._outputs if spec.name == name):
            size = _bytes(used.shapes[spec.name], spec)
            buffer = self._staging_buffer(spec.name, size)
            self._stream.to_host(buffer.pointer, self._device[spec.name].pointer, size)
            staged.append(buffer.view(used.shapes[spec.name], np.dtype(spec.dtype)))
        self._stream.synchronize()
        return [view.copy() for view in staged]

    def run_resident(self, profile: int, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[CudaArray]:
        """As `run`, but the outputs in `names` stay in GPU memory; the next run overwrites them."""
        self.run(profile, feeds, fetch=())
        shapes = self._profiles[profile].shapes
        types = {spec.name: np.dtype(spec.dtype) for spec in self._outputs}
        buffers = ((name, self._device[name]) for name in names)
        return [CudaArray(self._cuda, buffer.pointer, shapes[name], types[name], buffer) for name, buffer in buffers]

    def close(self) -> None:
        self._stream.synchronize()
        for profile in self._profiles:
            if profile.replay is not None:
                profile.replay.clear()
        self._profiles.clear()
        self._keep_alive = self._memory = None
        self._device.clear()
        self._host.clear()
        self._stream.close()

    def _feed(self, used: _ProfileContext, spec: TensorSpec, value: Tensor) -> None:
        if used.shapes.get(spec.name) != value.shape:
            if not used.context.set_input_shape(spec.name, value.shape):
                raise TensorRTCallError
            used.shapes[spec.name] = value.shape
        if isinstance(value, CudaArray):
            if value.pointer % _ALIGNMENT == 0:
                used.bind(spec.name, value.pointer)
                return
            buffer = self._device_buffer(spec.name, value.nbytes)
            self._stream.on_device(buffer.pointer, value.pointer, value.nbytes)
            used.bind(spec.name, buffer.pointer)
            return
        array = np.asarray(value)
        staging = self._staging_buffer(spec.name, array.nbytes)
        np.copyto(staging.view(array.shape, array.dtype), array)
        buffer = self._device_buffer(spec.name, array.nbytes)
        self._stream.to_device(buffer.pointer, staging.pointer, array.nbytes)
        used.bind(spec.name, buffer.pointer)

    def _device_buffer(self, name: str, size: int) -> DeviceBuffer:
        """The tensor's GPU buffer, of at least `size` bytes."""
        return self._at_least(DeviceBuffer, self._device, name, size)

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

    def _execute(self, used: _ProfileContext) -> None:
        def enqueue() -> None:
            if not used.context.execute_async_v3(self._stream.handle):
                raise TensorRTCallError

        if used.replay is None:
            enqueue()
        else:
            used.replay.run((*sorted(used.shapes.items()), *sorted(used.addresses.items())), enqueue)


class CudaGraphReplay:
    """Records an execution context's calls as a CUDA graph, which saves the time of launching kernels one by one.

    A graph is valid for the shapes and addresses it was captured with. The first call with new ones runs normally, because
    TensorRT may allocate memory and choose kernels in it; the second is captured; later ones launch the graph. Source: the
    TensorRT developer guide, "CUDA Graphs".
    """

    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream
        self._key: Any = None
        self._graph: Any = None
        self._refused = False
        """Whether capturing failed, after which all calls run normally."""

    def run(self, key: object, enqueue: Callable[[], None]) -> None:
        """Run a call: enqueue it, or launch the graph captured from an equal call.

        Args:
            key: equal for calls with the same shapes and addresses.
            enqueue: enqueues the call on the stream.
        """
        if key != self._key:
            self.clear()
            self._key = key
            enqueue()
            return
        if self._graph is None and not self._refused:
            self._graph = self._capture(enqueue)
        if self._graph is None:
            enqueue()
        else:
            self._stream.launch(self._graph)

    def _capture(self, enqueue: Callable[[], None]) -> Any:
        """Capture `enqueue` as an executable CUDA graph; None, with a warning, if that fails."""
        recorded = None
        try:
            self._stream.begin_capture()
            try:
                enqueue()
            finally:
                recorded = self._stream.end_capture()
            return self._cuda.call("cudaGraphInstantiate", recorded, 0)
        except (TensorRTCallError, BackendError) as error:
            self._refused = True
            logging.getLogger("tokenflow_sdk").warning("Going on without CUDA graphs: %s", error or "TensorRT refuses")
            return None
        finally:
            if recorded is not None:
                with suppress(BackendError):
                    self._cuda.call("cudaGraphDestroy", recorded)

    def clear(self) -> None:
        """Destroy the captured graph."""
        graph, self._graph, self._key = self._graph, None, None
        if graph is not None:
            self._cuda.call("cudaGraphExecDestroy", graph)


def _bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    return int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
