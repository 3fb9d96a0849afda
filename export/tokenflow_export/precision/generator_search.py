"""Searches for the nodes of a generator that must stay in float32 so that its engines in half precision are accepted."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tokenflow_export.precision.emulate_half import emulated_sessions
from tokenflow_export.precision.search import Score, search, store_pinned
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, pages_for
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.certificate import Certificate, certify
from tokenflow_sdk.parity.generator import GeneratorReference, run_generator
from tokenflow_sdk.parity.language_model import LanguageModelReport
from tokenflow_sdk.passes.dequantize import dequantize
from tokenflow_sdk.passes.graph import load_graph
from tokenflow_sdk.passes.half_precision import HalfType, compute_nodes

__all__ = ["GeneratorFinding", "open_exact", "search_generator"]


@dataclass(frozen=True)
class GeneratorFinding:
    """The result of a search.

    Args:
        positions: how many positions of the bundle's reference were computed.
        plain: half precision with nothing pinned against float32 with the same weights.
        report: half precision with `pinned` against the same.
        pinned: nodes of the transformer that must stay in float32.
        nodes: how many nodes could be pinned.
        certificate: what engines with `pinned` would get.
    """

    positions: int
    plain: LanguageModelReport
    report: LanguageModelReport
    pinned: tuple[str, ...]
    nodes: int
    certificate: Certificate

    def lines(self) -> list[str]:
        """The result in words, for the terminal."""
        found = [
            f"  against float32: {self.report.summary}",
            f"  transformer: {len(self.pinned)} of {self.nodes} products pinned to float32",
        ]
        if self.pinned:
            found.append(f"  with nothing pinned: {self.plain.summary}")
        return [*found, f"  certificate: {self.certificate.summary}"]


def search_generator(bundle: Bundle[GeneratorConfig], precision: HalfType, steps: ProgressSteps) -> GeneratorFinding:
    """Search for the nodes of the transformer to pin, and store them in the bundle, where `tokenflow build` finds them.

    Args:
        bundle: of a generator; not one that was exported in float16.
        precision: of the engines.
        steps: shows progress.

    Raises:
        ArgumentError: the bundle was exported in float16.
        ParityError: the tolerances are missed even with all nodes pinned.
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
        reports.append(exact.compare(found.hidden[0], found.likeliest[0], "code"))
        return Score(
            1 - reports[-1].hidden_cosine, tuple(stored.compare(found.hidden[0], found.likeliest[0], "code").failures())
        )

    model = load_graph(bundle.graph_path("transformer"))
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


def _run(bundle: Bundle[GeneratorConfig], opening: OpenSession, stored: GeneratorReference) -> GeneratorReference:
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, entry in bundle.graphs.items():
            sessions[name] = stack.enter_context(opening(bundle.graph_path(name), entry, SessionOptions(device="cpu")))
        transformer = PagedTransformer.of(bundle.config, sessions["transformer"], _pages(stored), PAGE_SIZE)
        return run_generator(sessions, transformer, load_codebook(bundle), stored)


def _pages(stored: GeneratorReference) -> int:
    return pages_for(stored.hidden.shape[1])


def open_exact(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
    """Open a graph as float32 engines compute it: with float32 products instead of integer ones."""
    with tempfile.TemporaryDirectory() as work:
        return open_onnxruntime(engine_graph(path, None, Path(work)), entry, options)
