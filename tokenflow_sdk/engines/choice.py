"""Chooses the backend that runs a bundle on this machine: TensorRT with certified engines, OpenVINO, or onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenflow_sdk.backends.cuda import driver_problem
from tokenflow_sdk.backends.onnxruntime import import_onnxruntime, open_onnxruntime
from tokenflow_sdk.backends.openvino import OPENVINO, runs_by_picture, survived_fork
from tokenflow_sdk.backends.providers import CUDA, TENSORRT, select_providers
from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build_config import ONNXRUNTIME, BuildConfig
from tokenflow_sdk.engines.engine_set import Engines, progress_bar
from tokenflow_sdk.engines.measured_choice import MeasuredChoice
from tokenflow_sdk.engines.openvino_models import FewerBits, open_openvino
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import ArgumentError, BackendError, MissingPackageError, TokenFlowError
from tokenflow_sdk.parity.certificate import certify

__all__ = ["Candidate", "Needs", "choose", "engines_for", "require_by_picture", "suitable_batch_limit", "survey"]

_GPU_BATCH = 8
"""Most images in a call on a GPU in onnxruntime, if nobody says."""
_log = logging.getLogger("tokenflow_sdk")


@dataclass(frozen=True)
class Needs:
    """What a caller needs of the engines.

    Args:
        batch: most images in a call.
        pages: pages in a language model's key/value pool; None: as many as the build config says.
        page_size: tokens in a page; TensorRT engines are built for the default only.
    """

    batch: int = 1
    pages: int | None = None
    page_size: int = PAGE_SIZE


def engines_for(bundle: Bundle[Any], options: RuntimeOptions, needs: Needs, backend: str | None = None) -> Engines:
    """The bundle's engines for the GPU and build config in `options`. Nothing is built yet.

    If `options` has no build config, and the engines of the default one are not in the cache, cached engines that were built by
    another build config are used if they meet the needs.

    Args:
        bundle: of any kind.
        options: names the GPU, the build config and how sessions run.
        needs: what the engines must be built for.
        backend: `tensorrt` or `tensorrt-rtx`, overriding `options.backend`.

    Raises:
        MissingPackageError: TensorRT or cuda-bindings is not installed.
        BackendError: there is no usable GPU.
        EngineBuildError: the bundle's engines cannot be built by the build config; see `engine_jobs`.
        ArgumentError: `needs.page_size` is not the default; the build config is for another backend, or cannot be read.
    """
    options.wanted()  # raises if the build config is for another backend
    if needs.page_size != PAGE_SIZE:
        raise ArgumentError(f"TensorRT engines have pages of {PAGE_SIZE} tokens.", "Leave page_size= out.")
    config = options.loaded_build_config() or BuildConfig()
    least, usual, most = config.batch
    batch = (least, usual, max(most, needs.batch))
    engines = Engines(
        bundle,
        config.with_overrides(backend=backend or options.backend, batch=batch, pages=needs.pages),
        options.device_index,
        execution_contexts=options.execution_contexts,
        cuda_graphs=options.cuda_graphs,
    )
    return engines if options.build_config is not None else _prefer_built(engines, needs)


def _prefer_built(engines: Engines, needs: Needs) -> Engines:
    """`engines` if they are usable; else cached engines built by another build config that meet the needs; else `engines`."""
    if engines.usable():
        return engines
    for config in engines.other_build_configs():
        # Skip a build config that no longer works, e.g. one for an 8-bit decoder whose ranges are gone from the bundle.
        with suppress(TokenFlowError):
            if config.supports(needs.batch, needs.pages) and (other := engines.with_build_config(config)).usable():
                return other
    return engines


@dataclass(frozen=True)
class Candidate:
    """One way to run a bundle on this machine.

    Attributes:
        title: name for tables, e.g. `onnxruntime, CUDA`.
        backend: `onnxruntime`, `openvino`, `tensorrt` or `tensorrt-rtx`.
        usable: whether it can run the bundle now, without building.
        reason: why it is usable or not, in words.
        engines: of a usable TensorRT candidate; None for others.
        automatic: whether `auto` takes it where it is usable.
        graphs: of an OpenVINO candidate: those that it runs where `auto` takes it, and onnxruntime the others.
    """

    title: str
    backend: str
    usable: bool
    reason: str
    engines: Engines | None = None
    automatic: bool = True
    graphs: tuple[str, ...] = ()

    @property
    def chosen(self) -> bool:
        """Whether `auto` may take it: the first of a survey runs."""
        return self.usable and self.automatic


def survey(bundle: Bundle[Any], options: RuntimeOptions, needs: Needs = Needs()) -> Iterator[Candidate]:
    """Yield every way to run a bundle on this machine, the preferred first. Each is examined when the iterator reaches it."""
    if options.device != "cpu":
        for flavour in FLAVOURS:
            yield _tensorrt_candidate(bundle, options, needs, flavour)
    if options.device != "cpu":
        yield _cuda_candidate(bundle, options.session)
    if not options.device.startswith("cuda"):
        yield _openvino_candidate(bundle, options.session)
        try:
            import_onnxruntime()
            yield Candidate("onnxruntime, CPU", "onnxruntime", True, "always works")
        except MissingPackageError as error:
            yield Candidate("onnxruntime, CPU", "onnxruntime", False, error.message)


def _tensorrt_candidate(bundle: Bundle[Any], options: RuntimeOptions, needs: Needs, flavour: str) -> Candidate:
    try:
        engines = engines_for(bundle, options, needs, flavour)
        missing, certificate = engines.missing(), engines.certificate()
    except TokenFlowError as error:
        return Candidate(flavour, flavour, False, error.message)
    if missing:
        names = ", ".join(job.key.graph for job in missing)
        return Candidate(
            flavour, flavour, False, f"no engine built yet for {names}: run `{engines.build_config.command(bundle.path)}`"
        )
    if certificate is not None and not certificate.passed:
        return Candidate(flavour, flavour, False, f"its engines were refused: {'; '.join(certificate.failures)}")
    reason = "engines are built, to be compared at first use" if certificate is None else f"certified: {certificate.summary}"
    return Candidate(flavour, flavour, True, reason, engines=engines)


def _cuda_candidate(bundle: Bundle[Any], options: SessionOptions) -> Candidate:
    title, backend = "onnxruntime, CUDA", "onnxruntime"
    try:
        problem = (
            driver_problem()
            if CUDA in import_onnxruntime().get_available_providers()
            else "this onnxruntime was built without it"
        )
        if problem is None:
            # onnxruntime also lists providers whose libraries are missing.
            cuda = options if options.device.startswith("cuda") else replace(options, device="cuda")
            _open_smallest(bundle, open_onnxruntime, cuda)
    except TokenFlowError as error:
        problem = error.message
    return Candidate(title, backend, problem is None, problem or "starts here")


def _openvino_candidate(bundle: Bundle[Any], options: SessionOptions) -> Candidate:
    candidate = Candidate("openvino", OPENVINO, False, "", automatic=False)
    try:
        require_by_picture(bundle)
    except BackendError as error:
        return replace(candidate, reason=error.message)
    if importlib.util.find_spec(OPENVINO) is None:  # importing it takes a third of a second, at each start
        return replace(candidate, reason="OpenVINO is not installed")
    choice = MeasuredChoice.find(bundle, options.threads)
    if choice is None:
        reason = f"`auto` takes it where `tokenflow bench {bundle.path} --choose` measures it to be faster"
        return replace(candidate, usable=True, reason=reason)
    reason = f"measured here: {choice.summary}"
    return replace(candidate, usable=True, reason=reason, automatic=bool(choice.faster), graphs=choice.faster)


def require_by_picture(bundle: Bundle[Any]) -> None:
    """Raise BackendError unless OpenVINO runs the bundle: its graphs have no open dimension but the batch."""
    if not all(map(runs_by_picture, bundle.graphs.values())):
        raise BackendError(
            "OpenVINO runs tokenizers only: it is slower than onnxruntime with the open dimensions of a language model.",
            "Leave backend= or build_config= out; the model's tokenizer may run on OpenVINO.",
        )


def _open_smallest(bundle: Bundle[Any], open_session: OpenSession, options: SessionOptions) -> None:
    """Open the bundle's smallest graph, and close it. Raises as `open_session`."""
    entry = min(bundle.graphs.values(), key=lambda graph: sum(file.size for file in graph.files))
    open_session(bundle.path / entry.files[0].name, entry, options).close()


