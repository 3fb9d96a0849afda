"""Which engine runs a bundle here, and why."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenflow_sdk.backends.base import OpenSession, SessionOptions, open_onnxruntime
from tokenflow_sdk.backends.cuda import driver_problem
from tokenflow_sdk.backends.providers import CPU, CUDA, OPENVINO
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.engine_recipe import ONNXRUNTIME, EnginePlan
from tokenflow_sdk.engines import Engines, shown_progress
from tokenflow_sdk.errors import ArgumentError, TokenFlowError
from tokenflow_sdk.scheduler import PAGE_SIZE
from tokenflow_sdk.tensorrt_module import FLAVOURS

__all__ = ["BACKENDS", "Candidate", "EngineOptions", "Needs", "choose", "survey"]

BACKENDS = ("auto", ONNXRUNTIME, *FLAVOURS)


@dataclass(frozen=True)
class Needs:
    """What engines must be built for: pictures in a call; a generator's pages (None: as the plan says) and their size."""

    batch: int = 1
    pages: int | None = None
    page_size: int = PAGE_SIZE


@dataclass(frozen=True)
class EngineOptions:
    """Which engine runs a bundle.

    Args:
        backend: `auto`, `onnxruntime`, `tensorrt` or `tensorrt-rtx`. `auto` takes the first that works here of: TensorRT whose
            engines are in the cache and certified, onnxruntime with CUDA, with OpenVINO, on the CPU. It never builds.
        plan: how TensorRT engines are built: an `EnginePlan`, a recipe's name or path; None: as those were that are in the
            cache and take what is asked for, else float16 and default batches.
        build: build TensorRT engines that are missing; False refuses instead.
        serve_while_building: answer from onnxruntime until the engines are built and certified.
        lanes: calls of one graph that may run on a GPU at once.
        cuda_graphs: replay calls with shapes seen before as one launch.

    Raises:
        ArgumentError: no such backend or recipe, or options that exclude each other.
    """

    backend: str = "auto"
    plan: EnginePlan | str | None = None
    build: bool = True
    serve_while_building: bool = False
    lanes: int = 1
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ArgumentError(f"There is no backend {self.backend!r}.", f"Choose one of: {', '.join(BACKENDS)}.")
        if self.lanes < 1:
            raise ArgumentError(f"lanes={self.lanes} runs nothing.", "Give at least 1.")
        if self.serve_while_building and (self.backend not in FLAVOURS or not self.build):
            raise ArgumentError(
                "serve_while_building=True builds TensorRT engines.",
                "Give backend='tensorrt' or 'tensorrt-rtx', and build=True.",
            )

    def _plan(self) -> EnginePlan | None:
        return EnginePlan.from_recipe(self.plan) if isinstance(self.plan, str) else self.plan

    def wants_onnxruntime(self) -> bool:
        """Whether the backend is onnxruntime, or a plan for CPUs says so.

        Raises:
            ArgumentError: the backend is TensorRT and the plan is for CPUs.
        """
        plan = self._plan()
        for_cpus = plan is not None and plan.backend == ONNXRUNTIME
        if for_cpus and self.backend in FLAVOURS:
            raise ArgumentError(f"The plan is for onnxruntime, not for {self.backend}.", "Leave backend= or plan= out.")
        return self.backend == ONNXRUNTIME or for_cpus

    def engines(self, bundle: Bundle[Any], options: SessionOptions, needs: Needs, backend: str | None = None) -> Engines:
        """The bundle's engines on the GPU that `options` name, for `backend` or another TensorRT.

        Raises:
            MissingPackageError, BackendError: TensorRT or a GPU is missing.
            ArgumentError: a page size that engines are not built for.
        """
        if needs.page_size != PAGE_SIZE:
            raise ArgumentError(f"TensorRT engines have pages of {PAGE_SIZE} tokens.", "Leave page_size= out.")
        plan = self._plan() or EnginePlan()
        least, usual, most = plan.batch
        plan = plan.changed(backend=backend or self.backend, batch=(least, usual, max(most, needs.batch)), pages=needs.pages)
        device = int(options.device.partition(":")[2] or 0)
        engines = Engines(bundle, plan, device, lanes=self.lanes, cuda_graphs=self.cuda_graphs)
        return engines if self.plan is not None else _built(engines, needs)


def _built(engines: Engines, needs: Needs) -> Engines:
    """Engines that are there and were not refused, by whatever plan; else those that were asked for."""
    if engines.usable():
        return engines
    for plan in engines.other_plans():
        # A decoder's ranges may be gone from the bundle since.
        with suppress(TokenFlowError):
            if plan.covers(needs.batch, needs.pages) and (other := engines.changed(plan)).usable():
                return other
    return engines


