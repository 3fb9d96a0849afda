"""A bundle's engines on this machine's GPU: finds them in the cache or builds them, certifies them and opens their sessions."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.backends.tensorrt_module import import_tensorrt, require_installed
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build import Progress
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, graph_digest
from tokenflow_sdk.engines.jobs import EngineJob, engine_jobs
from tokenflow_sdk.engines.profiles import pool_pages
from tokenflow_sdk.errors import BackendError, OutputError
from tokenflow_sdk.parity.certificate import Certificate, certify

__all__ = ["Engines", "progress_bar"]

_PREFERRED = ("fp16", "bf16", "fp32")
"""Precisions of cached engines, the preferred first."""


class Engines:
    """The engines of all graphs of a bundle, on one GPU of this machine.

    Args:
        bundle: of any kind.
        build_config: how the engines are built, and by which TensorRT. Its `targets` are ignored: engines are for the GPU
            `device`.
        device: CUDA index of the GPU.
        cache: where built engines are kept; None: the user's cache.
        execution_contexts: calls of one graph that may run at once.
        cuda_graphs: see `TensorRTSession`.

    Raises:
        MissingPackageError: TensorRT or cuda-bindings is not installed.
        BackendError: there is no usable GPU.
        EngineBuildError, CorruptBundleError: see `engine_jobs`.
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
        self._verified: dict[str, CachedEngine] = {}
        here = build_config.with_overrides(targets=(self._cuda.architecture,) if build_config.backend == "tensorrt-rtx" else ())
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
        here = {job.key.runtime_and_gpu for job in self.jobs.values()}
        found = {
            BuildConfig.from_json(engine.build_config)
            for engine in self.cache.entries()
            if engine.key.graph_sha256 in graphs and engine.key.runtime_and_gpu in here
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
        engines = [engine for engine in found if engine is not None]
        stored = [Certificate.from_json(engine.certificate) for engine in engines]
        if len(engines) < len(self.jobs) or any(certificate is None for certificate in stored):
            return None
        return next((c for c in stored if c is not None and not c.passed), stored[0])

    def prepare(self, build: bool = True, progress: Progress | None = None) -> Certificate:
        """Build the engines that are missing, and compare the engines with the bundle's reference unless that was done before.

        Args:
            build: False raises an error instead of building.
            progress: called with e.g. "building decode (2 of 4)", and the fraction of that engine's build that is done.

        Returns:
            The certificate of the engines, which has passed.

        Raises:
            BackendError: an engine is missing and `build` is False, or TensorRT cannot load or run an engine.
            EngineBuildError: TensorRT cannot build an engine.
            EngineRefusedError: the engines do not reproduce the reference.
            OutputError, MissingPackageError: see `EngineJob.run`.
        """
        missing = self.missing()
        if missing and not build:
            raise BackendError(
                f"{self.build_config.backend} has no engine yet for {', '.join(job.key.title for job in missing)}.",
                f"Run `{self.build_config.command(self.bundle.path)}`, or leave build=False out.",
            )
        for number, job in enumerate(missing, 1):
            title = f"building {job.key.graph} ({number} of {len(missing)})"
            job.run(self._trt, self.cache, None if progress is None else _with_title(progress, title))
        certificate = self.certificate() or self.recertify()
        certificate.require(
            f"The {self.build_config.precision} engines of {self.bundle.path.name} on {self._cuda.architecture}"
        )
        return certificate

    def recertify(self) -> Certificate:
        """Compare the engines with the bundle's reference now, and store the certificate with each engine.

        Returns:
            The certificate, whether it has passed or not.

        Raises:
            BackendError: an engine is missing, or cannot be loaded or run.
        """
        config = self.build_config
        certificate = certify(self.bundle, self.open, config.precision, self.pages, decoder=config.decoder)
        try:
            for job in self.jobs.values():
                self.cache.certify(job.key, certificate.to_json())
        except OutputError as error:
            # The cache may be read-only, e.g. on a device that was shipped with its engines.
            logging.getLogger("tokenflow_sdk").warning("The comparison is repeated at the next start: %s", error)
        self._verified.clear()
        return certificate

    def _find(self, job: EngineJob) -> CachedEngine | None:
        """The job's engine in the cache, or None. Found engines are remembered, because each look-up hashes the whole file."""
        found = self._verified.get(job.key.digest) or self.cache.get(job.key)
        if found is not None:
            self._verified[job.key.digest] = found
        return found

    def open(self, path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        """Open a session on the engine of a graph. An `OpenSession`; call `prepare` first.

        Args:
            path: ignored.
            entry: which graph.
            options: ignored.

        Raises:
            BackendError: the engine is gone from the cache, or cannot be loaded.
        """
        from tokenflow_sdk.backends.tensorrt import TensorRTSession

        job = next(job for job in self.jobs.values() if job.entry == entry)
        engine = self._find(job)
        if engine is None:
            raise BackendError(
                f"The engine of {job.key.title} is gone from {self.cache.directory}.",
                f"Run `{self.build_config.command(self.bundle.path)}`.",
            )
        return TensorRTSession(
            engine.path.read_bytes(),
            job.key.graph,
            entry,
            self._trt,
            self._cuda,
            self._execution_contexts,
            self._cuda_graphs,
            engine.kernels,
        )


def _with_title(progress: Progress, title: str) -> Progress:
    """Report `title` instead of the name of TensorRT's phase."""
    return lambda _, share: progress(title, share)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a progress bar on stderr if that is a terminal; yields the callback."""
    bars = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(stderr=True)
    title = bars.TextColumn("{task.description}", markup=False)
    columns = (title, bars.BarColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("TensorRT", total=1.0)
        yield lambda title, share: progress.update(task, description=title, completed=share)
