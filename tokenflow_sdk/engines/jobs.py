"""Which engines a bundle needs, and getting them: from the cache, else built once whoever asks first."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.annotations import Annotations
from tokenflow_sdk.engines.build import REVISION, Progress, build_engine, engine_graph
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, EngineKey, graph_digest
from tokenflow_sdk.engines.profiles import Profile, graph_profiles
from tokenflow_sdk.errors import BackendError, EngineBuildError, OutputError
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit

__all__ = ["EngineJob", "engine_jobs"]

_FIRST_FP8_ARCHITECTURE = 89
"""The first GPU architecture with fp8 products."""


@dataclass(frozen=True)
class EngineJob:
    """One engine to have: of a graph, for a target."""

    graph: Path
    entry: GraphEntry
    key: EngineKey
    profiles: tuple[Profile, ...]
    build_config: BuildConfig
    pinned: tuple[str, ...] = ()
    ranges: ActivationRanges | None = None
    cuda: Cuda | None = None
    """The GPU it is built on; None: built ahead."""

    def run(self, trt: ModuleType, cache: EngineCache, progress: Progress | None = None) -> tuple[CachedEngine, bool]:
        """The engine, and whether it was built now. Two processes that want the same one build it once.

        Raises:
            EngineBuildError, ArgumentError, MissingPackageError: see `build_engine`.
            OutputError: the cache or the temporary directory cannot be written.
        """
        with cache.building(self.key):
            found = cache.get(self.key)
            if found is not None:
                return found, False
            try:
                with tempfile.TemporaryDirectory(prefix="tokenflow-") as work:
                    engine = self._build(trt, Path(work), progress)
            except OSError as error:
                raise OutputError(
                    f"The graph of {self.key.title} cannot be prepared: {error.strerror or error}.",
                    "Free some space, or name another directory for temporary files in $TMPDIR.",
                ) from error
            return cache.put(self.key, engine, self.build_config.to_json()), True

    def _build(self, trt: ModuleType, work: Path, progress: Progress | None) -> bytes:
        build_config = self.build_config
        graph = engine_graph(
            self.graph, None if build_config.precision == "fp32" else build_config.precision, work, self.pinned, self.ranges
        )
        workspace = int(build_config.workspace_gb * 2**30) or None
        target = self.key.target if build_config.targets else None
        return build_engine(trt, graph, self.entry, self.profiles, target, workspace, progress, self.cuda)


def engine_jobs(bundle: Bundle[Any], build_config: BuildConfig, trt: ModuleType, device: int = 0) -> Iterator[EngineJob]:
    """The engines of every graph of a bundle for every target; without one, for GPU `device`.

    Raises:
        MissingPackageError, BackendError: the build config names no target, and there is no GPU or no way to ask it.
        EngineBuildError: the bundle has no reference, or was exported in float16 and another precision is asked for; or a
            decoder in 8 bits is, for which the bundle has no ranges, or fp8 where a GPU has none.
        CorruptBundleError: the bundle's list of pinned nodes or of ranges is damaged.
    """
    if "reference" not in bundle.assets:
        raise EngineBuildError(
            f"{bundle.path} has no reference that its engines could be compared with: an older SDK exported it.",
            "Export it again with `tokenflow export`, or use backend='onnxruntime'.",
        )
    if bundle.in_half and build_config.precision != "fp16":
        raise EngineBuildError(
            f"{bundle.path} was exported in float16, so its engines cannot be in {build_config.precision}.",
            "Build with --precision fp16, or export it again with --dtype fp32; --weights stays as it was.",
        )
    cuda = None if build_config.targets else _open_gpu(build_config, device)
    targets = build_config.targets if cuda is None else (cuda.architecture,)
    # Full TensorRT chooses kernels for the GPU that it measures them on, and warns of others.
    gpu = cuda.model if cuda is not None and build_config.backend == "tensorrt" else ""
    profiles, annotations = graph_profiles(bundle, build_config), Annotations.of(bundle, build_config)
    if annotations.ranges is not None:
        _require_fp8_support(annotations.ranges.dtype, targets)
    for target in targets:
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


def _open_gpu(build_config: BuildConfig, device: int) -> Cuda:
    try:
        return Cuda(device)
    except BackendError as error:
        if build_config.backend == "tensorrt-rtx":
            raise BackendError(
                error.message, f"Name what to build for, e.g. `--target sm86,sm89,sm120`. {error.hint}"
            ) from error
        raise


def _require_fp8_support(dtype: EightBit, targets: tuple[str, ...]) -> None:
    """Raises:
    EngineBuildError: a target is older than fp8 products.
    """
    numbers = {target: re.fullmatch(r"sm(\d+)", target) for target in targets}
    older = [target for target, number in numbers.items() if number is not None and int(number[1]) < _FIRST_FP8_ARCHITECTURE]
    if dtype == "fp8" and older:
        raise EngineBuildError(
            f"{', '.join(older)} has no fp8 arithmetic; GPUs from sm{_FIRST_FP8_ARCHITECTURE} on have.",
            "Build with --decoder int8.",
        )
