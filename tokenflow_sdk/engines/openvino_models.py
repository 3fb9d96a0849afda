"""Opens graphs in OpenVINO, and keeps what was compiled in the engine cache: compiling takes seconds, loading fewer.

In fewer bits, where a build config asks for that, a bundle is compared with its reference before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow_sdk.backends.cores import available_cores, instruction_sets, processor
from tokenflow_sdk.backends.openvino import (
    OPENVINO,
    Compiled,
    OpenVinoSession,
    compile_graph,
    has_bfloat16,
    import_openvino,
    load_compiled,
    properties,
)
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.annotations import Annotations
from tokenflow_sdk.engines.build import REVISION as ENGINE_REVISION
from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, EngineKey, graph_digest
from tokenflow_sdk.errors import BackendError, OutputError
from tokenflow_sdk.parity.certificate import Certificate, certify
from tokenflow_sdk.passes.quantize import ActivationRanges
from tokenflow_sdk.steps import StepLog

__all__ = ["REVISION", "FewerBits", "open_openvino"]

REVISION = "2"
"""Changes with what `compile_graph` makes of a graph."""
_EXACT = Annotations("fp32", {}, None)
_EXACT_CODES = "; if it is codes that differ, the build config `cpu-bf16-decoder` computes them in float32"
_INT8_PRODUCTS = {"AVX-VNNI", "AVX-512 VNNI", "AMX int8"}
_CPU = "cpu"
"""The key of a certificate in the record of what was compiled: its processor is part of the record's own key."""


def open_openvino(
    path: Path,
    entry: GraphEntry,
    options: SessionOptions,
    open_in_child: Callable[[], Session] | None = None,
    annotations: Annotations = _EXACT,
) -> Session:
    """Open a graph in OpenVINO, from the engine cache where it was compiled before. An `OpenSession`.

    `open_in_child` is that of `OpenVinoSession`, `annotations` say what is computed in fewer bits. Where the cache cannot be
    written, a warning says so, and the graph is compiled each time.

    Raises:
        BackendError, CorruptBundleError, MissingPackageError, ArgumentError: see `compile_graph`.
        OutputError: the graph of an 8-bit decoder cannot be prepared.
    """
    key, cache = _key(path, entry, options, annotations), EngineCache()
    bfloat16 = _in_bfloat16(path.stem, options, annotations)
    compiled = _load(cache, key, options, bfloat16)
    if compiled is None:
        compiled = _compiled(path, entry, options, bfloat16, annotations.ranges)
        try:
            cache.make_directory()
            cache.put(key, _exported(compiled), {"backend": OPENVINO})
            # Weights that are mapped from a file take half of the memory.
            compiled = _load(cache, key, options, bfloat16) or compiled
        except OutputError as error:
            logging.getLogger("tokenflow_sdk").warning("%s is compiled again at the next start: %s", path.name, error)
    return OpenVinoSession(compiled, entry, options.device, open_in_child)


def _compiled(
    path: Path, entry: GraphEntry, options: SessionOptions, bfloat16: bool, ranges: ActivationRanges | None
) -> Compiled:
    if ranges is None or path.stem != "decode":
        return compile_graph(path, entry, options, bfloat16)
    try:
        with tempfile.TemporaryDirectory(prefix="tokenflow-") as work:
            return compile_graph(engine_graph(path, None, Path(work), (), ranges), entry, options, bfloat16)
    except OSError as error:
        raise OutputError(
            f"The graph of {path.name} in 8 bits cannot be prepared: {error.strerror or error}.",
            "Free some space, or name another directory for temporary files in $TMPDIR.",
        ) from error


