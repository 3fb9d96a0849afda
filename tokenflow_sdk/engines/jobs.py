"""Lists the engines that a bundle needs, and gets each from the cache or builds it into the cache."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.annotations import Annotations
from tokenflow_sdk.engines.build import REVISION, BuiltEngine, Progress, build_engine, compute_capabilities, engine_graph
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, EngineKey, graph_digest, join_targets
from tokenflow_sdk.engines.profiles import Profile, graph_profiles
from tokenflow_sdk.errors import BackendError, EngineBuildError, OutputError
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit
from tokenflow_sdk.steps import StepLog

__all__ = ["EngineJob", "engine_jobs"]

_FIRST_FP8_ARCHITECTURE = 89
"""The oldest GPU architecture (sm89) with fp8 arithmetic."""


@dataclass(frozen=True)
class EngineJob:
    """The engine of one graph for one or more GPU architectures, and all that is needed to build it.

    Attributes:
        graph: the bundle's `.onnx` file.
        entry: the graph's entry in bundle.json.
        key: of the engine in the cache.
        profiles: optimization profiles.
        build_config: precision, workspace and targets.
        pinned: names of nodes that stay in float32.
        ranges: activation ranges of the convolutions that run in 8 bits; None: no 8-bit convolutions.
        cuda: the GPU to build on; None: `build_config` names targets, and no GPU is needed.
    """

    graph: Path
    entry: GraphEntry
    key: EngineKey
    profiles: tuple[Profile, ...]
    build_config: BuildConfig
    pinned: tuple[str, ...] = ()
    ranges: ActivationRanges | None = None
    cuda: Cuda | None = None

    def run(self, trt: ModuleType, cache: EngineCache, progress: Progress | None = None) -> tuple[CachedEngine, bool]:
        """Get the engine from the cache, or build it. Of several processes that want the same engine, one builds it.

        Args:
            trt: the TensorRT module, from `import_tensorrt`.
            cache: where the engine is looked up and stored.
            progress: see `build_engine`.

        Returns:
            The engine, and whether it was built by this call.

        Raises:
            EngineBuildError, BackendError, ArgumentError: see `build_engine`.
            MissingPackageError: onnx_ir or filelock is not installed.
            CorruptBundleError: the graph cannot be read.
            OutputError: the cache or the temporary directory cannot be written.
        """
        with cache.building(self.key):
            found = cache.get(self.key)
            if found is not None:
                return found, False
            try:
                with tempfile.TemporaryDirectory(prefix="tokenflow-") as work, StepLog("tokenflow_sdk") as log:
                    log.start(f"building {self.key.title}")

                    def report(phase: str, share: float) -> None:
                        log.fraction(share)
                        if progress is not None:
                            progress(phase, share)

                    engine = self._build(trt, Path(work), report)
            except OSError as error:
                raise OutputError(
                    f"The graph of {self.key.title} cannot be prepared: {error.strerror or error}.",
                    "Free some space, or name another directory for temporary files in $TMPDIR.",
                ) from error
            return cache.put(self.key, engine.plan, self.build_config.to_json(), engine.figures), True

    def _build(self, trt: ModuleType, work: Path, progress: Progress | None) -> BuiltEngine:
        config = self.build_config
        half = None if config.precision == "fp32" else config.precision
        graph = engine_graph(self.graph, half, work, self.pinned, self.ranges)
        workspace = int(config.workspace_gb * 2**30) or None
        targets = self.key.targets if config.targets else ()
        return build_engine(trt, graph, self.entry, self.profiles, targets, workspace, progress, self.cuda)


def engine_jobs(bundle: Bundle[Any], build_config: BuildConfig, trt: ModuleType, device: int = 0) -> Iterator[EngineJob]:
    """Yield a job for every graph of a bundle. With several targets, its engine is for all of them.

    Args:
        bundle: of any kind.
        build_config: how the engines are built; without targets they are for the GPU `device`.
        trt: the TensorRT module, from `import_tensorrt`.
        device: CUDA index of the GPU.

    Raises:
        ArgumentError: this TensorRT cannot build for a target of the build config, or TensorRT-RTX for the GPU.
        MissingPackageError, BackendError: the build config names no target, and cuda-bindings or a usable GPU is missing.
        EngineBuildError: the bundle has no reference; the build config asks for an 8-bit decoder, and the bundle has no ranges
            for it, or a target has no fp8 arithmetic.
        CorruptBundleError: the bundle's file of pinned nodes or of ranges is damaged.
    """
    _require_reference(bundle)
    cuda = None if build_config.targets else _open_gpu(build_config, device)
    target = join_targets(build_config.targets if cuda is None else (cuda.architecture,))
    if build_config.targets or build_config.backend == "tensorrt-rtx":
        compute_capabilities(trt, target.split(","))
    # Full TensorRT picks kernels by timing them on this GPU model, and warns when another model loads the engine.
    gpu = cuda.model if cuda is not None and build_config.backend == "tensorrt" else ""
    profiles, annotations = graph_profiles(bundle, build_config), Annotations.of(bundle, build_config)
    if annotations.ranges is not None:
        _require_fp8_support(annotations.ranges.dtype, target.split(","))
    for name, entry in bundle.graphs.items():
        sizes = " ".join(profile.canonical for profile in profiles[name])
        key = EngineKey(
            graph=name,
            graph_sha256=graph_digest(entry),
            revision=REVISION,
            flavour=build_config.backend,
            version=str(trt.__version__),
            target=target,
            precision=annotations.key(name),
            gpu=gpu,
            profile=hashlib.sha256(f"{sizes} {build_config.workspace_gb}".encode()).hexdigest()[:16],
        )
        yield EngineJob(
            bundle.graph_path(name),
            entry,
            key,
            profiles[name],
            build_config,
            annotations.pinned.get(name, ()),
            annotations.ranges if name == "decode" else None,
            cuda,
        )


def _require_reference(bundle: Bundle[Any]) -> None:
    """Raise EngineBuildError unless the bundle has a reference."""
    if "reference" not in bundle.assets:
        raise EngineBuildError(
            f"{bundle.path} has no reference that its engines could be compared with: an older SDK exported it.",
            "Export it again with `tokenflow export`, or use backend='onnxruntime'.",
        )


def _open_gpu(build_config: BuildConfig, device: int) -> Cuda:
    """The GPU `device`; where there is none, TensorRT-RTX's error also says how to build without one."""
    try:
        return Cuda(device)
    except BackendError as error:
        if build_config.backend == "tensorrt-rtx":
            raise BackendError(
                error.message, f"Name what to build for, e.g. `--target sm86,sm89,sm120`. {error.hint}"
            ) from error
        raise


def _require_fp8_support(dtype: EightBit, targets: Iterable[str]) -> None:
    """Raise EngineBuildError if `dtype` is fp8 and a target has no fp8 arithmetic."""
    numbers = {target: re.fullmatch(r"sm(\d+)", target) for target in targets}
    older = [target for target, number in numbers.items() if number is not None and int(number[1]) < _FIRST_FP8_ARCHITECTURE]
    if dtype == "fp8" and older:
        raise EngineBuildError(
            f"{', '.join(older)} has no fp8 arithmetic; GPUs from sm{_FIRST_FP8_ARCHITECTURE} on have.",
            "Build with --decoder int8.",
        )
