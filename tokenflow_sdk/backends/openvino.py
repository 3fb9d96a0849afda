"""Run a tokenizer's graphs with OpenVINO: on the CPU, or on Intel's GPU or NPU.

A graph is compiled for one picture, and a batch runs picture by picture: with its batch open, OpenVINO on a CPU is slower than
onnxruntime, and so are a language model's graphs, which have other open dimensions and are not run here.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.backends.session import Array, Session, SessionOptions, Tensor
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.errors import ArgumentError, BackendError, CorruptBundleError, MissingPackageError
from tokenflow_sdk.forking import keep_in_children, no_fork
from tokenflow_sdk.passes.openvino import rewrite

__all__ = [
    "OPENVINO",
    "Compiled",
    "OpenVinoSession",
    "compile_graph",
    "has_bfloat16",
    "import_openvino",
    "load_compiled",
    "openvino_device",
    "properties",
    "runs_by_picture",
    "survived_fork",
]

OPENVINO = "openvino"
_BATCH = "batch"
"""The dimension of a tokenizer's graphs that is open."""
_started_in: int | None = None
"""The process in which OpenVINO was started; None: it was not."""


class Compiled(NamedTuple):
    """A compiled graph.

    Attributes:
        model: OpenVINO's `CompiledModel`.
        data: memory that the model reads its weights from, and that must live as long; None: it has its own.
    """

    model: Any
    data: NDArray[np.uint8] | None = None


def import_openvino() -> Any:
    """The module openvino, which tells Intel of its import unless it finds no openvino_telemetry: here it finds none.

    Raises:
        MissingPackageError: it is not installed.
    """
    telemetry: dict[str, Any] = {} if "openvino_telemetry" in sys.modules else {"openvino_telemetry": None}
    sys.modules.update(telemetry)
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingPackageError(
            f"OpenVINO is not installed ({error}).",
            "Run `pip install 'tokenflow-sdk[openvino]'`, or leave backend= or build_config= out.",
        ) from None
    finally:
        for name in telemetry:
            sys.modules.pop(name, None)


@cache
def _core() -> Any:
    """OpenVINO's core, one for the process: it holds the plugins of its devices."""
    global _started_in
    _started_in = os.getpid()
    core = import_openvino().Core()
    keep_in_children(core)
    return core


def survived_fork() -> bool:
    """Whether OpenVINO may be used in this process: not where another process started it and then forked.

    Its threads are not in the child, and calls there hang at times.
    """
    return _started_in in (None, os.getpid())


def _require_survived() -> None:
    if not survived_fork():
        raise ArgumentError(
            "OpenVINO was started before this process was forked, and its threads do not survive that.",
            "Start processes with the method 'spawn', open the model in the child only, or use onnxruntime.",
        )


