from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_graphs import GENERATOR, UNDERSTANDER, FakeGraph, transformer_graph
from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import BackendError, EngineRefusedError
from tokenflow_sdk.parity import certificate as module
from tokenflow_sdk.parity.certificate import Certificate, certify
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR, EXACT, ROUNDED, Tolerances

PASSED = Certificate((), "all codes agree", {"agreement": [1.0, 0.5], "decode_psnr": None})
FAILED = replace(PASSED, failures=("codes flipped", "pictures agree to 20.0 dB only"))


@pytest.mark.parametrize("certificate", [PASSED, FAILED])
def test_a_certificate_is_read_as_it_is_written(certificate: Certificate) -> None:
    written = json.loads(json.dumps(certificate.to_json()))
    assert Certificate.from_json(written) == certificate
    assert written.keys() == {"failures", "summary", "figures"}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"failures": [], "figures": {}},
        {"summary": "all codes agree", "figures": {}},
        {"failures": [], "summary": "all codes agree"},
        {"failures": None, "summary": "", "figures": {}},
        {"failures": "none", "summary": "", "figures": {}},
        {"failures": [], "summary": None, "figures": {}},
        {"failures": [], "summary": "", "figures": []},
    ],
)
def test_what_an_older_version_wrote_is_no_certificate(data: Mapping[str, Any]) -> None:
    """The engine is then compared again."""
    assert Certificate.from_json(data) is None


def test_what_a_newer_version_adds_is_passed_over() -> None:
    assert Certificate.from_json(PASSED.to_json() | {"surprise": 1}) == PASSED


def test_one_missed_tolerance_is_enough() -> None:
    assert (PASSED.passed, FAILED.passed) == (True, False)
    PASSED.require("an engine")
    with pytest.raises(EngineRefusedError) as caught:
        FAILED.require("The fp16 engines of clip on sm89")
    assert caught.value.message == (
        "The fp16 engines of clip on sm89 is refused: codes flipped; pictures agree to 20.0 dB only."
    )
    for way in ("--precision fp32", "--decoder", "tokenflow export precision-search", "backend='onnxruntime'"):
        assert way in caught.value.hint


@dataclass
class Report:
    """Remembers which tolerances it was judged by."""

    summary: str = "in short"
    judged_by: list[Tolerances] = field(default_factory=list)

    def failures(self, *tolerances: Tolerances) -> list[str]:
        self.judged_by += tolerances
        return ["too far"]

    def to_json(self) -> dict[str, Any]:
        return {"figure": 1}


@pytest.mark.parametrize(
    ("precision", "decoder", "tolerances"),
    [
        ("fp32", None, EXACT),
        ("fp16", None, ROUNDED),
        ("bf16", None, ROUNDED),
        ("fp32", "int8", replace(EXACT, decode_psnr=EIGHT_BIT_PSNR)),
        ("fp32", "bf16", replace(EXACT, decode_psnr=ROUNDED.decode_psnr)),
        ("fp16", "int8", replace(ROUNDED, decode_psnr=EIGHT_BIT_PSNR)),
        ("fp16", "fp8", replace(ROUNDED, decode_psnr=EIGHT_BIT_PSNR)),
    ],
)
def test_a_tokenizer_is_judged_by_the_tolerances_of_its_precision(
    precision: str, decoder: Any, tolerances: Tolerances, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, opened = Report(), []

    def check(graphs: Any) -> Report:
        opened.extend(map(graphs.load, ("encode", "decode")))
        return report

    monkeypatch.setattr(module, "check_tokenizer", check)
    found = certify(fake_bundle(), FakeSession, precision, decoder=decoder)
    assert report.judged_by == [tolerances]
    assert found == Certificate(("too far",), "in short", {"figure": 1})
    assert [session.closed for session in opened] == [1, 1]


def test_a_tokenizer_whose_check_fails_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def check(graphs: Any) -> Report:
        opened.append(graphs.load("encode"))
        raise BackendError("No memory.", "Free some.")

    monkeypatch.setattr(module, "check_tokenizer", check)
    with pytest.raises(BackendError):
        certify(fake_bundle(), FakeSession, "fp32")
    assert [session.closed for session in opened] == [1]


class Opener:
    """Transformers for every graph of a language model."""

    def __init__(self, config: Any, sizes: Mapping[str, int] = {}) -> None:
        self.config, self.sizes = config, sizes
        self.opened: list[FakeGraph] = []

    def __call__(self, path: Path, entry: GraphEntry, options: SessionOptions) -> FakeGraph:
        self.opened.append(transformer_graph(self.config, sizes=self.sizes))
        return self.opened[-1]


@pytest.fixture(params=["generator", "understander"])
def language_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle[Any], list[Any]]:
    """A bundle of two graphs, and the arguments of its comparison's calls."""
    config = GENERATOR if request.param == "generator" else UNDERSTANDER
    calls: list[Any] = []

    def check(bundle: Any, sessions: Any, transformer: Any, *more: Any) -> Report:
        calls.append((sessions, transformer, transformer.pool.pages, transformer.pool.page_size, more))
        return Report()

    monkeypatch.setattr(module, f"check_{request.param}", check)
    monkeypatch.setattr(module, "load_codebook", lambda bundle: "codebook")
    entry = fake_bundle().graphs["decode"]
    return replace(fake_bundle(), config=config, graphs={"transformer": entry, "head": entry}), calls  # type: ignore[arg-type]


@pytest.mark.parametrize(("sizes", "pages"), [({}, (33, 4)), ({"slots": 20}, (20, 4))])
def test_a_language_model_is_compared_over_pages_of_its_own(
    language_model: tuple[Bundle[Any], list[Any]], sizes: dict[str, int], pages: tuple[int, int]
) -> None:
    """Whatever the precision: its report has tolerances of its own. The engine's pool goes before the one asked for."""
    bundle, calls = language_model
    opener = Opener(bundle.config, sizes)
    for precision in ("fp32", "fp16"):
        assert certify(bundle, opener, precision, pages=33, page_size=4) == Certificate(("too far",), "in short", {"figure": 1})
    for sessions, transformer, *found, more in calls:
        assert set(sessions) == {"transformer", "head"}
        assert tuple(found) == pages
        assert more == (("codebook",) if bundle.config is GENERATOR else ())
        assert transformer._k.slots.size == 0
    assert [session.closed for session in opener.opened] == [1] * 4


def test_a_pool_whose_size_nobody_gave_is_the_models_own(language_model: tuple[Bundle[Any], list[Any]]) -> None:
    bundle, calls = language_model
    certify(bundle, Opener(bundle.config), "fp32")
    assert calls[0][2:4] == (bundle.config.default_pages(), 16)


def test_a_graph_that_does_not_open_closes_those_that_did(language_model: tuple[Bundle[Any], list[Any]]) -> None:
    bundle, calls = language_model
    opener = Opener(bundle.config)

    def opening(path: Path, entry: GraphEntry, options: SessionOptions) -> FakeGraph:
        if opener.opened:
            raise BackendError("No memory.", "Free some.")
        return opener(path, entry, options)

    with pytest.raises(BackendError, match="No memory"):
        certify(bundle, opening, "fp32")
    assert ([session.closed for session in opener.opened], calls) == ([1], [])