def choose(bundle: Bundle[Any], options: RuntimeOptions, needs: Needs = Needs()) -> tuple[OpenSession, SessionOptions]:
    """Choose a backend for a bundle by the options, and prepare its engines if that is TensorRT.

    Returns:
        A function that opens the bundle's graphs, and the options to call it with.

    Raises:
        MissingPackageError, BackendError: the backend in the options does not work on this machine, or not with this bundle.
        EngineBuildError, EngineRefusedError: see `Engines.prepare`; Intel's GPU or NPU does not reproduce the reference.
        ArgumentError: the options contradict each other, or the build config cannot be read.
    """
    session = options.session
    wanted = options.wanted()
    if wanted == ONNXRUNTIME:
        # With backend="auto" it is a build config for CPUs that asks for onnxruntime: run on the CPU unless told otherwise.
        cpu = options.backend == "auto" and options.device == "auto" and options.providers is None
        return _onnxruntime(bundle, replace(session, device="cpu") if cpu else session)
    if wanted == OPENVINO:
        return _openvino(bundle, options)
    if wanted in FLAVOURS:
        engines = engines_for(bundle, options, needs)
        with progress_bar() as progress:
            engines.prepare(options.build, progress)
        return engines.open, session
    if options.providers is not None:
        return _onnxruntime(bundle, session)
    best, passed_over = None, list[Candidate]()
    for candidate in survey(bundle, options, needs):
        _log.debug("%s on %s: %s", "runs" if candidate.usable else "not", candidate.title, candidate.reason)
        if candidate.chosen:
            best = candidate
            break
        passed_over.append(candidate)
    if best is None:
        # Opening a session raises an error that says what is missing.
        return _onnxruntime(bundle, session)
    if best.engines is not None:
        best.engines.prepare(build=False)
        return best.engines.open, session
    if options.build_config is not None:
        why = "; ".join(f"{each.title}: {each.reason.rstrip('.')}" for each in passed_over if each.backend in FLAVOURS)
        _log.warning("The build config is not used, because no TensorRT engines run here (%s). %s runs.", why, best.title)
    if best.graphs:
        return _openvino_for(bundle, best.graphs), replace(session, device="cpu")
    return open_onnxruntime, session


