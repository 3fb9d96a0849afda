from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from rich.console import Console

from tests.conftest import ROOT
from tests.support.mini import bundled_tokenizer
from tokenflow_export.precision.emulate_half import emulated_graph, emulated_sessions
from tokenflow_export.precision.search import crops
from tokenflow_export.precision.tokenizer_search import TokenizerFinding, search_tokenizer
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import pinned_nodes
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.parity import certificate
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.passes.half_precision import HalfType
from tokenflow_sdk.pictures.images import psnr

STEPS = ProgressSteps(Console(quiet=True))
PHOTO = ROOT / "examples" / "chelsea.jpg"


def searched(
    path: Path, precision: HalfType, agreement: float = 0.5, count: int = 2, decoded: int | None = None
) -> TokenizerFinding:
    bundle = Bundle.open(path, TokenizerConfig)
    images = crops([PHOTO], count, bundle.config.image_size)
    return search_tokenizer(bundle, images, agreement, precision, STEPS, decoded)


def test_figures_are_those_of_the_emulated_graphs(bundle_copy: Path, tmp_path: Path) -> None:
    found = searched(bundle_copy, "fp16")
    assert not any(found.pinned.values())
    assert found.plain == found.quality
    images = crops([PHOTO], 2, 64)

    def run(path: Path, output: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return onnxruntime.InferenceSession(path).run([output], feeds)[0]

    half = {name: emulated_graph(bundle_copy / f"{name}.onnx", "fp16", tmp_path) for name in found.pinned}
    codes = run(bundle_copy / "encode.onnx", "code_indices", {"images": images})
    latents = [run(path, "latent", {"images": images}) for path in (bundle_copy / "encode.onnx", half["encode"])]
    assert not np.array_equal(*latents)
    codes = np.concatenate([codes, TokenizerReference.load(Bundle.open(bundle_copy, TokenizerConfig)).code_indices])
    pictures, features = (
        [run(path, output, {"code_indices": codes}) for path in (bundle_copy / f"{name}.onnx", half[name])]
        for name, output in (("decode", "images"), ("features", "features"))
    )
    assert found.quality.decode_psnr == pytest.approx(min(psnr(a, b) for a, b in zip(*pictures, strict=True)), abs=0.1)
    assert found.quality.features_error == pytest.approx(np.abs(features[0] - features[1]).max(), rel=1e-3)
    assert 0.999 < found.quality.semantic_cosine < 1


def test_every_graph_that_misses_its_bar_is_mended(tmp_path: Path) -> None:
    """The bundled tokenizer in bfloat16, as users have it: its features differ by more than a certificate allows."""
    copy = bundled_tokenizer(tmp_path)
    found = searched(copy, "bf16", count=1)
    assert found.plain.features_error > 0.01 >= found.quality.features_error
    assert len(found.pinned["features"]) == found.nodes["features"] == 1
    assert found.certificate.passed
    assert pinned_nodes(Bundle.open(copy, TokenizerConfig), "bf16") == {"features": found.pinned["features"]}


def test_pinning_brings_codes_nearer(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in bfloat16 miss most tolerances. The certificate is that of all graphs run anew."""
    monkeypatch.setattr("tokenflow_export.precision.search.GROUPS", 4)
    found = searched(bundle_copy, "bf16", agreement=0.99, count=16, decoded=1)
    assert min(found.plain.agreement) < 0.99 <= min(found.quality.agreement)
    assert 0 < len(found.pinned["encode"]) <= found.nodes["encode"]
    bundle = Bundle.open(bundle_copy, TokenizerConfig)
    assert pinned_nodes(bundle, "bf16")["encode"] == found.pinned["encode"]
    assert bundle.parity["bf16"]["agreement"] == list(found.quality.agreement)
    assert certificate.certify(bundle, emulated_sessions(bundle, "bf16", tmp_path, found.pinned), "bf16") == found.certificate
    shown = "\n".join(found.lines(bundle.config.patch_nums))
    assert f"encode: {len(found.pinned['encode'])} of {found.nodes['encode']} products and convolutions pinned" in shown
    assert f"{min(found.plain.agreement):.3%}" in shown[shown.index("with nothing pinned") :]


def test_what_a_certificate_would_refuse_is_not_stored(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crops are one thing, the bundle's reference another."""
    monkeypatch.setattr("tokenflow_export.precision.search.GROUPS", 2)
    monkeypatch.setattr(certificate, "ROUNDED", replace(certificate.ROUNDED, agreement=1.0, margin=0.0))
    with pytest.raises(ParityError, match="in bf16 would be refused: a code flipped.*--agreement"):
        searched(bundle_copy, "bf16")
    assert pinned_nodes(Bundle.open(bundle_copy, TokenizerConfig), "bf16") == {}


@pytest.mark.slow
def test_the_bundled_tokenizer_keeps_its_codes_in_float16(tmp_path: Path) -> None:
    """200 crops of a photo, 99 % in every scale, nothing pinned."""
    tiny = Path(shutil.copytree(find_bundle("tiny", "tokenizer"), tmp_path / "tiny"))
    found = searched(tiny, "fp16", agreement=0.99, count=200, decoded=8)
    assert found.pictures == 200
    assert min(found.quality.agreement) >= 0.99
    assert not any(found.pinned.values())
