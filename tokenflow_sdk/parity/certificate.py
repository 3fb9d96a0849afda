"""Certifies engines before use: runs a bundle's reference inputs on them and checks the results against tolerances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, TokenizerConfig
from tokenflow_sdk.errors import EngineRefusedError
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.generator import check_generator
from tokenflow_sdk.parity.language_model import LanguageModelReport
from tokenflow_sdk.parity.tokenizer import check_tokenizer
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR, EXACT, ROUNDED
from tokenflow_sdk.parity.understander import check_understander
from tokenflow_sdk.passes.quantize import DecoderType

__all__ = ["Certificate", "certify"]

_HINT = (
    "Build with --precision fp32 and without --decoder, let `tokenflow export precision-search` find what to keep in float32, "
    "or use backend='onnxruntime'. Where float16 overflows (nan), --precision bf16 does not; engines that are wrong in batches "
    "only may do with --batch-limit 1."
)


@dataclass(frozen=True)
class Certificate:
    """Result of comparing a bundle's sessions with its reference.

    Attributes:
        failures: the tolerances that were missed, in words; empty if none.
        summary: the main figures in one line.
        figures: the whole report, as JSON (`TokenizerReport` or `LanguageModelReport`).
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
        """The inverse of `to_json`; None if `data` is empty or is no certificate."""
        kinds = {"failures": list, "summary": str, "figures": dict}
        if not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
            return None
        return cls(tuple(map(str, data["failures"])), data["summary"], data["figures"])

    @classmethod
    def of_all(cls, records: Iterable[Mapping[str, Any]]) -> Certificate | None:
        """One certificate of several engines, each with what `to_json` gave: one that was refused, if any was.

        None if one of them has none, or there are no engines.
        """
        found = [cls.from_json(record) for record in records]
        certificates = [certificate for certificate in found if certificate is not None]
        if not found or len(certificates) < len(found):
            return None
        return next((certificate for certificate in certificates if not certificate.passed), certificates[0])

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON, for an engine's record in the cache."""
        return {"failures": list(self.failures), "summary": self.summary, "figures": dict(self.figures)}

    def require(self, what: str, hint: str = _HINT) -> None:
        """Raise unless the certificate has passed.

        Args:
            what: what was compared, for the message.
            hint: what may help; the default is for TensorRT engines.

        Raises:
            EngineRefusedError: a tolerance was missed.
        """
        if self.failures:
            raise EngineRefusedError(f"{what} is refused: {'; '.join(self.failures)}.", hint)


def certify(
    bundle: Bundle[Any],
    open_session: OpenSession,
    precision: str,
    pages: int = 0,
    page_size: int = PAGE_SIZE,
    decoder: DecoderType | None = None,
) -> Certificate:
    """Open sessions for a bundle's graphs, compare them with the bundle's reference, and close them.

    Args:
        bundle: of any kind.
        open_session: opens the sessions to check.
        precision: of the engines; `fp16` and `bf16` have wider tolerances for a tokenizer than `fp32`.
        pages: size of a language model's key/value pool; 0: the model's default.
        page_size: tokens in a page.
        decoder: type of a tokenizer's decoder if it has one of its own, by which its images are judged; None: `precision`.

    Returns:
        The certificate, whether it has passed or not.

    Raises:
        CorruptBundleError, BackendError: the reference or a session cannot be loaded or run.
        PagesExhausted: the pool is too small for a language model's reference.
    """
    if isinstance(bundle.config, TokenizerConfig):
        graphs = TokenizerGraphs(bundle, open_session, SessionOptions())
        try:
            report = check_tokenizer(graphs)
        finally:
            graphs.close()
        tolerances = EXACT if precision == "fp32" else ROUNDED
        if decoder is not None:
            tolerances = replace(tolerances, decode_psnr=ROUNDED.decode_psnr if decoder == "bf16" else EIGHT_BIT_PSNR)
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
