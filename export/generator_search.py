"""What half precision costs a generator, and what must stay in float32 so that its engines are accepted."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from export.emulate import emulated_sessions
from export.precision_search import Score, search, store_pinned
from export.progress import Steps
from tokenflow_sdk.backends.base import OpenSession, Session, SessionOptions, open_onnxruntime
from tokenflow_sdk.bundle import Bundle, load_codebook
from tokenflow_sdk.certificate import Certificate, certify
from tokenflow_sdk.config import GeneratorConfig, GraphEntry
from tokenflow_sdk.dequantize import dequantize
from tokenflow_sdk.engine_build import engine_graph
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.generator_parity import (
    GeneratorReference,
    GeneratorReport,
    compare_generators,
    run_generator,
)
from tokenflow_sdk.half import HalfType, compute_nodes
from tokenflow_sdk.onnx_graph import load_graph
from tokenflow_sdk.scheduler import PAGE_SIZE
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["GeneratorFinding", "open_exact", "search_generator"]


@dataclass(frozen=True)
class GeneratorFinding:
    """What a search found over `positions` of the bundle's stored steps. `plain` and `report` compare with float32 engines
    (the same weights, nothing rounded), with nothing pinned and with what is: `pinned` nodes of the transformer, of `nodes`
    that could be. `certificate`: what engines would get."""

    positions: int
    plain: GeneratorReport
    report: GeneratorReport
    pinned: tuple[str, ...]
    nodes: int
    certificate: Certificate

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"  against float32: {_describe(self.report)}",
            f"  transformer: {len(self.pinned)} of {self.nodes} products pinned to float32",
        ]
        if self.pinned:
            found.append(f"  with nothing pinned: {_describe(self.plain)}")
        return [*found, f"  certificate: {self.certificate.summary}"]


def search_generator(bundle: Bundle[GeneratorConfig], precision: HalfType, steps: Steps) -> GeneratorFinding:
    """Search the transformer, and store what was found in the bundle, where `tokenflow build` looks.

    Args:
        bundle: a generator's, in float32 or with weights in fewer bits.
        precision: of the engines.
        steps: shows progress.

    Raises:
        ArgumentError: the bundle was exported in float16.
        ParityError: no choice of nodes is good enough.
    """
    if bundle.in_half:
        raise ArgumentError(
            f"{bundle.path} was exported in float16, so there is no float32 to compare with.",
            "Export it with --dtype fp32, and with --weights int8 if it is large.",
        )
    stored = GeneratorReference.load(bundle)
    steps.start("float32")
    exact = _run(bundle, open_exact, stored)
    reports = []

    def measure(pinned: Collection[str]) -> Score:
        steps.start(f"transformer in {precision}, {len(pinned)} pinned")
        with tempfile.TemporaryDirectory() as work:
            found = _run(bundle, emulated_sessions(bundle, precision, Path(work), {"transformer": pinned}), stored)
        reports.append(compare_generators(found, exact))
        return Score(1 - reports[-1].hidden_cosine, tuple(compare_generators(found, stored).failures()))

    model = load_graph(bundle.path / bundle.graph("transformer").files[0].name)
    dequantize(model)
    nodes = compute_nodes(model)
    pinned = search(nodes, measure, f"The transformer graph in {precision}")
    steps.start("the certificate")
    with tempfile.TemporaryDirectory() as work:
        opening = emulated_sessions(bundle, precision, Path(work), {"transformer": pinned})
        certificate = certify(bundle, opening, precision, _pages(stored), PAGE_SIZE)
    finding = GeneratorFinding(stored.hidden.shape[1], reports[0], reports[-1], pinned, len(nodes), certificate)
    store_pinned(bundle, precision, {"transformer": pinned}, {"positions": finding.positions} | finding.report.to_json())
    return finding


def _describe(report: GeneratorReport) -> str:
    return f"hidden states cosine {report.hidden_cosine:.5f}, likeliest code the same at {report.same_code:.1%}"


def _run(bundle: Bundle[GeneratorConfig], opening: OpenSession, stored: GeneratorReference) -> GeneratorReference:
    config = bundle.config
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, entry in bundle.graphs.items():
            path = bundle.path / entry.files[0].name
            sessions[name] = stack.enter_context(opening(path, entry, SessionOptions(device="cpu")))
        transformer = PagedTransformer(
            sessions["transformer"], config.layers, config.kv_heads, config.head_dim, _pages(stored), PAGE_SIZE
        )
        return run_generator(sessions, transformer, load_codebook(bundle), stored.steps)


def _pages(stored: GeneratorReference) -> int:
    return -(-stored.hidden.shape[1] // PAGE_SIZE)


def open_exact(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
    """A graph as float32 engines compute it: integer products only become plain ones."""
    with tempfile.TemporaryDirectory() as work:
        return open_onnxruntime(engine_graph(path, None, Path(work)), entry, options)
