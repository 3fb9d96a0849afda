"""`tokenflow build` and `tokenflow cache`: builds engines ahead of use, lists or removes them, writes Triton repositories."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

from rich.progress import Progress
from rich.table import Table

from tokenflow_sdk.arguments import integer
from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.backends.tensorrt_module import import_tensorrt
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle, open_bundle
from tokenflow_sdk.bundle.hub import HubOptions
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.cli.console import make_table, stderr, stdout
from tokenflow_sdk.cli.opening import bundle_name, bundle_paths
from tokenflow_sdk.cli.progress import make_bars
from tokenflow_sdk.cli.verify import verify_bundles
from tokenflow_sdk.engines.build_config import ONNXRUNTIME, BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.engines.jobs import EngineJob, engine_jobs
from tokenflow_sdk.engines.memory_plan import MemoryPlan, memory_plans, require_fit
from tokenflow_sdk.engines.openvino_models import FewerBits
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.engines.triton_repository import write_triton_repository
from tokenflow_sdk.errors import ArgumentError, BackendError, MissingPackageError
from tokenflow_sdk.parity.certificate import Certificate

__all__ = ["build", "cache"]


@dataclass(frozen=True)
class _Row:
    """An engine, and the seconds its build took; None if it was in the cache."""

    engine: CachedEngine
    seconds: float | None


def build(arguments: argparse.Namespace) -> int:
    """Build the engines of every bundle under a name that are not in the cache, and certify them if they are for this GPU."""
    build_config = _build_config(arguments)
    _require_fitting(arguments, build_config)
    if build_config.backend == ONNXRUNTIME:
        if arguments.triton is not None:
            _write_triton(arguments, _tokenizer_bundle(arguments), build_config)
            return 0
        if arguments.plan:
            raise ArgumentError("Nothing is built for onnxruntime, so there is no plan.", "Name another --backend or --config.")
        stdout.print("nothing is built for onnxruntime, which runs a bundle's graphs as they are; compared on the CPU here:")
        options = RuntimeOptions(device="cpu", backend=ONNXRUNTIME)
        verify_bundles(bundle_paths(arguments), options, sha256=arguments.sha256)
        return 0
    if build_config.backend == OPENVINO:
        _build_openvino(arguments, build_config)
        return 0
    trt = import_tensorrt(build_config.backend)
    store = EngineCache(arguments.cache)
    bundles: list[Bundle[Any]] = (
        [open_bundle(path, arguments.sha256) for path in bundle_paths(arguments)]
        if arguments.triton is None
        else [_tokenizer_bundle(arguments)]
    )
    for bundle in bundles:
        bundle.verify()
    jobs = [job for bundle in bundles for job in engine_jobs(bundle, build_config, trt)]
    _plan(jobs, build_config, store, arguments.plan)
    if arguments.plan:
        return 0
    rows = []
    with make_bars() as progress:
        whole = progress.add_task("building", total=len(jobs))
        for job in jobs:
            rows.append(_build_engine(job, trt, store, progress))
            progress.advance(whole)
    table = make_table("graph", "target", "precision", "size", "", title=f"{build_config.backend} {trt.__version__}")
    for row in rows:
        done = "in the cache already" if row.seconds is None else f"built in {row.seconds:.1f} s"
        key = row.engine.key
        table.add_row(key.graph, key.target, key.precision, f"{row.engine.size / 1e6:,.1f} MB", done)
    stdout.print(table)
    stdout.print(f"{len(rows)} engines in {store.directory}", soft_wrap=True)
    for bundle in bundles:
        _certify(bundle, build_config, store)
    if arguments.triton is not None:
        _write_triton(arguments, bundles[0], build_config, {row.engine.key.graph: row.engine.path for row in rows})
    return 0


def _build_openvino(arguments: argparse.Namespace, build_config: BuildConfig) -> None:
    """Compile a tokenizer's graphs for the processor of this machine, and compare them with the reference."""
    for name in ("plan", "cache", "batch_limit", "batch_usual", "pages", "workspace_gb", "memory_gb"):
        if getattr(arguments, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            hint = "$TOKENFLOW_CACHE moves what is compiled." if name == "cache" else "Leave it out."
            raise ArgumentError(f"{option} is for TensorRT engines.", hint)
    bundle = _tokenizer_bundle(arguments)
    bundle.verify()
    with stderr.step(f"compiling {bundle.path.name} and comparing it with PyTorch"):
        certificate = FewerBits(bundle, build_config, SessionOptions("cpu", threads=arguments.threads)).prepare()
    stdout.print(f"{bundle.path.name} certified: {certificate.summary}", soft_wrap=True)


def _require_fitting(arguments: argparse.Namespace, build_config: BuildConfig) -> None:
    """Raise ArgumentError if options contradict each other."""
    if arguments.force and arguments.triton is None:
        raise ArgumentError(
            "--force replaces what --triton names, and that is not given.", "Leave it out, or give --triton DIR."
        )
    if arguments.threads is not None and build_config.backend != OPENVINO:
        raise ArgumentError(f"--threads is for OpenVINO, not for {build_config.backend}.", "Leave it out.")
    if arguments.triton is not None and build_config.backend not in (ONNXRUNTIME, "tensorrt"):
        raise ArgumentError(
            f"Triton runs engines of full TensorRT, and {build_config.backend} is another library.",
            "Give --backend tensorrt; or no --backend and no --config, for graphs that its onnxruntime runs.",
        )


def _tokenizer_bundle(arguments: argparse.Namespace) -> Bundle[TokenizerConfig]:
    """The tokenizer under the name in the arguments: Triton cannot run language models' loops, nor OpenVINO their graphs."""
    path = find_bundle(bundle_name(arguments), TokenizerConfig.kind, HubOptions(arguments.revision))
    return Bundle.open(path, TokenizerConfig, arguments.sha256)


def _write_triton(
    arguments: argparse.Namespace,
    bundle: Bundle[TokenizerConfig],
    build_config: BuildConfig,
    engines: Mapping[str, Path] | None = None,
) -> None:
    with stderr.step(f"writing {arguments.triton}"):
        names = write_triton_repository(bundle, arguments.triton, build_config.batch[2], engines, arguments.force)
    stdout.print(f"{', '.join(names)} for Triton in {arguments.triton}", soft_wrap=True)


def _plan(jobs: Sequence[EngineJob], build_config: BuildConfig, store: EngineCache, show: bool) -> None:
    """Check that the engines fit the GPU, if its memory is known; with `show` print what they take before.

    Raises:
        EngineBuildError: they do not fit.
    """
    here = jobs[0].cuda
    memory = int(build_config.memory_gb * 1e9) or (0 if here is None else here.memory)
    if not (memory or show):
        return
    with stderr.step("planning memory"):
        plans = memory_plans(jobs, store)
    for plan in plans:
        if show:
            stdout.print(_plan_table(plan))
            stdout.print(f"{plan}, for {plan.target}", soft_wrap=True)
    for plan in plans:
        if memory:
            require_fit(plan, memory)


def _plan_table(plan: MemoryPlan) -> Table:
    table = make_table(
        "graph", "weights", "scratch", "inputs and outputs", "weights and scratch are", title=f"memory, {plan.target}"
    )
    for graph in plan.graphs:
        sizes = (f"{size / 1e6:,.1f} MB" for size in (graph.weights, graph.scratch, graph.buffers))
        table.add_row(graph.graph, *sizes, "TensorRT's figures" if graph.measured else "estimated")
    return table


def _certify(bundle: Bundle[Any], build_config: BuildConfig, store: EngineCache) -> None:
    """Certify a bundle's engines if they were built for this machine's GPU; else print that they are not certified yet.

    Raises:
        EngineRefusedError: the engines do not reproduce the reference.
    """
    try:
        engines = Engines(bundle, build_config, cache=store)
    except (MissingPackageError, BackendError) as error:
        stdout.print(f"not compared with PyTorch yet: {error.message} This is done at first use.", soft_wrap=True)
        return
    if engines.missing():
        stdout.print("not compared with PyTorch yet: none is for the GPU here", soft_wrap=True)
        return
    with stderr.step(f"comparing {bundle.path.name} with PyTorch"):
        certificate = engines.prepare(build=False)
    stdout.print(f"{bundle.path.name} certified: {certificate.summary}", soft_wrap=True)


def cache(arguments: argparse.Namespace) -> int:
    """List or remove the engines in the cache."""
    store = EngineCache(arguments.cache)
    if arguments.action == "clear":
        stdout.print(f"{store.clear() / 1e6:,.1f} MB freed in {store.directory}", soft_wrap=True)
        return 0
    entries = store.entries()
    table = make_table("graph", "target", "precision", "engine", "size", "comparison", "file")
    for entry in entries:
        key = entry.key
        names = (key.graph, key.target, key.precision, f"{key.flavour} {key.version}")
        verdict = ", ".join(_verdict(entry, architecture) for architecture in key.targets)
        table.add_row(*names, f"{entry.size / 1e6:,.1f} MB", verdict, entry.path.name)
    if entries:
        stdout.print(table)
    total = sum(entry.size for entry in entries)
    stdout.print(f"{len(entries)} engines, {total / 1e6:,.1f} MB, in {store.directory}", soft_wrap=True)
    return 0


def _verdict(engine: CachedEngine, architecture: str) -> str:
    """How the comparison on GPUs of one architecture ended, which is named if the engine is for several."""
    certificate = Certificate.from_json(engine.certificates.get(architecture, {}))
    if certificate is None and engine.key.flavour == OPENVINO:  # in float32, or on an NPU, where it is made each time
        return "not stored"
    verdict = "not yet" if certificate is None else "passed" if certificate.passed else "refused"
    return verdict if len(engine.key.targets) == 1 else f"{architecture} {verdict}"


def _build_engine(job: EngineJob, trt: ModuleType, store: EngineCache, progress: Progress) -> _Row:
    task = progress.add_task(job.key.title, total=1.0)
    began = perf_counter()
    engine, built = job.run(trt, store, lambda _, share: progress.update(task, completed=share))
    progress.remove_task(task)
    return _Row(engine, perf_counter() - began if built else None)


def _build_config(arguments: argparse.Namespace) -> BuildConfig:
    """The build config named by --config, or the default, overridden by the other options."""
    if arguments.config:
        base = BuildConfig.from_file(arguments.config)
    elif arguments.triton is not None and arguments.backend is None:
        base = BuildConfig(backend=ONNXRUNTIME, precision="fp32")
    else:
        base = BuildConfig()
    most, usual, problem = arguments.batch_limit, arguments.batch_usual, "is no number of images in a call."
    most = base.batch[2] if most is None else integer("batch_limit", most, 1, 2**31 - 1, problem, "Give at least 1.")
    hint = f"Give 1 to {most}, the most images in a call, or raise batch_limit=."
    usual = min(base.batch[1], most) if usual is None else integer("batch_usual", usual, 1, most, problem, hint)
    if arguments.pages is not None:
        integer("--pages", arguments.pages, 0, 2**31 - 1, "is no number of pages.", "Give 0 or more.")
    targets = None if arguments.architectures is None else tuple(arguments.architectures.split(","))
    return base.with_overrides(
        backend=arguments.backend,
        targets=targets,
        precision=arguments.precision,
        decoder=arguments.decoder,
        batch=(1, usual, most),
        pages=arguments.pages,
        workspace_gb=arguments.workspace_gb,
        memory_gb=arguments.memory_gb,
    )
