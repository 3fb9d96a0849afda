"""What an engine must show before it is used: the bundle's stored reference, run and compared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from tokenflow_sdk.backends.base import OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle import Bundle, load_codebook
from tokenflow_sdk.config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.errors import EngineRefusedError
from tokenflow_sdk.generator_parity import GeneratorReport, check_generator
from tokenflow_sdk.parity import EIGHT_BIT_PSNR, EXACT, ROUNDED, check_parity
from tokenflow_sdk.quantize import EightBit
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.transformer import PagedTransformer
from tokenflow_sdk.understander_parity import UnderstanderReport, check_understander

__all__ = ["Certificate", "certify"]


@dataclass(frozen=True)
class Certificate:
    """Result of a comparison. `failures` says in words which bars were missed; `figures` is the whole report, as JSON."""

    failures: tuple[str, ...]
    figures: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return not self.failures

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Certificate | None:
        """A stored certificate, or None where there is none yet."""
        if not isinstance(data.get("failures"), list) or not isinstance(data.get("figures"), dict):
            return None
        return cls(tuple(map(str, data["failures"])), data["figures"])

    def to_json(self) -> dict[str, Any]:
        return {"failures": list(self.failures), "figures": dict(self.figures)}

    @property
    def summary(self) -> str:
        """One line for people."""
        f = self.figures
        if "agreement" in f:
            cells = [side * side for side in f["patch_nums"]]
            share = sum(a * n for a, n in zip(f["agreement"], cells, strict=True)) / sum(cells)
            decoded = "identical" if f["decode_psnr"] is None else f"{f['decode_psnr']:.1f} dB, SSIM {f['decode_ssim']:.4f}"
            return (
                f"codes agree {share:.2%} teacher-forced ({len(f['flips'])} flips, worst scale {min(f['agreement']):.2%}), "
                f"decode {decoded}, semantic cosine {f['semantic_cosine']:.5f}"
            )
        choice = "code" if "same_code" in f else "token"
        return f"hidden states cosine {f['hidden_cosine']:.5f}, likeliest {choice} the same at {f[f'same_{choice}']:.1%}"

    def require(self, what: str) -> None:
        """Raises:
        EngineRefusedError: a bar was missed.
        """
        if self.failures:
            raise EngineRefusedError(
                f"{what} is refused: {'; '.join(self.failures)}.",
                "Build with --precision fp32 and without --decoder, let `python -m export precision-search` find "
                "what to keep in float32, or use backend='onnxruntime'.",
            )


def certify(
    bundle: Bundle[Any],
    open_session: OpenSession,
    precision: str,
    pages: int,
    page_size: int,
    decoder: EightBit | None = None,
) -> Certificate:
    """Run a bundle's reference on sessions opened by `open_session`, and close them.

    Args:
        bundle: a tokenizer's or a language model's.
        open_session: gives the engines to judge.
        precision: of the engines; the bars of half precision allow for rounding.
        pages, page_size: of a language model's pool.
        decoder: 8 bits of a tokenizer's decoder, which is then judged by a bar of its own.

    Raises:
        CorruptBundleError, BackendError: the reference or an engine cannot be loaded or run.
    """
    if isinstance(bundle.config, TokenizerConfig):
        with Tokenizer(bundle, open_session=open_session) as tokenizer:
            report = check_parity(tokenizer)
        bars = EXACT if precision == "fp32" else ROUNDED
        if decoder is not None:
            bars = replace(bars, decode_psnr=EIGHT_BIT_PSNR)
        return Certificate(tuple(report.failures(bars)), report.to_json())
    return _certify_language_model(bundle, open_session, pages, page_size)


def _certify_language_model(bundle: Bundle[Any], open_session: OpenSession, pages: int, page_size: int) -> Certificate:
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, entry in bundle.graphs.items():
            path = bundle.path / entry.files[0].name
            sessions[name] = stack.enter_context(open_session(path, entry, SessionOptions()))
        transformer = PagedTransformer.of(bundle.config, sessions["transformer"], pages, page_size)
        stack.callback(transformer.close)
        report: GeneratorReport | UnderstanderReport
        if isinstance(bundle.config, GeneratorConfig):
            report = check_generator(bundle, sessions, transformer, load_codebook(bundle))
        else:
            report = check_understander(bundle, sessions, transformer)
    return Certificate(tuple(report.failures()), asdict(report))
