"""A lane of a TensorRT session: an execution context with a stream, memory of its own, and perhaps CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenflow_sdk.backends.base import Array, Tensor
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.config import TensorSpec

__all__ = ["Lane", "Refused"]

_ALIGNMENT = 256
"""Bytes that TensorRT wants addresses to be multiples of; CUDA's own always are, parts of an array may not be."""
_CAPTURED = 16
"""CUDA graphs that a lane keeps, one for each set of shapes and addresses."""


class Refused(Exception):  # noqa: N818 - never reaches a user
    """TensorRT returned false."""


class Lane:
    """A context, its stream and its memory, for calls of one of the engine's profiles. Used by one call at a time.

    Raises:
        Refused: TensorRT refuses the profile.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        replay: bool,
        profile: int = 0,
    ) -> None:
        self._cuda, self._context, self._inputs, self._outputs = cuda, context, inputs, outputs
        self._stream = Stream(cuda)
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, PinnedBuffer] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[int, ...]] = {}
        self._replay = Replay(cuda, self._stream) if replay else None
        # The first one is chosen by itself.
        if profile:
            if not context.set_optimization_profile_async(profile, self._stream.handle):
                raise Refused
            self._stream.synchronize()

    def run(self, feeds: Mapping[str, Tensor], fetch: Sequence[str]) -> list[Array]:
        """Run the engine and wait; copies of the outputs in `fetch`.

        Raises:
            Refused: TensorRT refuses.
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
                raise Refused
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
                raise Refused
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
            raise Refused


class Replay:
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


def _bytes(shape: tuple[int, ...], spec: TensorSpec) -> int:
    return int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
