"""`ExecutionContext`: a TensorRT execution context with its own CUDA stream, buffers and, optionally, CUDA graph."""

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
"""Alignment in bytes that TensorRT requires of addresses. Allocations have it; slices of arrays may not."""


class TensorRTCallError(Exception):
    """A call of TensorRT returned false. Sessions turn it into a BackendError."""


class ExecutionContext:
    """Runs an engine with one of its optimization profiles. Only one call at a time may use it.

    Args:
        cuda: the GPU.
        context: TensorRT's execution context.
        inputs, outputs: tensors of the engine.
        replay: record repeated calls as a CUDA graph; see `CudaGraphReplay`.
        profile: number of the optimization profile.
        keep_alive: objects that must live as long as the context.

    Raises:
        TensorRTCallError: TensorRT refuses the profile.
        BackendError: a CUDA call failed.
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
        # Set after `_context`, because attributes are released in this order.
        self._keep_alive = keep_alive
        # A new context has profile 0.
        if profile:
            if not context.set_optimization_profile_async(profile, self._stream.handle):
                raise TensorRTCallError
            self._stream.synchronize()

    def run(self, feeds: Mapping[str, Tensor], fetch: Sequence[str]) -> list[Array]:
        """Run the engine, wait for it, and return host copies of the outputs named in `fetch`.

        Raises:
            TensorRTCallError: TensorRT refuses the inputs or the execution.
            BackendError: a CUDA call failed, e.g. because memory ran out.
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
        """As `run`, but the outputs in `names` stay in GPU memory; the next run overwrites them."""
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
        """The tensor's GPU buffer, of at least `size` bytes."""
        return self._at_least(DeviceBuffer, self._device, name, size)

    def _staging_buffer(self, name: str, size: int) -> PinnedBuffer:
        return self._at_least(PinnedBuffer, self._host, name, size)

    def _at_least(self, kind: type[B], held: dict[str, B], name: str, size: int) -> B:
        """The tensor's buffer in `held`, replaced if it is smaller than `size`.

        A replacement is a quarter larger than needed, because some inputs grow a little at every call.
        """
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
