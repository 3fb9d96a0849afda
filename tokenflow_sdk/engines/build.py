"""Builds TensorRT engines from a bundle's graphs: one code path for `tensorrt` (10.13 and newer) and `tensorrt_rtx`.

Networks are strongly typed: TensorRT takes every type from the graph, so a half-precision engine is built from a graph that
was rewritten in half precision (`tokenflow_sdk.passes.half_precision`). Full TensorRT builds for the GPU it runs on;
TensorRT-RTX can also build for an architecture that is not in the machine.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.backends.tensorrt_module import LogMessages, create_or_raise, tensorrt_logger
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.profiles import Profile, Shapes
from tokenflow_sdk.errors import ArgumentError, EngineBuildError
from tokenflow_sdk.passes.attention import repeat_key_value_heads
from tokenflow_sdk.passes.dequantize import dequantize
from tokenflow_sdk.passes.finite_pages import keep_pages_finite
from tokenflow_sdk.passes.graph import import_onnx_ir, load_graph
from tokenflow_sdk.passes.half_precision import HalfType, to_half
from tokenflow_sdk.passes.quantize import ActivationRanges, quantize
from tokenflow_sdk.passes.widen import widen

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "REVISION",
    "BuiltEngine",
    "build_engine",
    "compute_capabilities",
    "engine_graph",
    "rewrite_for_engine",
]

REVISION = "5"
"""Version of what this module and `tokenflow_sdk.passes` make of a graph; part of every engine's key.

Raise it when they build another engine from the same graph, or when sessions run engines with other kernels than were compared:
all cached engines are then rebuilt.
"""

Progress = Callable[[str, float], None]
"""Called with the name of the phase, and the fraction of it that is done, from 0 to 1."""


_FIGURES = {"activation_bytes": r"Total Activation Memory: (\d+)", "weights_bytes": r"Total Weights Memory: (\d+)"}
_KERNEL = re.compile(r"^Name: ([^,]*), LayerType: (?!shape_call|signal|wait)", re.MULTILINE)
"""A layer that runs as a kernel, in the list that TensorRT logs of what it has built."""
_FUSED_ATTENTION = "mha"


@dataclass(frozen=True)
class BuiltEngine:
    """What `build_engine` returns.

    Attributes:
        plan: the serialized engine.
        figures: what TensorRT said of it: `activation_bytes`, the memory that a call works in at the largest shapes of all
            profiles; `weights_bytes`; `kernels` of all profiles together; and `fused_attentions`, how many of them are
            attention as one kernel. A figure that this version of TensorRT does not log is missing.
    """

    plan: bytes
    figures: Mapping[str, int]


def engine_graph(
    graph: Path, dtype: HalfType | None, directory: Path, pinned: Collection[str] = (), ranges: ActivationRanges | None = None
) -> Path:
    """Rewrite a bundle's graph for TensorRT: float16 as float32, integer products as float products, attention in a form that
    TensorRT fuses, in half precision, with 8-bit convolutions and finite keys and values.

    Args:
        graph: the bundle's `.onnx` file.
        dtype: half-precision type; None: float32. The graph itself may have been exported in float32 or float16.
        directory: where the rewritten graph and its weights are written.
        pinned: names of nodes that stay in float32, in addition to those that `to_half` always keeps.
        ranges: activation ranges of the convolutions that run in 8 bits, except pinned ones; None: no 8-bit convolutions.

    Returns:
        The rewritten graph's path; `graph` itself if nothing has to change.

    Raises:
        MissingPackageError: onnx_ir is not installed.
        CorruptBundleError: the graph cannot be read.
    """
    model = load_graph(graph)
    if not rewrite_for_engine(model, dtype, pinned, ranges):
        return graph
    path = directory / graph.name
    import_onnx_ir().save(model, path, external_data=f"{graph.name}.data")
    return path


def rewrite_for_engine(
    model: ir.Model, dtype: HalfType | None, pinned: Collection[str] = (), ranges: ActivationRanges | None = None
) -> bool:
    """Rewrite a loaded graph in place as `engine_graph` does; False if nothing has to change."""
    integers = any(node.op_type == "MatMulInteger" for node in model.graph)
    paged = any(value.name == "new_k" for value in model.graph.outputs)
    widened = widen(model)
    if dtype is None and ranges is None and not integers and not paged and not widened:
        return False
    dequantize(model)
    if dtype is not None:
        # In float32 TensorRT has no fused attention, and repeated keys and values would only take memory.
        repeat_key_value_heads(model)
        to_half(model, dtype, pinned)
    keep_pages_finite(model)
    if ranges is not None:
        quantize(model, ranges.without(pinned))
    return True


def build_engine(
    trt: Any,
    graph: Path,
    entry: GraphEntry,
    profiles: Sequence[Profile],
    targets: tuple[str, ...] = (),
    workspace: int | None = None,
    progress: Progress | None = None,
    cuda: Cuda | None = None,
) -> BuiltEngine:
    """Build an engine from a graph.

    TensorRT runs on a thread of its own while the caller waits, because TensorRT discards exceptions raised in its callbacks,
    KeyboardInterrupt among them.

    Args:
        trt: the TensorRT module, from `import_tensorrt`.
        graph: the `.onnx` file, with its external data beside it.
        entry: the graph's entry in bundle.json.
        profiles: optimization profiles; the shapes of every call must fit one of them.
        targets: GPU architectures such as sm86, which the one engine is for (TensorRT-RTX only); empty: the GPU that builds.
        workspace: bytes of scratch memory the engine may use; None: no limit.
        progress: called after every step of the build's outermost phase.
        cuda: the GPU to build on; None: no GPU is needed, because `targets` are given.

    Returns:
        The engine, and what TensorRT said of it.

    Raises:
        EngineBuildError: TensorRT cannot parse or build the graph, or would ignore one of its inputs.
        BackendError: TensorRT does not start on this machine.
        ArgumentError: this TensorRT cannot build for one of the targets.
    """
    cancelled = threading.Event()
    monitor = _make_monitor(trt, progress, cancelled)
    shapes = [{spec.name: profile.shapes(spec) for spec in entry.inputs} for profile in profiles]

    def work() -> BuiltEngine:
        # TensorRT builds for the CUDA device that is current on the building thread.
        with nullcontext() if cuda is None else cuda.active(), tensorrt_logger(trt).collect() as messages:
            return _build(
                trt, messages, graph, lambda builder: _builder_config(trt, builder, shapes, targets, workspace, monitor)
            )

    return _run_on_thread(work, cancelled)


def _build(trt: Any, messages: LogMessages, graph: Path, configure: Callable[[Any], Any]) -> BuiltEngine:
    """Parse a graph into a strongly typed network and build its engine.

    Args:
        trt: the TensorRT module.
        messages: collects TensorRT's messages meanwhile.
        graph: the `.onnx` file.
        configure: makes the builder's configuration.
    """
    log = tensorrt_logger(trt)
    builder = create_or_raise(trt, messages, lambda: trt.Builder(log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EngineBuildError(f"TensorRT cannot read {graph.name}: {'; '.join(errors)}.", _REPORT_HINT)
    engine = builder.build_serialized_network(network, configure(builder))
    if engine is None and not threading.main_thread().is_alive():
        raise EngineBuildError(
            f"Building {graph.name} was given up, because the program ended.", "Build ahead with `tokenflow build BUNDLE`."
        )
    if engine is None:
        raise EngineBuildError(
            f"TensorRT cannot build {graph.name}: {'; '.join(messages.errors) or 'it does not say why'}.", _REPORT_HINT
        )
    ignored = [text for text in messages.warnings if "Unused Input" in text]
    if ignored:
        raise EngineBuildError(f"TensorRT would ignore an input of {graph.name}: {ignored[0]}.", _REPORT_HINT)
    return BuiltEngine(bytes(engine), _figures(messages.build_notes))


def _figures(notes: Iterable[str]) -> dict[str, int]:
    """The figures of a `BuiltEngine` that TensorRT's messages tell."""
    text = "\n".join(notes)
    # Memory is logged for each profile.
    found = {name: max(map(int, sizes)) for name, pattern in _FIGURES.items() if (sizes := re.findall(pattern, text))}
    kernels = _KERNEL.findall(text)
    if kernels:
        found |= {"kernels": len(kernels), "fused_attentions": sum(_FUSED_ATTENTION in name for name in kernels)}
    return found


