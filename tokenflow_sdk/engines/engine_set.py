"""A bundle's engines on this machine's GPU: finds them in the cache or builds them, certifies them and opens their sessions."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.backends.tensorrt_module import import_tensorrt, require_installed
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build import REVISION, Progress
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, graph_digest, join_targets
from tokenflow_sdk.engines.jobs import EngineJob, engine_jobs
from tokenflow_sdk.engines.memory_plan import memory_plans, require_fit
from tokenflow_sdk.engines.profiles import pool_pages
from tokenflow_sdk.errors import BackendError, OutputError
from tokenflow_sdk.parity.certificate import Certificate, certify
from tokenflow_sdk.steps import StepLog

__all__ = ["Engines", "progress_bar"]

_PREFERRED = ("fp16", "bf16", "fp32")
"""Precisions of cached engines, the preferred first."""


class Engines:
    """The engines of all graphs of a bundle, on one GPU of this machine.

    Args:
        bundle: of any kind.
        build_config: how the engines are built, and by which TensorRT. If it has targets, the GPU must be one of them. Engines
            that are missing are built for this GPU only; one in the cache may be for others too.
        device: CUDA index of the GPU.
        cache: where built engines are kept; None: the user's cache.
        execution_contexts: calls of one graph that may run at once.
        cuda_graphs: see `TensorRTSession`.

    Raises:
        MissingPackageError: TensorRT or cuda-bindings is not installed.
        BackendError: there is no usable GPU, or the build config is not for this GPU.
        ArgumentError, EngineBuildError, CorruptBundleError: see `engine_jobs`.
    """

    def __init__(
        self,
        bundle: Bundle[Any],
        build_config: BuildConfig,
        device: int = 0,
        cache: EngineCache | None = None,
        execution_contexts: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        self.bundle, self.build_config = bundle, build_config
        self.cache = cache or EngineCache()
        require_installed(build_config.backend)
        self._cuda = Cuda(device)
        self._trt = import_tensorrt(build_config.backend)
        self._execution_contexts, self._cuda_graphs = execution_contexts, cuda_graphs
        self.pages = pool_pages(bundle.config, build_config)
        """Pages of the key/value pool that a language model's engine is built for; 0 for a tokenizer."""
        self._found: dict[str, CachedEngine] = {}
        self._may_repair = False
        self._architecture = self._cuda.architecture
        _require_target(build_config, self._architecture, self._cuda.device)
        here = build_config.with_overrides(targets=(self._architecture,) if build_config.backend == "tensorrt-rtx" else ())
        self.jobs: dict[str, EngineJob] = {job.key.graph: job for job in engine_jobs(bundle, here, self._trt, device)}

    def missing(self) -> list[EngineJob]:
        """The jobs whose engines are not in the cache."""
        return [job for job in self.jobs.values() if self._find(job) is None]

    def usable(self) -> bool:
        """Whether all engines are in the cache and none missed a tolerance; they may still have to be compared."""
        if self.missing():
            return False
        certificate = self.certificate()
        return certificate is None or certificate.passed

    def other_build_configs(self) -> list[BuildConfig]:
        """Build configs of this bundle's other engines in the cache, for this TensorRT and GPU.

        Half precision comes before float32, then smaller batches before larger ones.
        """
        graphs = {graph_digest(entry) for entry in self.bundle.graphs.values()}
        here = next(iter(self.jobs.values())).key
        found = {
            BuildConfig.from_json(engine.build_config)
            for engine in self.cache.entries()
            if engine.key.graph_sha256 in graphs and engine.key.runs_where(here)
        }
        others = [config for config in found if config is not None and config != self.build_config]
        return sorted(
            others,
            key=lambda config: (_PREFERRED.index(config.precision), config.decoder or "", config.batch, config.pages),
        )

    def with_build_config(self, build_config: BuildConfig) -> Engines:
        """The same bundle's engines on the same GPU, built by another build config. Errors as in the constructor."""
        return Engines(self.bundle, build_config, self._cuda.device, self.cache, self._execution_contexts, self._cuda_graphs)

    def certificate(self) -> Certificate | None:
        """The certificate stored with the engines; None if an engine is missing or was not compared yet."""
        found = [self._find(job) for job in self.jobs.values()]
        return Certificate.of_all({} if engine is None else engine.certificates.get(self._architecture, {}) for engine in found)

    def prepare(self, build: bool = True, progress: Progress | None = None) -> Certificate:
        """Build the engines that are missing, and compare the engines with the bundle's reference unless that was done before.

        Args:
            build: False raises an error instead of building.
            progress: called with e.g. "building decode (2 of 4)", and the fraction of that engine's build that is done.

        Returns:
            The certificate of the engines, which has passed.

        Raises:
            BackendError: an engine is missing and `build` is False, or TensorRT cannot load or run an engine.
            EngineBuildError: TensorRT cannot build an engine, or the engines do not fit the GPU.
            EngineRefusedError: the engines do not reproduce the reference.
            OutputError, MissingPackageError: see `EngineJob.run`.
        """
        self._may_repair = build
        missing = self.missing()
        if missing and not build:
            raise BackendError(
                f"{self.build_config.backend} has no engine yet for {', '.join(map(self._title_of_missing, missing))}.",
                f"Run `{self.build_config.command(self.bundle.path)}`, or leave build=False out.",
            )
        if missing:
            self._require_fit()
        for number, job in enumerate(missing, 1):
            title = f"building {job.key.graph} ({number} of {len(missing)})"
            job.run(self._trt, self.cache, None if progress is None else _with_title(progress, title))
        certificate = self.certificate() or self.recertify()
        self._require_passed(certificate)
        return certificate

    def _require_fit(self) -> None:
        """Raise EngineBuildError if all engines together take more memory than the build config says, or the GPU has."""
        memory = int(self.build_config.memory_gb * 1e9) or self._cuda.memory
        if memory:
            for plan in memory_plans(self.jobs.values(), self.cache):
                require_fit(plan, memory)

    def _require_passed(self, certificate: Certificate) -> None:
        certificate.require(f"The {self.build_config.precision} engines of {self.bundle.path.name} on {self._architecture}")

    def recertify(self) -> Certificate:
        """Compare the engines with the bundle's reference now, and store the certificate with each engine.

        Returns:
            The certificate, whether it has passed or not.

        Raises:
            BackendError: an engine is missing, or cannot be loaded or run.
        """
        config = self.build_config
        with StepLog("tokenflow_sdk") as log:
            log.start(f"comparing the engines of {self.bundle.path.name} with its reference")
            certificate = certify(self.bundle, self.open, config.precision, self.pages, decoder=config.decoder)
        try:
            for job in self.jobs.values():
                engine = self._find(job)
                if engine is not None:
                    self.cache.certify(engine.key, self._architecture, certificate.to_json())
        except OutputError as error:
            # The cache may be read-only, e.g. on a device that was shipped with its engines.
            logging.getLogger("tokenflow_sdk").warning("The comparison is repeated at the next start: %s", error)
        self._found.clear()
        return certificate

    def _find(self, job: EngineJob) -> CachedEngine | None:
        """The job's engine in the cache, or None. Found engines are remembered; loading compares their SHA-256."""
        found = self._found.get(job.key.digest) or self.cache.find(job.key)
        if found is not None:
            self._found[job.key.digest] = found
        return found

    def _title_of_missing(self, job: EngineJob) -> str:
        """The title of a job without an engine, and why one in the cache is not used, if another SDK or TensorRT built it."""
        earlier = next(
            (
                key
                for key in (engine.key for engine in self.cache.entries())
                if replace(key, revision=job.key.revision, version=job.key.version).serves(job.key)
            ),
            None,
        )
        if earlier is None:
            return job.key.title
        if earlier.revision != job.key.revision:
            return f"{job.key.title} (one of layout {earlier.revision} is in the cache, and this SDK's engines have {REVISION})"
        return f"{job.key.title} (one of {earlier.flavour} {earlier.version} is in the cache)"

    def open(self, path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        """Open a session on the engine of a graph. An `OpenSession`; call `prepare` first.

        An engine that turns out damaged never runs. If `prepare` was allowed to build, it is built and compared again.

        Args:
            path: ignored.
            entry: which graph.
            options: ignored.

        Raises:
            BackendError: the engine is gone from the cache, damaged, or cannot be loaded.
            EngineBuildError, EngineRefusedError: the engine in place of a damaged one cannot be built, or was refused.
        """
        job = next(job for job in self.jobs.values() if job.entry == entry)
        try:
            return self._load(job)
        except BackendError:
            if not self._may_repair or self._is_not_damaged(job):
                raise
        self._found.clear()
        # Only once: one that is damaged again at once is a fault of the disk.
        self._may_repair = False
        for other in self.jobs.values():
            other.run(self._trt, self.cache)
        self._require_passed(self.recertify())
        self._may_repair = True
        return self._load(job)

    def _is_not_damaged(self, job: EngineJob) -> bool:
        """Whether building again would not help: the job's engine is as it was stored, or gone."""
        found, intact = self._find(job), self.cache.get(job.key)
        return found is None or (intact is not None and intact.key == found.key)

    def _load(self, job: EngineJob) -> Session:
        from tokenflow_sdk.backends.tensorrt import TensorRTSession

        engine = self._find(job)
        if engine is None:
            raise BackendError(
                f"The engine of {job.key.title} is gone from {self.cache.directory}.",
                f"Run `{self.build_config.command(self.bundle.path)}`.",
            )
        return TensorRTSession(
            engine.path,
            engine.sha256,
            job.key.graph,
            job.entry,
            self._trt,
            self._cuda,
            self._execution_contexts,
            self._cuda_graphs,
            engine.kernels(self._architecture),
        )


def _require_target(build_config: BuildConfig, architecture: str, device: int) -> None:
    """Raise BackendError if a build config names targets, and this GPU is none of them."""
    if build_config.targets and architecture not in join_targets(build_config.targets).split(","):
        raise BackendError(
            f"The build config is for {', '.join(build_config.targets)}, and GPU {device} is {architecture}.",
            f"Name the build config of this GPU, add {architecture} to its targets, or leave targets out.",
        )


def _with_title(progress: Progress, title: str) -> Progress:
    """Report `title` instead of the name of TensorRT's phase."""
    return lambda _, share: progress(title, share)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a progress bar on stderr if that is a terminal and rich is there; yields the callback."""
    if importlib.util.find_spec("rich") is None:
        yield lambda title, share: None
        return
    bars = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(stderr=True)
    title = bars.TextColumn("{task.description}", markup=False)
    columns = (title, bars.BarColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("TensorRT", total=1.0)
        yield lambda title, share: progress.update(task, description=title, completed=share)
