"""Key/value pages in GPU memory, and the kernel that stores the tokens of a step in them."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.cuda import Cuda, CudaArray, DeviceBuffer, PinnedBuffer, Stream
from tokenflow_sdk.backends.session import Pages, Tensor
from tokenflow_sdk.errors import BackendError

__all__ = ["STORE_TOKENS", "CudaPages"]

_UNIT = 16
"""Bytes that a thread copies at a time. A token's keys or values in a layer must be a multiple of it."""
_THREADS = 128
_ENTRY = "store_tokens"
STORE_TOKENS = f"""
.version 6.3
.target sm_75
.address_size 64

.visible .entry {_ENTRY}(
    .param .u64 pool, .param .u64 layer_bytes, .param .u64 new, .param .u64 places, .param .u32 tokens, .param .u32 token_bytes
)
{{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .b64 %d<10>;

    // The place of token ctaid.x in each layer; none if it is below 0.
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %d1, %r1, 4;
    ld.param.u64 %d2, [places];
    add.u64 %d2, %d2, %d1;
    ld.u32 %r2, [%d2];
    setp.lt.s32 %p1, %r2, 0;
    @%p1 bra DONE;

    // d3 = pool + layer * layer_bytes + place * token_bytes, where the layer is ctaid.y.
    ld.param.u32 %r3, [token_bytes];
    mov.u32 %r4, %ctaid.y;
    cvt.u64.u32 %d1, %r4;
    ld.param.u64 %d2, [layer_bytes];
    mul.lo.u64 %d3, %d1, %d2;
    mul.wide.u32 %d2, %r2, %r3;
    add.u64 %d3, %d3, %d2;
    ld.param.u64 %d2, [pool];
    add.u64 %d3, %d3, %d2;

    // d4 = new + (layer * tokens + token) * token_bytes.
    ld.param.u32 %r5, [tokens];
    mul.wide.u32 %d4, %r4, %r5;
    cvt.u64.u32 %d1, %r1;
    add.u64 %d4, %d4, %d1;
    cvt.u64.u32 %d1, %r3;
    mul.lo.u64 %d4, %d4, %d1;
    ld.param.u64 %d2, [new];
    add.u64 %d4, %d4, %d2;

    // Each thread copies every ntid-th {_UNIT} bytes.
    mov.u32 %r6, %tid.x;
    shl.b32 %r6, %r6, 4;
    mov.u32 %r7, %ntid.x;
    shl.b32 %r7, %r7, 4;
LOOP:
    setp.ge.u32 %p2, %r6, %r3;
    @%p2 bra DONE;
    cvt.u64.u32 %d1, %r6;
    add.u64 %d5, %d4, %d1;
    add.u64 %d6, %d3, %d1;
    ld.v4.u32 {{%r8, %r9, %r10, %r11}}, [%d5];
    st.v4.u32 [%d6], {{%r8, %r9, %r10, %r11}};
    add.u32 %r6, %r6, %r7;
    bra LOOP;
DONE:
    ret;
}}
"""
"""The kernel in PTX, which every driver compiles for its GPU. A block stores one token in one layer."""


