"""What a backend is: a class that runs one graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


class DeviceArray(ABC):
    """An array in an engine's own memory, C-contiguous. `np.asarray` copies it to the host."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @abstractmethod
    def __getitem__(self, rows: slice) -> DeviceArray:
        """Some of the first axis, not copied."""

    @abstractmethod
    def reshape(self, *shape: int) -> DeviceArray:
        """The same numbers in another shape, not copied. Every size must be given."""

    @abstractmethod
    def numpy(self) -> Array:
        """A copy on the host."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.numpy()
        return found if dtype is None else found.astype(dtype, copy=False)


Tensor = Array | DeviceArray


class Pages(ABC):
    """Keys or values of all pages and layers, where the engine reads them: [layers, pages, page_size, kv_heads, head_dim]."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype

    @property
    def page_bytes(self) -> int:
        """Memory of one page in all layers."""
        return int(np.prod(self.shape)) * self.dtype.itemsize // self.shape[1]

    @property
    @abstractmethod
    def slots(self) -> Tensor:
        """What a graph is fed: [layers * pages, page_size, kv_heads, head_dim], not copied."""

    @abstractmethod
    def copy_page(self, source: int, target: int) -> None:
        """Copy a page."""

    @abstractmethod
    def write(self, new: Tensor, row: int, pages: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        """Token i of `new` [layers, B, Q, kv_heads, head_dim], row `row`, to place `offsets[i]` of page `pages[i]`."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory; nothing else works afterwards. Closing twice is fine."""


class HostPages(Pages):
    """Pages in NumPy."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> None:
        super().__init__(shape, dtype)
        self._array = np.zeros(shape, dtype)

    @property
    def slots(self) -> Tensor:
        return self._array.reshape(-1, *self.shape[2:])

    def copy_page(self, source: int, target: int) -> None:
        self._array[:, target] = self._array[:, source]

    def write(self, new: Tensor, row: int, pages: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self._array[:, pages, offsets] = np.asarray(new)[:, row]

    def close(self) -> None:
        self._array = np.zeros((0, 0, *self.shape[2:]), self.dtype)


@dataclass(frozen=True)
class SessionOptions:
    """How a graph is run.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        providers: onnxruntime execution providers by name, overriding `device`.
        threads: CPU threads of one call; None takes the cores this process may use.
    """

    device: str = "auto"
    providers: tuple[str, ...] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
            raise ArgumentError(f"There is no device {self.device!r}.", "Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
        if self.threads is not None and self.threads < 1:
            raise ArgumentError(f"threads={self.threads} cannot run anything.", "Give at least 1, or None for all cores.")


class Session(ABC):
    """One loaded graph. `run` is safe to call from several threads; subclasses fill in `_infer` and `close`."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    @property
    def device(self) -> str:
        """Where the graph runs, for people: `cpu`, `cuda:0`."""
        return "cpu"

    def max_size(self, dim: str) -> int | None:
        """Most of a varying dimension, e.g. `batch`, that a call may have; None: as much as memory holds."""
        return None

    def run(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: one array for each input, C-contiguous, of its dtype and shape.
            outputs: the outputs wanted (others are neither copied nor, where the engine can tell, computed); None: all.

        Raises:
            BackendError: the engine failed, e.g. for lack of memory.
        """
        names = self._checked(feeds, outputs)
        return dict(zip(names, self._infer(feeds, names), strict=True))

    def run_resident(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """As `run`, with the results left in the engine's memory. They are valid until the session runs again."""
        names = self._checked(feeds, outputs)
        return dict(zip(names, self._infer_resident(feeds, names), strict=True))

    def make_pages(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> Pages:
        """Pages of zeros where this session's graph reads them."""
        return HostPages(shape, dtype)

    def _checked(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None) -> tuple[str, ...]:
        """The names of the outputs wanted."""
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

    @abstractmethod
    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        """The named outputs, in order; feeds are already checked."""

    def _infer_resident(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Tensor]:
        """As `_infer`, left where they are; engines whose memory is the host's need nothing else."""
        return self._infer(feeds, outputs)

    @abstractmethod
    def close(self) -> None:
        """Free the engine's memory. The session cannot run afterwards; closing twice is fine."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


OpenSession = Callable[[Path, GraphEntry, SessionOptions], Session]
"""Loads a graph: its file, what bundle.json says of it, how it is to run."""
