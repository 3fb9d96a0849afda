"""What a backend is: a class that runs one graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.config import TensorSpec
from tokenflow_sdk.errors import ArgumentError

__all__ = ["Array", "Session", "SessionOptions"]

Array = NDArray[np.generic]


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

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: one array for each input, C-contiguous, of its dtype and shape.
            outputs: the outputs wanted (others are neither copied nor, where the engine can tell, computed); None: all.

        Raises:
            BackendError: the engine failed, e.g. for lack of memory.
        """
        self._check(feeds)
        names = tuple(spec.name for spec in self.outputs) if outputs is None else tuple(outputs)
        unknown = set(names) - {spec.name for spec in self.outputs}
        if unknown:
            raise ValueError(f"no output {sorted(unknown)}")
        return dict(zip(names, self._infer(feeds, names), strict=True))

    def _check(self, feeds: Mapping[str, Array]) -> None:
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
    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> Sequence[Array]:
        """The named outputs, in order; feeds are already checked."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine's memory. The session cannot run afterwards; closing twice is fine."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