def openvino_device(device: str) -> str:
    """OpenVINO's name of a device, which is here.

    Args:
        device: as in `SessionOptions`; `auto` means the CPU.

    Raises:
        ArgumentError: OpenVINO was started before this process was forked.
        BackendError: OpenVINO finds no such device.
        MissingPackageError: OpenVINO is not installed.
    """
    _require_survived()
    kind, _, number = device.partition(":")
    name = "CPU" if kind == "auto" else f"{kind.upper()}{number and '.'}{number}"
    present = list(_core().available_devices)
    # A single GPU is listed as GPU, several as GPU.0 and so on; the bare name means the first.
    if name not in present and not (name == "GPU" and "GPU.0" in present) and not (name == "GPU.0" and "GPU" in present):
        raise BackendError(
            f"device={device!r}, but OpenVINO finds only: {', '.join(present)}.",
            "Install Intel's driver for the device (GPU: OpenCL; NPU: Level Zero), or use device='cpu'.",
        )
    return name


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16, as with AVX-512 BF16 or AMX. Elsewhere OpenVINO computes in float32.

    Raises:
        ArgumentError, MissingPackageError: see `openvino_device`.
    """
    openvino_device("cpu")
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def properties(options: SessionOptions, bfloat16: bool = False) -> dict[str, str]:
    """OpenVINO's settings for a graph: float32 products unless told otherwise, and as many threads as onnxruntime would get.

    An NPU computes in float16 only. Calls of several threads run at once where one takes only some of the cores.
    """
    precision = "f16" if options.device == "npu" else "bf16" if bfloat16 else "f32"
    found = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if options.device in ("auto", "cpu"):
        cores = available_cores()
        threads = options.threads or cores
        streams = max(1, cores // threads)
        # Without the second, weights that are stored in few bits would be multiplied in 8 bits.
        found |= {"EXECUTION_MODE_HINT": "ACCURACY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        # Pinned threads of two processes would share a core while others are idle.
        found |= {"INFERENCE_NUM_THREADS": str(threads * streams), "NUM_STREAMS": str(streams), "ENABLE_CPU_PINNING": "NO"}
    return found


def runs_by_picture(entry: GraphEntry) -> bool:
    """Whether a graph's only open dimension is the batch, the first of all its inputs and outputs."""
    return all(
        spec.shape[:1] == (_BATCH,) and all(isinstance(size, int) for size in spec.shape[1:])
        for spec in (*entry.inputs, *entry.outputs)
    )


def compile_graph(path: Path, entry: GraphEntry, options: SessionOptions, bfloat16: bool = False) -> Compiled:
    """Compile a graph for one picture.

    Args:
        path: the `.onnx` file, with its external data in the same directory.
        entry: the graph's entry in bundle.json.
        options: device and threads.
        bfloat16: whether products are computed in it.

    Raises:
        BackendError: the graph has other open dimensions than its batch, it cannot be compiled, or there is no such device.
        CorruptBundleError: the graph has not the inputs of bundle.json.
        MissingPackageError, ArgumentError: see `openvino_device`.
    """
    if not runs_by_picture(entry):
        raise BackendError(
            f"OpenVINO runs a tokenizer's graphs, and {path.name} has open dimensions besides its batch.",
            "Leave backend= or build_config= out: a language model runs on onnxruntime or TensorRT.",
        )
    device = openvino_device(options.device)
    try:
        with no_fork():
            model = _core().read_model(path)
            names = {name for port in model.inputs for name in port.names}
            if len(model.inputs) == len(entry.inputs) and all(spec.name in names for spec in entry.inputs):
                model.reshape({spec.name: [1, *spec.shape[1:]] for spec in entry.inputs})
                rewrite(model, device == "CPU")
            _check_io(path.name, entry, model)
            return Compiled(_core().compile_model(model, device, properties(options, bfloat16)))
    except Exception as error:
        if not _is_own(error):
            raise
        raise BackendError(
            f"OpenVINO {import_openvino().__version__} cannot compile {path.name} for {device}: {_told(error)}",
            "Check free memory and `tokenflow verify BUNDLE --backend onnxruntime`, or leave backend= or build_config= out.",
        ) from error


def load_compiled(data: NDArray[np.uint8], options: SessionOptions, bfloat16: bool = False) -> Compiled | None:
    """Load what a compiled model's `export_model` gave; None if OpenVINO refuses it. Raises as `openvino_device`.

    Args:
        data: writeable, because OpenVINO takes no other; a file mapped copy-on-write is not read into memory a second time.
        options, bfloat16: what it was compiled with.
    """
    device = openvino_device(options.device)
    try:
        with no_fork():
            tensor = import_openvino().Tensor(data, shared_memory=True)
            return Compiled(_core().import_model(tensor, device, properties(options, bfloat16)), data)
    except Exception as error:
        if not _is_own(error):
            raise
        return None