@dataclass(frozen=True)
class FewerBits:
    """A tokenizer on OpenVINO on the CPU, in fewer bits than float32.

    OpenVINO chooses kernels by rules and not by timing them, so what it compiles again is what was compared before.

    Args:
        bundle: a tokenizer's.
        build_config: its precision, and the type of its decoder.
        options: how sessions run; the device is `cpu`.

    Raises:
        BackendError: the processor has no fast products of these types.
        MissingPackageError, ArgumentError: see `has_bfloat16`.
    """

    bundle: Bundle[Any]
    build_config: BuildConfig
    options: SessionOptions

    def __post_init__(self) -> None:
        _require_products(self.build_config)

    def prepare(self, build: bool = True) -> Certificate:
        """Compile the graphs, and compare them with the bundle's reference unless that was done before.

        Args:
            build: False raises an error instead of compiling and comparing.

        Returns:
            The certificate, which has passed.

        Raises:
            BackendError: a graph cannot be compiled or run, or that would have to be done and `build` is False.
            EngineBuildError: the bundle has no ranges for an 8-bit decoder.
            EngineRefusedError: the results are not near enough to the reference.
            CorruptBundleError, MissingPackageError, ArgumentError, OutputError: see `open_openvino`.
        """
        certificate = self._stored()
        if certificate is None and not build:
            threads = self.options.threads or available_cores()
            command = f"{self.build_config.command(self.bundle.path)} --threads {threads}"
            raise BackendError(
                f"{self.bundle.path.name} was not compared in {self._precision} on OpenVINO yet, not with {threads} threads on "
                "this processor.",
                f"Run `{command}`, or leave build=False out.",
            )
        certificate = certificate or self.certify()
        self.require(certificate)
        return certificate

    def require(self, certificate: Certificate) -> None:
        """Raise EngineRefusedError unless a certificate of `certify` has passed."""
        what = f"{self.bundle.path.name} in {self._precision} on OpenVINO"
        hint = f"Leave the build config out{_EXACT_CODES if self.build_config.precision == 'bf16' else ''}."
        if self.build_config.decoder == "int8":
            hint = "Calibrate the bundle again (`tokenflow export calibrate`), or leave the build config out."
        certificate.require(what, hint)

    def certify(self) -> Certificate:
        """Compare the graphs with the bundle's reference now, and store the certificate with each.

        Returns:
            The certificate, whether it has passed or not. Raises as `prepare`, but not for that.
        """
        config = self.build_config
        with StepLog("tokenflow_sdk") as log:
            log.start(f"comparing {self.bundle.path.name} on OpenVINO with its reference")
            certificate = certify(
                self.bundle,
                lambda path, entry, _: self.open(path, entry, self.options),
                config.precision,
                decoder=config.decoder,
            )
        try:
            for engine in self._records():
                if engine is not None:
                    EngineCache().certify(engine.key, _CPU, certificate.to_json())
        except OutputError as error:
            logging.getLogger("tokenflow_sdk").warning("The comparison is repeated at the next start: %s", error)
        return certificate

    def open(self, path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        """Open a graph. An `OpenSession`; call `prepare` first. Raises as `open_openvino`."""
        return open_openvino(path, entry, options, annotations=self._annotations)

    @property
    def _precision(self) -> str:
        return self._annotations.key("decode")

    @cached_property
    def _annotations(self) -> Annotations:
        return Annotations.of(self.bundle, self.build_config)

    def _records(self) -> list[CachedEngine | None]:
        cache, annotations = EngineCache(), self._annotations
        graphs = self.bundle.graphs.items()
        return [cache.find(_key(self.bundle.graph_path(name), entry, self.options, annotations)) for name, entry in graphs]

    def _stored(self) -> Certificate | None:
        """The certificate of all graphs, where each is in the cache and has one; one that was refused before others.

        Bundles may share a graph, and so its record.
        """
        try:
            found = self._records()
        except OutputError:  # there is no directory for a cache
            return None
        return Certificate.of_all({} if engine is None else engine.certificates.get(_CPU, {}) for engine in found)


def _require_products(config: BuildConfig) -> None:
    """Raise BackendError where the processor computes the types of a build config no faster than float32."""
    found = instruction_sets()
    name = f"This processor ({processor()}{': ' if found else ''}{', '.join(found)})"
    if "bf16" in (config.precision, config.decoder) and not has_bfloat16():
        raise BackendError(
            f"{name} has no products in bfloat16 (AVX-512 BF16 or AMX), and would gain nothing by them.",
            "Leave the build config out, or give one without bf16.",
        )
    if config.decoder == "int8" and not _INT8_PRODUCTS & set(found):
        raise BackendError(
            f"{name} is not known to have products in int8 (VNNI or AMX); without them 8 bits are slower, or overflow.",
            "Leave the 8-bit decoder out.",
        )


def _in_bfloat16(graph: str, options: SessionOptions, annotations: Annotations) -> bool:
    """Whether what a graph does not do in 8 bits is in bfloat16: on request, and beside 8 bits where the processor has it."""
    eight = annotations.ranges is not None and graph == "decode"
    return annotations.precision_of(graph) == "bf16" or (eight and options.device in ("auto", "cpu") and has_bfloat16())


def _key(path: Path, entry: GraphEntry, options: SessionOptions, annotations: Annotations) -> EngineKey:
    """The key of a compiled model in the engine cache."""
    bfloat16 = _in_bfloat16(path.stem, options, annotations)
    return EngineKey(
        graph=path.stem,
        graph_sha256=graph_digest(entry),
        revision=REVISION if annotations.ranges is None else f"{REVISION}, {ENGINE_REVISION}",
        flavour=OPENVINO,
        version=import_openvino().__version__,
        target="cpu" if options.device == "auto" else options.device,
        precision="fp16" if options.device == "npu" else annotations.key(path.stem),
        profile=hashlib.sha256(json.dumps(properties(options, bfloat16), sort_keys=True).encode()).hexdigest()[:16],
        gpu=processor(),
    )


def _load(cache: EngineCache, key: EngineKey, options: SessionOptions, bfloat16: bool) -> Compiled | None:
    """The compiled model of a key; None if it is not in the cache, or damaged."""
    try:
        found = cache.find(key)
        if found is None:
            return None
        data = np.memmap(found.path, np.uint8, mode="c")
    except (OSError, ValueError):  # there is no directory for a cache; the file is gone meanwhile, or empty
        return None
    return load_compiled(data, options, bfloat16) if hashlib.sha256(data.data).hexdigest() == found.sha256 else None


def _exported(compiled: Compiled) -> bytes:
    data = compiled.model.export_model()
    return data if isinstance(data, bytes) else bytes(data.getvalue())
