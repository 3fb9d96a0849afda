"""TensorRT engines from a bundle's graphs: one code path for `tensorrt` (10.13 and newer) and `tensorrt_rtx`.

Networks are strongly typed: the types in the graph decide, so a half-precision engine is built from a half-precision graph
(`tokenflow_sdk.half`). TensorRT-RTX builds for GPUs that are not there; full TensorRT builds for the one that is.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.config import GraphEntry, TensorSpec
from tokenflow_sdk.dequantize import dequantize
from tokenflow_sdk.errors import ArgumentError, BackendError, EngineBuildError, MissingPackageError
from tokenflow_sdk.half import HalfType, to_half
from tokenflow_sdk.onnx_graph import import_onnx_ir, load_graph
from tokenflow_sdk.quantize import Ranges, quantize

__all__ = [
    "FLAVOURS",
    "Flavour",
    "Profile",
    "build_engine",
    "engine_graph",
    "import_tensorrt",
    "make_log",
    "require_installed",
    "started",
]

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Module of each flavour."""

Range = tuple[int, int, int]
Progress = Callable[[str, float], None]
"""Told the phase and the share of it that is done."""


def require_installed(flavour: str) -> None:
    """Look for a flavour without the second that importing it takes. Errors as in `import_tensorrt`."""
    if flavour not in FLAVOURS:
        raise ArgumentError(f"There is no backend {flavour!r} to build for.", f"Choose one of: {', '.join(FLAVOURS)}.")
    if FLAVOURS[flavour] not in sys.modules and importlib.util.find_spec(FLAVOURS[flavour]) is None:
        raise MissingPackageError(f"{flavour} is not installed.", f"Run `pip install 'tokenflow-sdk[{flavour}]'`.")


def import_tensorrt(flavour: str) -> ModuleType:
    """The flavour's Python module.

    Raises:
        ArgumentError: no such flavour.
        MissingPackageError: it is not installed, or libraries that it needs are not.
    """
    require_installed(flavour)
    try:
        return importlib.import_module(FLAVOURS[flavour])
    except (ImportError, OSError) as error:
        raise MissingPackageError(
            f"{flavour} cannot be imported ({error}).", f"Run `pip install --force-reinstall 'tokenflow-sdk[{flavour}]'`."
        ) from error


@dataclass(frozen=True)
class Profile:
    """Least, usual and largest size of every dimension that varies, by its name in the bundle.

    Raises:
        ArgumentError: sizes that are not in order.
    """

    sizes: Mapping[str, Range]

    def __post_init__(self) -> None:
        for name, (least, usual, most) in self.sizes.items():
            if not 0 < least <= usual <= most:
                raise ArgumentError(f"{name} cannot go from {least} over {usual} to {most}.", "Give sizes in ascending order.")

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """Least, usual and largest shape of an input."""
        try:
            return tuple(tuple(dim if isinstance(dim, int) else self.sizes[dim][i] for dim in spec.shape) for i in range(3))
        except KeyError as error:
            raise ArgumentError(f"The profile says nothing about {error} of {spec}.", "Give its sizes.") from None

    @property
    def canonical(self) -> str:
        """For keys: the same text for the same sizes."""
        return json.dumps(self.sizes, sort_keys=True)


def engine_graph(
    graph: Path, dtype: HalfType | None, directory: Path, pinned: Collection[str] = (), ranges: Ranges | None = None
) -> Path:
    """What an engine is built from: a bundle's graph without integer products, in half precision or (None) in float32.

    Args:
        graph: of the bundle; returned as it is where nothing has to change.
        dtype: of everything but what `to_half` keeps.
        directory: where another graph is written, its weights beside it.
        pinned: further nodes that stay in float32.
        ranges: of the convolutions that are rounded to 8 bits, but for pinned ones.

    Raises:
        MissingPackageError: onnx_ir is not installed.
        CorruptBundleError: as `load_graph`.
    """
    ir = import_onnx_ir()
    model = load_graph(graph)
    if dtype is None and ranges is None and not any(node.op_type == "MatMulInteger" for node in model.graph):
        return graph
    dequantize(model)
    if dtype is not None:
        to_half(model, dtype, pinned)
    if ranges is not None:
        quantize(model, ranges.without(pinned))
    path = directory / graph.name
    ir.save(model, path, external_data=f"{graph.name}.data")
    return path


