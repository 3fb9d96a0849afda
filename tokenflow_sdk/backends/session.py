"""The interface of backends: `Session`, which runs one graph, and the arrays and key/value pages in its memory."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.arguments import integer, shown
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.errors import ArgumentError

__all__ = [
    "Array",
    "DeviceArray",
    "HostPages",
    "OpenSession",
    "Pages",
    "Session",
    "SessionOptions",
    "Tensor",
]

Array = NDArray[np.generic]

_MOST = 2**31 - 1
"""Largest number that backends take."""


class DeviceArray(ABC):
    """A C-contiguous array in device memory. `np.asarray` copies it to the host."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @abstractmethod
    def __getitem__(self, rows: slice) -> DeviceArray:
        """A contiguous slice along the first axis, as a view."""

    @abstractmethod
    def reshape(self, *shape: int) -> DeviceArray:
        """A view of another shape. Every size must be given; -1 is not allowed."""

    @abstractmethod
    def column(self, index: int) -> Array:
        """Copy the part `[:, index]` to the host."""

    @abstractmethod
    def numpy(self) -> Array:
        """Copy the array to the host."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.numpy()
        return found if dtype is None else found.astype(dtype, copy=False)


Tensor = Array | DeviceArray


class Pages(ABC):
    """The keys, or the values, of all layers and pages, in the memory from which a session's graph reads them.

    Args:
        shape: (layers, pages, page_size, kv_heads, head_dim).
        dtype: type of the graph's `k_pages` and `v_pages`.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype

    @property
    def page_bytes(self) -> int:
        """Size in bytes of one page in all layers."""
        return int(np.prod(self.shape)) * self.dtype.itemsize // self.shape[1]

    @property
    @abstractmethod
    def slots(self) -> Tensor:
        """The input `k_pages` or `v_pages` of the graph: a view [layers * pages, page_size, kv_heads, head_dim]."""

    @abstractmethod
    def copy_page(self, source: int, target: int) -> None:
        """Copy page `source` to page `target` in all layers."""

    @abstractmethod
    def write(self, new: Tensor, places: NDArray[np.int32]) -> None:
        """Write new keys or values into pages.

        Args:
            new: output of a step, [layers, B, Q, kv_heads, head_dim].
            places: where each token goes in every layer, int32 [B, Q]: its page times the page size plus its place in the page;
                below 0: nowhere.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the memory; the pages cannot be used afterwards. May be called more than once."""