@dataclass(frozen=True)
class Candidate:
    """A way to run a bundle here: its backend, for onnxruntime its providers, and why it can or cannot be used."""

    title: str
    backend: str
    usable: bool
    why: str
    providers: tuple[str, ...] | None = None
    engines: Engines | None = None


def survey(bundle: Bundle[Any], options: SessionOptions, wanted: EngineOptions, needs: Needs = Needs()) -> Iterator[Candidate]:
    """Every way to run a bundle here, the best first. Looking at one costs nothing until it is asked for."""
    if options.device != "cpu":
        for flavour in FLAVOURS:
            yield _tensorrt(bundle, options, wanted, needs, flavour)
    yield from _onnxruntime(bundle, options)


def _tensorrt(bundle: Bundle[Any], options: SessionOptions, wanted: EngineOptions, needs: Needs, flavour: str) -> Candidate:
    try:
        engines = wanted.engines(bundle, options, needs, flavour)
        missing, certificate = engines.missing(), engines.certificate()
    except TokenFlowError as error:
        return Candidate(flavour, flavour, False, error.message)
    if missing:
        names = ", ".join(job.key.graph for job in missing)
        return Candidate(flavour, flavour, False, f"no engine built yet for {names}: run `{engines.plan.command(bundle.path)}`")
    if certificate is not None and not certificate.passed:
        return Candidate(flavour, flavour, False, f"its engines were refused: {'; '.join(certificate.failures)}")
    why = "engines are built, to be compared at first use" if certificate is None else f"certified: {certificate.summary}"
    return Candidate(flavour, flavour, True, why, engines=engines)


def _onnxruntime(bundle: Bundle[Any], options: SessionOptions) -> Iterator[Candidate]:
    try:
        available = importlib.import_module("onnxruntime").get_available_providers()
    except ImportError as error:
        yield Candidate("onnxruntime", "onnxruntime", False, f"not installed ({error})")
        return
    if options.device != "cpu":
        cuda = options if options.device.startswith("cuda") else replace(options, device="cuda")
        problem = _why_not(bundle, cuda, CUDA in available, driver_problem)
        yield Candidate("onnxruntime, CUDA", "onnxruntime", problem is None, problem or "starts here")
    if not options.device.startswith("cuda"):
        providers = (OPENVINO, CPU)
        openvino = replace(options, device="auto", providers=providers)
        problem = _why_not(bundle, openvino, OPENVINO in available, _processor_problem)
        yield Candidate("onnxruntime, OpenVINO", "onnxruntime", problem is None, problem or "starts here", providers)
        yield Candidate("onnxruntime, CPU", "onnxruntime", True, "always works")


def _why_not(
    bundle: Bundle[Any], options: SessionOptions, built_in: bool, hardware_problem: Callable[[], str | None]
) -> str | None:
    """Why a provider does not run here; None: it does. onnxruntime names those too whose libraries are missing, so the smallest
    graph is opened."""
    problem = hardware_problem() if built_in else "this onnxruntime was built without it"
    if problem is not None:
        return problem
    entry = min(bundle.graphs.values(), key=lambda graph: sum(file.size for file in graph.files))
    try:
        open_onnxruntime(bundle.path / entry.files[0].name, entry, options).close()
    except TokenFlowError as error:
        return error.message
    return None


def _processor_problem() -> str | None:
    """Why OpenVINO is no gain here: it is made for Intel's processors, and slower than onnxruntime's own kernels on others."""
    names = [platform.processor()]
    with suppress(OSError):
        names += Path("/proc/cpuinfo").read_text().splitlines()[:8]
    return (
        None if any("Intel" in name for name in names) else "it is for Intel's processors; name it in providers= all the same"
    )


def choose(
    bundle: Bundle[Any], options: SessionOptions, wanted: EngineOptions, needs: Needs = Needs()
) -> tuple[OpenSession, SessionOptions]:
    """How to open a bundle's sessions; engines are prepared then.

    Raises:
        MissingPackageError, BackendError: what was asked for does not work here.
        EngineBuildError, EngineRefusedError: see `Engines.prepare`.
    """
    if wanted.wants_onnxruntime():
        # With `auto` a plan for CPUs said so.
        cpu = wanted.backend == "auto" and options.device == "auto" and options.providers is None
        return open_onnxruntime, replace(options, device="cpu") if cpu else options
    if wanted.backend in FLAVOURS:
        engines = wanted.engines(bundle, options, needs)
        with shown_progress() as progress:
            engines.prepare(wanted.build, progress)
        return engines.open, options
    if options.providers is not None:
        return open_onnxruntime, options
    best = next((candidate for candidate in survey(bundle, options, wanted, needs) if candidate.usable), None)
    if best is None:
        # Opening a session then says what is missing.
        return open_onnxruntime, options
    if best.engines is not None:
        best.engines.prepare(build=False)
        return best.engines.open, options
    return open_onnxruntime, replace(options, providers=best.providers) if best.providers else options
