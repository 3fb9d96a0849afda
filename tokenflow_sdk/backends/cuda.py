"""GPU buffers, copies and streams with cuda-bindings; needs no PyTorch."""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from tokenflow_sdk.backends.session import Array, DeviceArray, Tensor
from tokenflow_sdk.errors import BackendError, MissingPackageError

__all__ = ["Cuda", "CudaArray", "DeviceBuffer", "PinnedBuffer", "Stream", "driver_problem", "joined"]


class Cuda:
    """The CUDA runtime, for one GPU.

    Args:
        device: number of the GPU.

    Raises:
        MissingPackageError: cuda-bindings is not installed.
        BackendError: there is no such GPU, or its driver is missing or too old.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            self.runtime: Any = importlib.import_module("cuda.bindings.runtime")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise MissingPackageError(
                f"Using a GPU needs cuda-bindings, which is not installed ({error}).", "Run `pip install cuda-bindings`."
            ) from None
        self.device = device
        status, count = self.runtime.cudaGetDeviceCount()
        if int(status) != 0 or not count:
            raise BackendError(f"There is no usable GPU here ({status.name}).", _USABLE.get(status.name, _DRIVER))
        if device >= count:
            raise BackendError(f"There is no GPU {device} here, only {count}.", f"Use device='cuda:{count - 1}' or less.")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context manager: make this GPU the calling thread's current one, and restore the previous one afterwards.

        A previous GPU on which the process has no context is not restored, because that would create one, which takes hundreds
        of megabytes of its memory.
        """
        before = self.call("cudaGetDevice")
        self.call("cudaSetDevice", self.device)
        try:
            yield
        finally:
            if before != self.device and self._in_use(before):
                self.call("cudaSetDevice", before)

    def _in_use(self, device: int) -> bool:
        """Whether the process has an active context on GPU `device`."""
        status, _, active = self._driver.cuDevicePrimaryCtxGetState(device)
        return int(status) == 0 and bool(active)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime.

        Args:
            name: its name, e.g. `cudaMemcpy`.
            arguments: its arguments.

        Returns:
            Its first result after the status; None if it has none.

        Raises:
            BackendError: the status is an error.
        """
        return self._checked(name, getattr(self.runtime, name)(*arguments))

    def call_driver(self, name: str, *arguments: Any) -> Any:
        """As `call`, of the CUDA driver, e.g. `cuLaunchKernel`."""
        return self._checked(name, getattr(self._driver, name)(*arguments))

    def _checked(self, name: str, found: Sequence[Any]) -> Any:
        status, *results = found
        if int(status) != 0:
            raise BackendError(
                f"{name} failed on GPU {self.device} with {status.name}.",
                "Look at `nvidia-smi`; after an error of the GPU itself the process must be started again.",
            )
        return results[0] if results else None

    @property
    def architecture(self) -> str:
        """Compute capability of the GPU, e.g. `sm89`."""
        properties = self.call("cudaGetDeviceProperties", self.device)
        return f"sm{properties.major}{properties.minor}"

    @property
    def memory(self) -> int:
        """Bytes of memory that the GPU has; 0 if CUDA cannot tell."""
        with self.active():
            return _memory(self)[1]

    @property
    def model(self) -> str:
        """Name of the GPU, e.g. `NVIDIA L4`."""
        name = self.call("cudaGetDeviceProperties", self.device).name
        return (name.split(b"\0")[0].decode(errors="replace") if isinstance(name, bytes) else str(name)).strip()

    def copy_from_device(self, array: Array, pointer: int) -> None:
        """Copy GPU memory at `pointer` into a host array, and wait for it."""
        with self.active():
            kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpy", array.ctypes.data, pointer, array.nbytes, kind)

    def copy_rows_from_device(self, array: Array, pointer: int, pitch: int) -> None:
        """Copy rows of GPU memory that begin `pitch` bytes apart into the rows of a host array, and wait for them."""
        width = array.nbytes // len(array)
        with self.active():
            kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpy2D", array.ctypes.data, width, pointer, pitch, width, len(array), kind)

    def free(self, name: str, pointer: Any) -> None:
        """Release a resource with the CUDA function `name`. Errors are ignored, because destructors call this."""
        with suppress(BackendError), self.active():
            getattr(self.runtime, name)(pointer)


_DRIVER = "Install or update the NVIDIA driver (`nvidia-smi` must list the GPU), or use device='cpu'."
_USABLE = {
    "cudaErrorInsufficientDriver": "Install or update the NVIDIA driver (`nvidia-smi` must list the GPU). cuda-bindings 13 "
    "needs 580 or newer (CUDA 13); `pip install 'cuda-bindings<13'` serves older ones. Or use device='cpu'.",
    "cudaErrorNoDevice": "See whether `nvidia-smi` lists the GPU and CUDA_VISIBLE_DEVICES hides none, or use device='cpu'.",
}
"""Hint for each status of `cudaGetDeviceCount` that means that no GPU can be used."""


def driver_problem() -> str | None:
    """Why no NVIDIA GPU can be used, for error messages; None if one can. Asks the driver and needs no Python package."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return "there is no NVIDIA driver here"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        return f"the NVIDIA driver finds no GPU (CUDA error {status})" if status else "the NVIDIA driver finds no GPU"
    return None