class HostPages(Pages):
    """Pages in host memory.

    Raises:
        ArgumentError: keys and values together would take more than the machine's memory.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> None:
        super().__init__(shape, dtype)
        # The system promises more memory than it has, and ends the process that uses it.
        needed, memory = 2 * math.prod(shape) * dtype.itemsize, _memory()
        if needed > memory:
            raise ArgumentError(
                f"pages={shape[1]} of page_size={shape[2]} take {needed / 1e9:.0f} GB, keys and values together, and this "
                f"machine has {memory / 1e9:.0f} GB.",
                "Give fewer or smaller pages.",
            )
        self._array = np.zeros(shape, dtype)

    @property
    def slots(self) -> Tensor:
        return self._array.reshape(-1, *self.shape[2:])

    def copy_page(self, source: int, target: int) -> None:
        self._array[:, target] = self._array[:, source]

    def write(self, new: Tensor, places: NDArray[np.int32]) -> None:
        layers, pages, size, *token = self.shape
        kept = places >= 0
        self._array.reshape(layers, pages * size, *token)[:, places[kept]] = np.asarray(new)[:, kept]

    def close(self) -> None:
        self._array = np.zeros((0, 0, *self.shape[2:]), self.dtype)


def _memory() -> float:
    """Bytes of this machine's memory; infinity if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs a graph.

    Args:
        device: `auto` (CUDA if it is usable, else the CPU), `cpu`, `cuda` or `cuda:N`; with OpenVINO also `gpu`, `gpu:N` or
            `npu`, of Intel.
        providers: names of onnxruntime execution providers, in order of preference; overrides the choice by `device`.
        threads: CPU threads of one call; None uses all cores that the process may use.

    Raises:
        ArgumentError: an unknown device, or fewer than one thread.
    """

    device: str = "auto"
    providers: tuple[str, ...] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.device, str) and re.fullmatch(r"auto|cpu|npu|(cuda|gpu)(:[0-9]{1,4})?", self.device)):
            raise ArgumentError(
                f"There is no device {shown(self.device)}.",
                "Use 'auto', 'cpu', 'cuda' or 'cuda:N'; with backend='openvino' also 'gpu', 'gpu:N' or 'npu'.",
            )
        if self.threads is not None:
            hint = "Give at least 1, or leave threads= out for all cores."
            object.__setattr__(self, "threads", integer("threads", self.threads, 1, _MOST, "cannot run anything.", hint))


class Session(ABC):
    """One loaded graph. `run` may be called from several threads; a backend implements `_infer` and `close`.

    Args:
        inputs, outputs: the graph's tensors, in order.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    @property
    def device(self) -> str:
        """Device that runs the graph, e.g. `cpu` or `cuda:0`."""
        return "cpu"

    def max_size(self, dim: str) -> int | None:
        """Largest size of a dynamic dimension, e.g. `batch`, that a call may have; None if only memory limits it."""
        return None

    def limits(self, *dims: str) -> list[tuple[int, ...]]:
        """Largest sizes of dynamic dimensions in each optimization profile; empty if only memory limits them."""
        return []

    def padded(self, dim: str, size: int) -> int:
        """The size to which a caller should pad a dynamic dimension of this size, so that calls have few distinct shapes.

        It is `size` itself where new shapes cost nothing.
        """
        return size

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: one C-contiguous array for each input, of its dtype and shape.
            outputs: names of the wanted outputs; None means all. The others are not copied to the host, and some backends do
                not compute them.

        Returns:
            The wanted outputs by name, in host memory.

        Raises:
            ValueError: an input is missing, unknown or of another dtype or shape, or an output is unknown.
            BackendError: the backend failed, e.g. because memory ran out.
        """
        names = self._checked(feeds, outputs)
        return dict(zip(names, self._infer(feeds, names), strict=True))

    def run_resident(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the graph and leave the outputs in device memory. They are valid until the next call of this session.

        Args, Raises:
            As `run`.

        Returns:
            The wanted outputs by name, to be fed to another session or read with `np.asarray`.
        """
        names = self._checked(feeds, outputs)
        return dict(zip(names, self._infer_resident(feeds, names), strict=True))

    def make_pages(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> Pages:
        """Allocate zeroed pages in the memory from which this session's graph reads them; arguments as in `Pages`."""
        return HostPages(shape, dtype)

    def _checked(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None) -> tuple[str, ...]:
        """Check the inputs, and return the names of the wanted outputs."""
        self._check(feeds)
        names = tuple(spec.name for spec in self.outputs) if outputs is None else tuple(outputs)
        unknown = set(names) - {spec.name for spec in self.outputs}
        if unknown:
            raise ValueError(f"no output {sorted(unknown)}")
        return names

    def _check(self, feeds: Mapping[str, Tensor]) -> None:
        if feeds.keys() != {spec.name for spec in self.inputs}:
            raise ValueError(f"inputs are {[spec.name for spec in self.inputs]}, got {list(feeds)}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            array = feeds[spec.name]
            fits = array.ndim == len(spec.shape) and all(
                size == (want if isinstance(want, int) else sizes.setdefault(want, size))
                for size, want in zip(array.shape, spec.shape, strict=True)
            )
            if not fits or array.dtype != np.dtype(spec.dtype):
                raise ValueError(f"{spec} was given {array.dtype}{list(array.shape)}")

    def joined(self, parts: Iterable[Tensor], length: int) -> Tensor:
        """Join arrays [1, Q, H] along Q, in the memory of the session's device.

        Args:
            parts: results of `run_resident`. Each is copied before the next is asked for, so they may be of the same session.
            length: what their Q add up to.
        """
        return np.concatenate([np.array(part) for part in parts], axis=1)

    @abstractmethod
    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        """Run the graph on checked inputs, and return the named outputs, in order, in host memory."""

    def _infer_resident(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Tensor]:
        """As `_infer`, with the outputs in device memory. A backend whose device is the CPU need not override it."""
        return self._infer(feeds, outputs)

    @abstractmethod
    def close(self) -> None:
        """Free the graph and its memory; the session cannot run afterwards. May be called more than once."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


OpenSession = Callable[[Path, GraphEntry, SessionOptions], Session]
"""A function that loads a graph, given its `.onnx` file, its entry in bundle.json and how to run it."""
