"""What an engine must show before it is used: the bundle's stored reference, run and compared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, load_codebook
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, TokenizerConfig
from tokenflow_sdk.errors import EngineRefusedError
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.generator import check_generator
from tokenflow_sdk.parity.language_model import LanguageModelReport
from tokenflow_sdk.parity.tokenizer import EIGHT_BIT_PSNR, EXACT, ROUNDED, check_tokenizer
from tokenflow_sdk.parity.understander import check_understander
from tokenflow_sdk.passes.quantize import EightBit

__all__ = ["Certificate", "certify"]


@dataclass(frozen=True)
class Certificate:
    """Result of a comparison.

    `failures` says in words which tolerances were missed, `summary` in one line how well it went; `figures` is the whole
    report, as JSON.
    """

    failures: tuple[str, ...]
    summary: str
    figures: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether no tolerance was missed."""
        return not self.failures

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Certificate | None:
        """A stored certificate, or None where there is none that can be read."""
        kinds = {"failures": list, "summary": str, "figures": dict}
        if not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
            return None
        return cls(tuple(map(str, data["failures"])), data["summary"], data["figures"])

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"failures": list(self.failures), "summary": self.summary, "figures": dict(self.figures)}

    def require(self, what: str) -> None:
        """Raises:
        EngineRefusedError: a bar was missed.
        """
        if self.failures:
            raise EngineRefusedError(
                f"{what} is refused: {'; '.join(self.failures)}.",
                "Build with --precision fp32 and without --decoder, let `tokenflow export precision-search` find "
                "what to keep in float32, or use backend='onnxruntime'.",
            )


def certify(
    bundle: Bundle[Any],
    open_session: OpenSession,
    precision: str,
    pages: int = 0,
    page_size: int = PAGE_SIZE,
    decoder: EightBit | None = None,
) -> Certificate:
    """Run a bundle's reference on sessions opened by `open_session`, and close them.

    Args:
        bundle: a tokenizer's or a language model's.
        open_session: gives the engines to judge.
        precision: of the engines; the tolerances of half precision allow for rounding.
        pages, page_size: of a language model's pool; 0 pages: as many as its config says.
        decoder: 8 bits of a tokenizer's decoder, which is then judged by a bar of its own.

    Raises:
        CorruptBundleError, BackendError: the reference or an engine cannot be loaded or run.
    """
    if isinstance(bundle.config, TokenizerConfig):
        graphs = TokenizerGraphs(bundle, open_session, SessionOptions())
        try:
            report = check_tokenizer(graphs)
        finally:
            graphs.close()
        tolerances = EXACT if precision == "fp32" else ROUNDED
        if decoder is not None:
            tolerances = replace(tolerances, decode_psnr=EIGHT_BIT_PSNR)
        return Certificate(tuple(report.failures(tolerances)), report.summary, report.to_json())
    return _certify_language_model(bundle, open_session, pages, page_size)


def _certify_language_model(bundle: Bundle[Any], open_session: OpenSession, pages: int, page_size: int) -> Certificate:
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, entry in bundle.graphs.items():
            sessions[name] = stack.enter_context(open_session(bundle.graph_path(name), entry, SessionOptions()))
        transformer = PagedTransformer.of(
            bundle.config, sessions["transformer"], pages or bundle.config.default_pages(page_size), page_size
        )
        stack.callback(transformer.close)
        report: LanguageModelReport
        if isinstance(bundle.config, GeneratorConfig):
            report = check_generator(bundle, sessions, transformer, load_codebook(bundle))
        else:
            report = check_understander(bundle, sessions, transformer)
    return Certificate(tuple(report.failures()), report.summary, report.to_json())