class Stream:
    """A non-blocking CUDA stream, on which copies and engine calls run in order.

    Only `synchronize` waits. Pointers are addresses; sizes, pitches and widths are in bytes. All methods raise BackendError if
    their CUDA call fails.

    Args:
        cuda: the GPU.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._stream: Any = None
        self._stream = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)

    @property
    def handle(self) -> int:
        """The CUDA handle as an int, as TensorRT takes it."""
        return int(self._stream)

    def to_device(self, pointer: int, host: int, size: int) -> None:
        """Copy host memory to GPU memory at `pointer`."""
        self._copy(pointer, host, size, self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def to_host(self, host: int, pointer: int, size: int) -> None:
        """Copy GPU memory at `pointer` to host memory."""
        self._copy(host, pointer, size, self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def on_device(self, target: int, source: int, size: int) -> None:
        """Copy GPU memory to GPU memory."""
        self._copy(target, source, size, self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` rows of `width` bytes on the GPU, which begin a pitch apart from each other."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda.call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self._stream)

    def zero(self, pointer: int, size: int) -> None:
        """Fill GPU memory at `pointer` with zeros."""
        self._cuda.call("cudaMemsetAsync", pointer, 0, size, self._stream)

    def begin_capture(self) -> None:
        """Begin to record the following work of this thread as a CUDA graph instead of running it."""
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> Any:
        """End the recording, and return the CUDA graph."""
        return self._cuda.call("cudaStreamEndCapture", self._stream)

    def launch(self, executable: Any) -> None:
        """Run an instantiated CUDA graph."""
        self._cuda.call("cudaGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        """Wait for all work on the stream.

        Raises:
            BackendError: some of the work failed.
        """
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Destroy the stream. May be called more than once."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._cuda.free("cudaStreamDestroy", stream)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


class DeviceBuffer:
    """GPU memory of `size` bytes, which is freed with this object.

    Raises:
        BackendError: there is not enough free memory.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size, self.pointer = cuda, size, 0
        status, pointer = cuda.runtime.cudaMalloc(max(1, size))
        if int(status) != 0:
            free, total = _memory(cuda)
            raise BackendError(
                f"GPU {cuda.device} has no {size / 1e6:,.0f} MB left ({free / 1e6:,.0f} of {total / 1e6:,.0f} MB are free).",
                "Open with a smaller batch_limit=, fewer pages=, or fewer graphs at once, or free memory of other processes.",
            )
        self.pointer = int(pointer)

    def __del__(self) -> None:
        if self.pointer and not sys.is_finalizing():
            pointer, self.pointer = self.pointer, 0
            self._cuda.free("cudaFree", pointer)


class PinnedBuffer:
    """Page-locked host memory of `size` bytes, which the GPU can copy asynchronously; it is freed with this object.

    Raises:
        BackendError: it cannot be allocated.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size, self.pointer = cuda, size, 0
        self.pointer = int(cuda.call("cudaHostAlloc", max(1, size), 0))

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any], start: int = 0) -> Array:
        """The buffer from byte `start` on as an array that shares its memory. The buffer must outlive it."""
        count = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_uint8 * count).from_address(self.pointer + start)
        found: Array = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        return found

    def __del__(self) -> None:
        if self.pointer and not sys.is_finalizing():
            pointer, self.pointer = self.pointer, 0
            self._cuda.free("cudaFreeHost", pointer)


class CudaArray(DeviceArray):
    """An array in GPU memory.

    Args:
        cuda: the GPU.
        pointer: address of its first element.
        shape, dtype: as in NumPy.
        owner: object that owns the memory, kept alive by the array.
    """

    def __init__(self, cuda: Cuda, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: object) -> None:
        self.cuda, self.pointer, self.shape, self.dtype, self._owner = cuda, pointer, shape, dtype, owner

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> CudaArray:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        pitch = self.nbytes // self.shape[0]
        return CudaArray(
            self.cuda, self.pointer + start * pitch, (max(0, stop - start), *self.shape[1:]), self.dtype, self._owner
        )

    def reshape(self, *shape: int) -> CudaArray:
        assert math.prod(shape) == math.prod(self.shape)
        return CudaArray(self.cuda, self.pointer, shape, self.dtype, self._owner)

    def column(self, index: int) -> Array:
        found: Array = np.empty((self.shape[0], *self.shape[2:]), self.dtype)
        pitch = self.nbytes // self.shape[0]
        self.cuda.copy_rows_from_device(found, self.pointer + index * (pitch // self.shape[1]), pitch)
        return found

    def numpy(self) -> Array:
        found: Array = np.empty(self.shape, self.dtype)
        self.cuda.copy_from_device(found, self.pointer)
        return found


def joined(cuda: Cuda, parts: Iterable[Tensor], length: int) -> CudaArray:
    """See `Session.joined`."""
    with cuda.active():
        stream, found, place = Stream(cuda), None, 0
        for part in parts:
            assert isinstance(part, CudaArray)
            if found is None:
                width = part.shape[2]
                buffer = DeviceBuffer(cuda, length * width * part.dtype.itemsize)
                found = CudaArray(cuda, buffer.pointer, (1, length, width), part.dtype, buffer)
            stream.on_device(found.pointer + place, part.pointer, part.nbytes)
            stream.synchronize()
            place += part.nbytes
        stream.close()
    assert found is not None and place == found.nbytes
    return found


def _memory(cuda: Cuda) -> tuple[int, int]:
    """Free and total bytes of GPU memory; zeros if CUDA cannot tell."""
    status, free, total = cuda.runtime.cudaMemGetInfo()
    return (free, total) if int(status) == 0 else (0, 0)