def _check_io(name: str, entry: GraphEntry, model: Any) -> None:
    """Raise CorruptBundleError where a model for one picture has other inputs or outputs than bundle.json says."""
    for kind, specs, ports in (("inputs", entry.inputs, model.inputs), ("outputs", entry.outputs, model.outputs)):
        have = [TensorSpec(min(port.names, default=""), _dtype(port), _shape(port)) for port in ports]
        want = [TensorSpec(spec.name, spec.dtype, (1, *spec.shape[1:])) for spec in specs]
        names = [port.names for port in ports]
        same = len(have) == len(want) and all(
            spec.name in called and (spec.dtype, spec.shape) == (other.dtype, other.shape)
            for spec, called, other in zip(want, names, have, strict=True)
        )
        if not same:
            raise CorruptBundleError(
                f"{name} has the {kind} {'; '.join(map(str, have))} instead of {'; '.join(map(str, want))}, for one picture.",
                "Export the bundle again with `tokenflow export`.",
            )


def _dtype(port: Any) -> str:
    return str(port.get_element_type().to_dtype())


def _shape(port: Any) -> tuple[int | str, ...]:
    return tuple(size.get_length() if size.is_static else "?" for size in port.get_partial_shape())


class OpenVinoSession(Session):
    """A graph compiled by OpenVINO. Calls of several threads run at once, each on an infer request of its own.

    Args:
        compiled: from `compile_graph` or `load_compiled`.
        entry: the graph's entry in bundle.json.
        device: as in `SessionOptions`.
        open_in_child: opens the graph otherwise in a process that was forked since, where OpenVINO does not run; None: calls
            raise ArgumentError there.
    """

    def __init__(
        self, compiled: Compiled, entry: GraphEntry, device: str, open_in_child: Callable[[], Session] | None = None
    ) -> None:
        super().__init__(entry.inputs, entry.outputs)
        self._compiled: Compiled | None = compiled
        self._device = "cpu" if device == "auto" else device
        self._idle: deque[Any] = deque()
        self._open_in_child, self._in_child = open_in_child, None  # type: Callable[[], Session] | None, Session | None
        self._opening = threading.Lock()
        keep_in_children(compiled.model)

    @property
    def device(self) -> str:
        return self._device

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        compiled = self._compiled
        if compiled is None:
            raise ArgumentError("This session is closed.", "Open the bundle again.")
        if not survived_fork():
            found_there = self._child_session().run(feeds, outputs)
            return [found_there[name] for name in outputs]
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        rows = len(next(iter(arrays.values())))
        specs = {spec.name: spec for spec in self.outputs}
        found: list[Array] = [np.empty((rows, *specs[name].shape[1:]), specs[name].dtype) for name in outputs]  # type: ignore[arg-type]
        try:
            with no_fork():
                request = self._request(compiled.model)
                for row in range(rows):
                    request.infer({name: array[row : row + 1] for name, array in arrays.items()}, share_inputs=True)
                    for name, array in zip(outputs, found, strict=True):
                        array[row] = request.get_tensor(name).data[0]
        except Exception as error:
            if not _is_own(error):
                raise
            raise BackendError(
                f"OpenVINO failed: {_told(error)}",
                "If memory ran out, load fewer graphs, or leave backend= or build_config= out.",
            ) from error
        if self._compiled is not None:
            self._idle.append(request)
        return found

    def _child_session(self) -> Session:
        if self._open_in_child is None:
            _require_survived()
        assert self._open_in_child is not None
        with no_fork(), self._opening:
            self._in_child = self._in_child or self._open_in_child()
            return self._in_child

    def _request(self, model: Any) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            request = model.create_infer_request()
            keep_in_children(request)
            return request

    def close(self) -> None:
        with no_fork():
            self._compiled = None
            self._idle.clear()
            if self._in_child is not None:
                self._in_child.close()


def _is_own(error: Exception) -> bool:
    """Whether OpenVINO raised it, and not e.g. a signal handler of the application that ran meanwhile."""
    return type(error) in (RuntimeError, ValueError, TypeError) or type(error).__module__.startswith("openvino")


def _told(error: Exception) -> str:
    """The first line of OpenVINO's message that is not a place in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (telling or lines or [type(error).__name__])[0][:300]
