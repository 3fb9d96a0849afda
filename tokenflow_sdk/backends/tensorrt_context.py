"""An execution context of a TensorRT engine, with a stream and memory of its own, and perhaps a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.backends.session import Array, Tensor
from tokenflow_sdk.bundle.schema import TensorSpec
from tokenflow_sdk.errors import BackendError

__all__ = ["ExecutionContext", "TensorRTCallError"]

B = TypeVar("B", DeviceBuffer, PinnedBuffer)

_ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be multiples of; CUDA's own always are, parts of an array may not be."""


class TensorRTCallError(Exception):
    """TensorRT returned false."""


class ExecutionContext:
    """A context, its stream and its memory, for calls of one of the engine's profiles. Used by one call at a time.

    Args:
        cuda: the GPU.
        context: TensorRT's.
        inputs, outputs: of the engine.
        replay: as `CudaGraphReplay`.
        profile: number of the profile.
        keep_alive: what the context needs, and must not outlive.

    Raises:
        TensorRTCallError: TensorRT refuses the profile.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        replay: bool,
        profile: int = 0,
        keep_alive: object = None,
    ) -> None:
        self._cuda, self._context, self._inputs, self._outputs = cuda, context, inputs, outputs
        self._stream = Stream(cuda)
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, PinnedBuffer] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[int, ...]] = {}
        self._replay = CudaGraphReplay(cuda, self._stream) if replay else None
        # After the context, as attributes are dropped in this order.
        self._keep_alive = keep_alive
        # The first one is chosen by itself.
        if profile:
            if not context.set_optimization_profile_async(profile, self._stream.handle):
                raise TensorRTCallError
            self._stream.synchronize()

    def run(self, feeds: Mapping[str, Tensor], fetch: Sequence[str]) -> list[Array]:
        """Run the engine and wait; copies of the outputs in `fetch`.

        Raises:
            TensorRTCallError: TensorRT refuses.
            BackendError: CUDA does.
        """
        for spec in self._inputs:
            self._feed(spec, feeds[spec.name])
        for spec in self._outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            self._bound[spec.name] = shape
            self._bind(spec.name, self._device_buffer(spec.name, _bytes(shape, spec)).pointer)
        self._execute()
        staged = []
        for spec in (spec for name in fetch for spec in self._outputs if spec.name == name):
            size = _bytes(self._bound[spec.name], spec)
            buffer = self._staging_buffer(spec.name, size)
            self._stream.to_host(buffer.pointer, self._device[spec.name].pointer, size)
            staged.append(buffer.view(self._bound[spec.name], np.dtype(spec.dtype)))
        self._stream.synchronize()
        return [view.copy() for view in staged]

    def run_resident(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[CudaArray]:
        """As `run`, with the outputs where they lie; the next run overwrites them."""
        self.run(feeds, fetch=())
        types = {spec.name: np.dtype(spec.dtype) for spec in self._outputs}
        buffers = ((name, self._device[name]) for name in names)
        return [CudaArray(self._cuda, buffer.pointer, self._bound[name], types[name], buffer) for name, buffer in buffers]

    def close(self) -> None:
        self._stream.synchronize()
        if self._replay is not None:
            self._replay.clear()
        self._context = self._keep_alive = None
        self._device.clear()
        self._host.clear()
        self._stream.close()

    def _feed(self, spec: TensorSpec, value: Tensor) -> None:
        if self._bound.get(spec.name) != value.shape:
            if not self._context.set_input_shape(spec.name, value.shape):
                raise TensorRTCallError
            self._bound[spec.name] = value.shape
        if isinstance(value, CudaArray):
            if value.pointer % _ALIGNMENT == 0:
                self._bind(spec.name, value.pointer)
                return
            buffer = self._device_buffer(spec.name, value.nbytes)
            self._stream.on_device(buffer.pointer, value.pointer, value.nbytes)
            self._bind(spec.name, buffer.pointer)
            return
        array = np.asarray(value)
        staging = self._staging_buffer(spec.name, array.nbytes)
        np.copyto(staging.view(array.shape, array.dtype), array)
        buffer = self._device_buffer(spec.name, array.nbytes)
        self._stream.to_device(buffer.pointer, staging.pointer, array.nbytes)
        self._bind(spec.name, buffer.pointer)

    def _bind(self, name: str, pointer: int) -> None:
        if self._addresses.get(name) != pointer:
            if not self._context.set_tensor_address(name, pointer):
                raise TensorRTCallError
            self._addresses[name] = pointer

    def _device_buffer(self, name: str, size: int) -> DeviceBuffer:
        """The tensor's device memory, at least `size` bytes; never shrinks."""
        return self._at_least(DeviceBuffer, self._device, name, size)

    def _staging_buffer(self, name: str, size: int) -> PinnedBuffer:
        return self._at_least(PinnedBuffer, self._host, name, size)

    def _at_least(self, kind: type[B], held: dict[str, B], name: str, size: int) -> B:
        """The first is exactly as large; one that replaces another has room, so that what grows by a little fits a while."""
        old = held.get(name)
        if old is None or old.size < size:
            held[name] = kind(self._cuda, size if old is None else size + size // 4)
        return held[name]

    def _execute(self) -> None:
        if self._replay is None:
            self._enqueue()
        else:
            key = (*sorted(self._bound.items()), *sorted(self._addresses.items()))
            self._replay.run(key, self._enqueue)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise TensorRTCallError


class CudaGraphReplay:
    """The CUDA graph of an execution context: a call like the one before it is captured, and launched as one from then on.

    A graph holds for its context as it was when captured, so a call of other shapes or addresses ends it. The first call after
    such a change is left alone, because TensorRT allocates and chooses then. Source: TensorRT's guide on CUDA graphs.
    """

    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream
        self._key: Any = None
        self._graph: Any = None
        self._refused = False
        """Capturing failed; everything is enqueued from then on."""

    def run(self, key: object, enqueue: Callable[[], None]) -> None:
        """Enqueue, or launch what doing so recorded.

        Args:
            key: of the shapes and addresses of the call.
            enqueue: gives the call to the stream.
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
        """What `enqueue` does as a CUDA graph; None where that cannot be recorded."""
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
        graph, self._graph, self._key = self._graph, None, None
        if graph is not None:
            self._cuda.call("cudaGraphExecDestroy", graph)


def _bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    return int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
