"""Which of a tokenizer's graphs are faster on OpenVINO than on onnxruntime: measured on this machine, and stored.

A choice lies in the directory of the engine cache and is found by what it depends on: bundle, processor, threads and versions.
So one that was measured elsewhere, or before an update, is never used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from tokenflow_sdk.backends.cores import available_cores, processor
from tokenflow_sdk.backends.onnxruntime import import_onnxruntime, open_onnxruntime
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.cache import EngineCache, default_directory
from tokenflow_sdk.engines.openvino_models import REVISION, open_openvino
from tokenflow_sdk.errors import MissingPackageError
from tokenflow_sdk.files import read_regular, write_atomic
from tokenflow_sdk.parity.certificate import certify

__all__ = ["GraphTimes", "MeasuredChoice", "check_choice", "measure_choice"]

_FASTER = 1.05
"""How many times as fast OpenVINO must be: less could be chance."""
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class GraphTimes:
    """Median times of one graph on one picture, on the CPU.

    Attributes:
        onnxruntime, openvino: in seconds.
    """

    onnxruntime: float
    openvino: float

    @property
    def ratio(self) -> float:
        """How many times as fast OpenVINO is."""
        return self.onnxruntime / self.openvino

    @property
    def faster(self) -> bool:
        """Whether OpenVINO is to run the graph."""
        return self.ratio >= _FASTER


@dataclass(frozen=True)
class MeasuredChoice:
    """What was measured of a bundle.

    Attributes:
        key: everything that the measurement depends on.
        graphs: the times of each graph.
    """

    key: Mapping[str, str]
    graphs: Mapping[str, GraphTimes]

    @property
    def faster(self) -> tuple[str, ...]:
        """The graphs that OpenVINO is to run."""
        return tuple(name for name, times in self.graphs.items() if times.faster)

    @property
    def summary(self) -> str:
        """How OpenVINO compares, in words."""
        return ", ".join(f"{name} {times.ratio:.2f}" for name, times in self.graphs.items()) + " times as fast as onnxruntime"

    @classmethod
    def find(cls, bundle: Bundle[Any], threads: int | None) -> MeasuredChoice | None:
        """The stored choice of a bundle for this machine as it is now; None if there is none, or OpenVINO is not installed."""
        key = _key(bundle, threads)
        if key is None:
            return None
        with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
            data = json.loads(read_regular(_path(key), _MOST_BYTES))
            graphs = {name: GraphTimes(*map(_seconds, data["graphs"][name])) for name in bundle.graphs}
            if data["key"] == key:
                return cls(key, graphs)
        return None

    def store(self) -> Path:
        """Store the choice for `find`.

        Returns:
            Its file.

        Raises:
            OutputError: the directory cannot be written.
        """
        EngineCache().make_directory()
        path = _path(self.key)
        graphs = {name: (times.onnxruntime, times.openvino) for name, times in self.graphs.items()}
        write_atomic(path, json.dumps({"key": dict(self.key), "graphs": graphs}, indent=2).encode())
        return path


def check_choice(bundle: Bundle[TokenizerConfig], threads: int | None) -> None:
    """Raise EngineRefusedError unless OpenVINO reproduces the bundle's reference on the CPU; else as `measure_choice`."""
    options = SessionOptions("cpu", threads=threads)
    certificate = certify(bundle, lambda path, entry, _: open_openvino(path, entry, options), "fp32")
    certificate.require(f"{bundle.path.name} on OpenVINO")


def measure_choice(
    bundle: Bundle[TokenizerConfig], threads: int | None, repeat: int, done: Callable[[int], object] = lambda count: None
) -> MeasuredChoice:
    """Time each graph on OpenVINO and on onnxruntime, in turns. Call `check_choice` first.

    Args:
        bundle: a tokenizer's.
        threads: see `SessionOptions`.
        repeat: timed calls of each graph on each; one before warms up.
        done: is told after each call how many there were.

    Raises:
        MissingPackageError: OpenVINO or onnxruntime is not installed.
        BackendError: a graph cannot be loaded or run.
    """
    import_onnxruntime()
    key = _key(bundle, threads)
    if key is None:
        raise MissingPackageError("OpenVINO is not installed.", "Run `pip install 'tokenflow-sdk[openvino]'`.")
    options = SessionOptions("cpu", threads=threads)
    graphs, count = {}, 0
    for name, entry in bundle.graphs.items():
        path = bundle.graph_path(name)
        with open_onnxruntime(path, entry, options) as ours, open_openvino(path, entry, options) as theirs:
            seconds: dict[Session, list[float]] = {ours: [], theirs: []}
            feeds = _random_feeds(theirs, bundle.config.codebook_size)
            for i in range(repeat + 1):
                for session, times in seconds.items():
                    began = perf_counter()
                    session.run(feeds)
                    times += [perf_counter() - began] if i else []
                    done(count := count + 1)
            graphs[name] = GraphTimes(median(seconds[ours]), median(seconds[theirs]))
    return MeasuredChoice(key, graphs)


def _random_feeds(session: Session, codebook_size: int) -> dict[str, np.ndarray]:
    """Inputs of one picture: pixels, or code indices."""
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in session.inputs:
        shape = tuple(1 if isinstance(size, str) else size for size in spec.shape)
        feeds[spec.name] = rng.integers(0, 256 if spec.dtype == "uint8" else codebook_size, shape, spec.dtype)
    return feeds


def _key(bundle: Bundle[Any], threads: int | None) -> dict[str, str] | None:
    """What a choice depends on; None without OpenVINO or onnxruntime, which is not imported here: that takes long."""
    try:
        openvino, onnxruntime = importlib.metadata.version("openvino"), import_onnxruntime().__version__
    except (importlib.metadata.PackageNotFoundError, MissingPackageError):
        return None
    return {
        "bundle": bundle.sha256,
        "processor": processor(),
        "threads": str(threads or available_cores()),
        "revision": REVISION,
        "openvino": openvino,
        "onnxruntime": onnxruntime,
    }


def _path(key: Mapping[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    return default_directory() / f"{digest}.choice"


def _seconds(value: object) -> float:
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ValueError(value)
    return value