class _StoreKernel:
    """`STORE_TOKENS`, loaded.

    Raises:
        BackendError: the driver does not take it.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._module: Any = None
        self._module = cuda.call_driver("cuModuleLoadData", STORE_TOKENS.encode() + b"\0")
        self._function: Any = cuda.call_driver("cuModuleGetFunction", self._module, _ENTRY.encode())

    def launch(self, stream: Stream, grid: tuple[int, int], threads: int, arguments: tuple[int, ...]) -> None:
        types = (*[ctypes.c_uint64] * 4, *[ctypes.c_uint32] * 2)
        self._cuda.call_driver(
            "cuLaunchKernel", self._function, *grid, 1, threads, 1, 1, 0, stream.handle, (arguments, types), 0
        )

    def close(self) -> None:
        """Unload it. May be called more than once."""
        if self._module is not None:
            module, self._module = self._module, None
            with suppress(BackendError), self._cuda.active():
                self._cuda.call_driver("cuModuleUnload", module)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


class CudaPages(Pages):
    """Pages in GPU memory. New keys and values are stored by a kernel, on a stream of its own.

    Where the driver does not take the kernel, or a token is no multiple of its unit, strided copies (`cudaMemcpy2DAsync`) do
    it, one for each stretch of neighbouring places.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> None:
        super().__init__(shape, dtype)
        self._cuda = cuda
        layers, pages, self._page_size, heads, dim = shape
        self._token = heads * dim * dtype.itemsize
        self._layer = pages * self._page_size * self._token
        with cuda.active():
            self._stream = Stream(cuda)
            buffer = DeviceBuffer(cuda, int(np.prod(shape)) * dtype.itemsize)
            self._stream.zero(buffer.pointer, buffer.size)
            self._kernel = _load_kernel(cuda) if self._token % _UNIT == 0 else None
        self._base = buffer.pointer
        self._pending = True
        self._sources: list[Tensor] = []
        """Sources of copies that are not finished, kept alive."""
        self._places: tuple[PinnedBuffer, DeviceBuffer] | None = None
        """The kernel's list of places, on the host and on the GPU."""
        self._slots: CudaArray | None = CudaArray(cuda, buffer.pointer, (layers * pages, *shape[2:]), dtype, buffer)

    @property
    def slots(self) -> Tensor:
        """As `Pages.slots`; waits for copies that are not finished."""
        assert self._slots is not None
        if self._pending:
            with self._cuda.active():
                self._wait()
        return self._slots

    def _wait(self) -> None:
        self._stream.synchronize()
        self._pending = False
        self._sources.clear()

    def copy_page(self, source: int, target: int) -> None:
        page = self._page_size * self._token
        places = self._base + target * page, self._base + source * page
        with self._cuda.active():
            self._stream.copy_rows(places[0], self._layer, places[1], self._layer, page, self.shape[0])
        self._pending = True

    def write(self, new: Tensor, places: NDArray[np.int32]) -> None:
        assert isinstance(new, CudaArray)
        with self._cuda.active():
            if self._kernel is not None:
                self._launch(self._kernel, new, places)
            else:
                self._copy(new, places)
        self._sources.append(new)
        self._pending = True

    def _launch(self, kernel: _StoreKernel, new: CudaArray, places: NDArray[np.int32]) -> None:
        if self._sources:
            # An earlier launch may still read the list.
            self._wait()
        if self._places is None or self._places[0].size < places.nbytes:
            self._places = None
            self._places = PinnedBuffer(self._cuda, places.nbytes), DeviceBuffer(self._cuda, places.nbytes)
        staging, there = self._places
        np.copyto(staging.view(places.shape, places.dtype), places)
        self._stream.to_device(there.pointer, staging.pointer, places.nbytes)
        arguments = (self._base, self._layer, new.pointer, there.pointer, places.size, self._token)
        kernel.launch(self._stream, (places.size, self.shape[0]), min(_THREADS, self._token // _UNIT), arguments)

    def _copy(self, new: CudaArray, places: NDArray[np.int32]) -> None:
        for first, place, length in _runs(places.reshape(-1)):
            self._stream.copy_rows(
                self._base + place * self._token,
                self._layer,
                new.pointer + first * self._token,
                places.size * self._token,
                length * self._token,
                self.shape[0],
            )

    def close(self) -> None:
        if self._slots is not None:
            with suppress(BackendError), self._cuda.active():
                self._stream.synchronize()
                if self._kernel is not None:
                    self._kernel.close()
            self._stream.close()
            self._sources.clear()
            self._slots = self._kernel = self._places = None


def _load_kernel(cuda: Cuda) -> _StoreKernel | None:
    try:
        return _StoreKernel(cuda)
    except BackendError as error:
        logging.getLogger("tokenflow_sdk").warning("Keys and values are stored by copies, which takes longer: %s", error)
        return None


def _runs(places: NDArray[np.int32]) -> Iterator[tuple[int, int, int]]:
    """Split into runs of consecutive places from 0 on: (index of the first, its place, length of the run)."""
    before = np.concatenate([[-1], places[:-1]])
    starts = np.flatnonzero((places != before + 1) | (before < 0))
    for first, stop in zip(starts, [*starts[1:], len(places)], strict=True):
        if places[first] >= 0:
            yield int(first), int(places[first]), int(stop - first)