def _openvino(bundle: Bundle[Any], options: RuntimeOptions) -> tuple[OpenSession, SessionOptions]:
    """OpenVINO, tried on the smallest graph; on a GPU or NPU all are compared with the reference each time.

    In fewer bits all are compared at the first use.
    """
    require_by_picture(bundle)
    config, session = options.loaded_build_config(), options.session
    session = replace(session, device="cpu") if session.device == "auto" else session
    if config is not None:
        fewer = FewerBits(bundle, config, session)
        fewer.prepare(options.build)
        return fewer.open, session
    if session.device == "cpu":
        _open_smallest(bundle, open_openvino, session)
    else:
        certificate = certify(
            bundle, lambda path, entry, _: open_openvino(path, entry, session), "fp16" if session.device == "npu" else "fp32"
        )
        certificate.require(f"{bundle.path.name} on {session.device} with OpenVINO")
    return open_openvino, session


def _openvino_for(bundle: Bundle[Any], graphs: Collection[str]) -> OpenSession:
    """Opens some graphs of a bundle in OpenVINO, and the others in onnxruntime: all of them where a process is forked."""
    entries = [bundle.graph(name) for name in graphs]

    def open_session(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        in_onnxruntime = partial(open_onnxruntime, path, entry, options)
        if entry in entries and survived_fork():
            return open_openvino(path, entry, options, in_onnxruntime)
        return in_onnxruntime()

    return open_session


def _onnxruntime(bundle: Bundle[Any], options: SessionOptions) -> tuple[OpenSession, SessionOptions]:
    """onnxruntime, tried on the smallest graph where it was asked for more than the CPU.

    Graphs may be loaded at their first use only, and a service should not start where that will fail.
    """
    import_onnxruntime()
    if options.providers is not None or options.device.startswith("cuda"):
        _open_smallest(bundle, open_onnxruntime, options)
    return open_onnxruntime, options


def suitable_batch_limit(open_session: OpenSession, options: SessionOptions) -> int:
    """The most images in one call that suit a backend: as many as engines were built for, 8 on other GPUs, 1 on a CPU.

    Args:
        open_session, options: what `choose` returned.
    """
    engines = getattr(open_session, "__self__", None)
    if isinstance(engines, Engines):
        return engines.build_config.batch[2]
    if options.providers is not None:
        on_gpu = bool({CUDA, TENSORRT} & set(options.providers))
    elif options.device == "auto":
        try:
            available = import_onnxruntime().get_available_providers()
        except MissingPackageError:  # which opening a session reports
            return 1
        on_gpu = any(name == CUDA for name, _ in select_providers(available, options))
    else:
        on_gpu = options.device.startswith("cuda")
    return _GPU_BATCH if on_gpu else 1
