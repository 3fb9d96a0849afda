"""TensorRT engines from a bundle's graphs: one code path for `tensorrt` (10.13 and newer) and `tensorrt_rtx`.

Networks are strongly typed: the types in the graph decide, so a half-precision engine is built from a half-precision graph
(`tokenflow_sdk.passes.half_precision`). TensorRT-RTX builds for GPUs that are not there; full TensorRT for the one that is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.backends.tensorrt_module import LogMessages, create_or_raise, tensorrt_logger
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.profiles import Profile, Shapes
from tokenflow_sdk.errors import ArgumentError, EngineBuildError
from tokenflow_sdk.passes.dequantize import dequantize
from tokenflow_sdk.passes.graph import import_onnx_ir, load_graph
from tokenflow_sdk.passes.half_precision import HalfType, to_half
from tokenflow_sdk.passes.quantize import ActivationRanges, quantize

__all__ = [
    "REVISION",
    "build_engine",
    "engine_graph",
]

REVISION = "2"
"""Of everything here and in the passes that decides what an engine of a given graph is: a new one makes all engines stale."""

Progress = Callable[[str, float], None]
"""Told the phase and the share of it that is done."""


def engine_graph(
    graph: Path, dtype: HalfType | None, directory: Path, pinned: Collection[str] = (), ranges: ActivationRanges | None = None
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
    profiles: Sequence[Profile],
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
        profiles: sizes of varying dimensions; a call must fit one of them.
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
    monitor = _make_monitor(trt, progress, cancelled)
    shapes = [{spec.name: profile.shapes(spec) for spec in entry.inputs} for profile in profiles]

    def work() -> bytes:
        # A build is for the GPU of the thread that it runs on.
        with nullcontext() if cuda is None else cuda.active(), tensorrt_logger(trt).collect() as messages:
            return _build(trt, messages, graph, lambda builder: _configured(trt, builder, shapes, target, workspace, monitor))

    return _on_thread(work, cancelled)


def _build(trt: Any, messages: LogMessages, graph: Path, configure: Callable[[Any], Any]) -> bytes:
    log = tensorrt_logger(trt)
    builder = create_or_raise(trt, messages, lambda: trt.Builder(log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineBuildError(f"TensorRT cannot read {graph.name}: {'; '.join(errors)}.", _AGAIN)
    plan = builder.build_serialized_network(network, configure(builder))
    if plan is None and not threading.main_thread().is_alive():
        raise EngineBuildError(
            f"Building {graph.name} was given up, because the program ended.", "Build ahead with `tokenflow build BUNDLE`."
        )
    if plan is None:
        raise EngineBuildError(
            f"TensorRT cannot build {graph.name}: {'; '.join(messages.errors) or 'it does not say why'}.", _AGAIN
        )
    ignored = [text for text in messages.warnings if "Unused Input" in text]
    if ignored:
        raise EngineBuildError(f"TensorRT would ignore an input of {graph.name}: {ignored[0]}.", _AGAIN)
    return bytes(plan)


def _on_thread(work: Callable[[], bytes], cancelled: threading.Event) -> bytes:
    """What `work` returns or raises. Interrupted, it is cancelled first."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # No daemon: at the end of the program it is waited for, having cancelled itself, instead of torn off inside TensorRT.
    thread = threading.Thread(target=run, name="tokenflow-build", daemon=False)
    thread.start()
    try:
        while not wait([future], timeout=0.2).done:
            pass
    except BaseException:
        cancelled.set()
        thread.join()
        raise
    return future.result()


def _configured(
    trt: Any, builder: Any, profiles: Sequence[Mapping[str, Shapes]], target: str | None, workspace: int | None, monitor: Any
) -> Any:
    """A builder's configuration: shapes of the inputs by profile, target, memory."""
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if target is not None:
        _set_target(trt, config, target)
    # Without this float32 products are rounded to 10 bits on recent GPUs.
    config.clear_flag(trt.BuilderFlag.TF32)
    for shapes in profiles:
        optimization = builder.create_optimization_profile()
        for name, limits in shapes.items():
            optimization.set_shape(name, *limits)
        config.add_optimization_profile(optimization)
    config.progress_monitor = monitor
    return config


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