def _run_on_thread(work: Callable[[], BuiltEngine], cancelled: threading.Event) -> BuiltEngine:
    """Run `work` on a new thread and return its result. An interrupted wait sets `cancelled` and joins the thread."""
    future: Future[BuiltEngine] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # Not a daemon thread: at exit Python waits for it instead of killing it inside TensorRT. The progress monitor ends the
    # build once the main thread is gone.
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


def _builder_config(
    trt: Any,
    builder: Any,
    profiles: Sequence[Mapping[str, Shapes]],
    targets: tuple[str, ...],
    workspace: int | None,
    monitor: Any,
) -> Any:
    """TensorRT's `IBuilderConfig`; `profiles` give each input's least, usual and largest shape."""
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    capabilities = compute_capabilities(trt, targets)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(capability, i)
    # TF32 would round the inputs of float32 products to 10 bits of mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Makes TensorRT log the layers of the engine, which is not larger for it.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for shapes in profiles:
        optimization = builder.create_optimization_profile()
        for name, limits in shapes.items():
            optimization.set_shape(name, *limits)
        config.add_optimization_profile(optimization)
    config.progress_monitor = monitor
    return config


_REPORT_HINT = "Use backend='onnxruntime' for this bundle, or another version of TensorRT, and report it with this message."


def compute_capabilities(trt: Any, targets: Iterable[str]) -> list[Any]:
    """TensorRT-RTX's values for GPU architectures such as sm86.

    Raises:
        ArgumentError: this TensorRT cannot build for one of them; full TensorRT builds for the GPU that is there only.
    """
    known = getattr(trt, "ComputeCapability", None)
    names = {name.lower(): getattr(known, name) for name in dir(known) if name.startswith("SM")}
    unknown = [target for target in targets if target.lower() not in names]
    if unknown:
        listed = ",".join(sorted(names, key=lambda name: (len(name), name)))
        raise ArgumentError(
            f"{trt.__name__} {trt.__version__} cannot build for {', '.join(map(repr, unknown))}.",
            f"Choose from: {listed}. Engines for other GPUs, such as sm90, are built by full TensorRT on a machine with that "
            "GPU: `--backend tensorrt` without --target."
            if names
            else "Build on a machine with that GPU and without --target, or with --backend tensorrt-rtx.",
        )
    return [names[target.lower()] for target in targets]


def _make_monitor(trt: Any, progress: Progress | None, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the steps of the outermost phase, and stops the build when it is cancelled or the program ends."""

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