def build_engine(
    trt: Any,
    graph: Path,
    entry: GraphEntry,
    profile: Profile,
    target: str | None = None,
    workspace: int | None = None,
    progress: Progress | None = None,
    cuda: Cuda | None = None,
) -> bytes:
    """A serialized engine.

    It is built on a thread, and the caller's waits: TensorRT drops what a callback raises, Ctrl-C included.

    Args:
        trt: the module, from `import_tensorrt`.
        graph: the `.onnx` file, its external data beside it.
        entry: its inputs.
        profile: sizes of varying dimensions.
        target: GPU architecture such as sm86 (TensorRT-RTX only); None: the GPU that is there.
        workspace: bytes of scratch memory the engine may use; None: no limit.
        progress: told how far the build is.
        cuda: the GPU that full TensorRT builds on and for; None: built ahead.

    Raises:
        EngineBuildError: TensorRT cannot parse or build the graph, or would ignore one of its inputs.
        BackendError: TensorRT does not start here.
        ArgumentError: this flavour or version cannot build for the target.
    """
    cancelled = threading.Event()

    def work() -> bytes:
        if cuda is not None:
            cuda.activate()
        log = make_log(trt)
        builder = started(trt, log, lambda: trt.Builder(log))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineBuildError(f"TensorRT cannot read {graph.name}: {'; '.join(errors)}.", _AGAIN)
        config = _configured(trt, builder, entry, profile, target, workspace)
        config.progress_monitor = _make_monitor(trt, progress, cancelled)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            why = "; ".join(log.errors) or "it does not say why"
            raise EngineBuildError(f"TensorRT cannot build {graph.name}: {why}.", _AGAIN)
        ignored = [text for text in log.warnings if "Unused Input" in text]
        if ignored:
            raise EngineBuildError(f"TensorRT would ignore an input of {graph.name}: {ignored[0]}.", _AGAIN)
        return bytes(plan)

    return _on_thread(work, cancelled)


def _on_thread(work: Callable[[], bytes], cancelled: threading.Event) -> bytes:
    """What `work` returns or raises. Interrupted, it is cancelled first."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # No daemon: at the end of the program it is waited for, having cancelled itself, instead of torn off inside TensorRT.
    thread = threading.Thread(target=run, name="tokenflow-build")
    thread.start()
    try:
        while not wait([future], timeout=0.2).done:
            pass
    except BaseException:
        cancelled.set()
        thread.join()
        raise
    return future.result()


def _configured(trt: Any, builder: Any, entry: GraphEntry, profile: Profile, target: str | None, workspace: int | None) -> Any:
    """A builder's configuration: target, memory, shapes."""
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if target is not None:
        _set_target(trt, config, target)
    # Without this float32 products are rounded to 10 bits on recent GPUs.
    config.clear_flag(trt.BuilderFlag.TF32)
    shapes = builder.create_optimization_profile()
    for spec in entry.inputs:
        shapes.set_shape(spec.name, *profile.shapes(spec))
    config.add_optimization_profile(shapes)
    return config


def started(trt: Any, log: Any, start: Callable[[], Any]) -> Any:
    """What `start` makes, a builder or a runtime.

    Raises:
        BackendError: TensorRT cannot start: there is no GPU or driver, or the driver is too old for it.
    """
    try:
        made = start()
    except (TypeError, RuntimeError) as error:
        # The bindings have no better way to say that the library gave nothing.
        log.errors.append(str(error).splitlines()[0])
        made = None
    if made is None:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} does not start here: {'; '.join(log.errors) or 'it does not say why'}.",
            "Update the NVIDIA driver to one for this TensorRT's CUDA (`nvidia-smi` shows what it supports), or use "
            "backend='onnxruntime'.",
        )
    return made


_AGAIN = "Use backend='onnxruntime' for this bundle, or another version of TensorRT, and report it with this message."


def _set_target(trt: Any, config: Any, target: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    capability = getattr(known, target.upper(), None) if hasattr(config, "set_compute_capability") else None
    if capability is None:
        names = sorted(name.lower() for name in dir(known) if name.startswith("SM")) if known else []
        raise ArgumentError(
            f"{trt.__name__} {trt.__version__} cannot build for {target!r}.",
            f"Choose one of: {', '.join(names)}." if names else "Build on a machine with that GPU, or with tensorrt-rtx.",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


_KEPT = 200
"""Messages of TensorRT that a log keeps."""


def make_log(trt: Any) -> Any:
    """A logger of TensorRT's that keeps the last `errors` and `warnings`, for messages."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what matters instead of printing it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            # A service runs for months, and some warnings come with every call.
            self.warnings: deque[str] = deque(maxlen=_KEPT)
            self.errors: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(text)

    return Log()


def _make_monitor(trt: Any, progress: Progress | None, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the outermost phase on; inner ones are parts of it. Ends a build that is cancelled, or whose program ends."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: list[tuple[str, int]] = []

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.append((name, steps))

        def phase_finish(self, name: str) -> None:
            self.phases = [phase for phase in self.phases if phase[0] != name]

        def step_complete(self, name: str, step: int) -> bool:
            if progress is not None and self.phases and self.phases[0][0] == name:
                progress(name, (step + 1) / max(1, self.phases[0][1]))
            return not cancelled.is_set() and threading.main_thread().is_alive()

    return Monitor()
