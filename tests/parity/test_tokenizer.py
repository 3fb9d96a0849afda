from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import CorruptBundleError, ParityError
from tokenflow_sdk.parity.tokenizer import TokenizerReference, check_tokenizer, forced_agreement, scale_cells
from tokenflow_sdk.parity.tokenizer_report import EXACT, ROUNDED, TIE_DISTANCE, Flip


@pytest.fixture(scope="module")
def reference(mini_bundle: Path) -> TokenizerReference:
    return TokenizerReference.load(Bundle.open(mini_bundle, TokenizerConfig))


@pytest.mark.parametrize("kind", ["clip", "vitamin", "siglip"])
def test_an_exported_bundle_reproduces_pytorch(kind: str, mini_bundles: Callable[[str], Path]) -> None:
    seen: list[float] = []
    with Tokenizer.from_pretrained(mini_bundles(kind)) as tokenizer:
        report = check_tokenizer(tokenizer.graphs, progress=seen.append)
    assert report.failures() == []
    assert report.equal_codes > 0.9
    assert len(report.agreement) == 4
    assert seen[-1] == 1.0
    json.dumps(report.to_json(), allow_nan=False)


def test_the_slow_search_is_the_encode_graphs(tokenizer: Tokenizer, reference: TokenizerReference) -> None:
    for i, image in enumerate(reference.images):
        latent = tokenizer.latent(image[None])[0]
        slow = np.concatenate([nearest for _, nearest in scale_cells(latent, reference.codebook, tokenizer.config)])
        assert np.array_equal(slow, tokenizer.encode_array(image[None])[0])
        assert np.array_equal(slow, reference.code_indices[i])


def test_another_encoder_is_found_out(bundle_copy: Path, reference: TokenizerReference) -> None:
    """A bundle whose latents are off by one part in fifty flips codes, and the report says where and how far."""
    graph = ir.load(bundle_copy / "encode.onnx")
    weight = graph.graph.initializers["quant_conv.weight"]
    factors = 1 + 0.02 * np.sin(np.arange(8, dtype=np.float32)).reshape(8, 1, 1, 1)
    weight.const_value = ir.tensor(weight.const_value.numpy() * factors)
    ir.save(graph, bundle_copy / "encode.onnx")
    bundle = Bundle.open(bundle_copy, TokenizerConfig)
    entry = replace(bundle.graph("encode"), files=(file_entry(bundle_copy / "encode.onnx"),))
    with Tokenizer(replace(bundle, graphs=bundle.graphs | {"encode": entry})) as tokenizer:
        report = check_tokenizer(tokenizer.graphs, reference)
    assert min(report.agreement) < 1
    assert max(flip.margin for flip in report.flips) > TIE_DISTANCE
    assert all(flip.expected != flip.got for flip in report.flips)
    with pytest.raises(ParityError, match="This engine does not reproduce PyTorch: a code flipped at a margin of"):
        report.require("This engine")


def test_every_bar_is_checked(tokenizer: Tokenizer, reference: TokenizerReference) -> None:
    off = [
        (replace(reference, features=reference.features + 0.01), "features differ by 1.0e-02"),
        (replace(reference, semantic=reference.semantic + 0.1), "semantic features differ by 1.0e-01"),
        (replace(reference, decoded=255 - reference.decoded), "decoded pictures agree to"),
    ]
    for changed, words in off:
        assert [text for text in check_tokenizer(tokenizer.graphs, changed).failures() if words in text]
    assert check_tokenizer(tokenizer.graphs, reference).failures() == []


def test_rounding_is_allowed_to_flip_near_ties_and_few_of_them(tokenizer: Tokenizer, reference: TokenizerReference) -> None:
    report = check_tokenizer(tokenizer.graphs, reference)
    near = Flip(picture=0, scale=3, position=0, expected=1, got=2, margin=0.01)
    flipped = replace(report, flips=(near,), agreement=(1, 1, 1, 0.97))
    assert flipped.overall == pytest.approx(1 - 0.03 * 16 / 30)
    assert flipped.failures(ROUNDED) == []
    assert len(flipped.failures(EXACT)) == 1
    assert "only 97.3" in replace(flipped, agreement=(1, 1, 1, 0.95)).failures(ROUNDED)[0]
    assert "margin of 2.0e-01" in replace(flipped, flips=(replace(near, margin=0.2),)).failures(ROUNDED)[0]
    assert "cosine of 0.99000" in replace(report, semantic_cosine=0.99).failures(ROUNDED)[0]


def test_forced_agreement_judges_every_scale_by_itself(tokenizer: Tokenizer, reference: TokenizerReference) -> None:
    config, codes = tokenizer.config, reference.code_indices.copy()
    assert forced_agreement(reference.latent, codes, reference.codebook, config) == (1.0,) * 4
    codes[:, 5:14] = (codes[:, 5:14] + 1) % config.codebook_size
    shares = forced_agreement(reference.latent, codes, reference.codebook, config)
    assert shares[:3] == (1.0, 1.0, 0.0)
    assert shares[3] < 1


def test_a_flip_between_equally_near_codes_is_no_failure(tokenizer: Tokenizer, reference: TokenizerReference) -> None:
    """The same code stored twice in the codebook: either is right."""
    codes = reference.code_indices.copy()
    codebook = reference.codebook.copy()
    twin = max(set(range(500)) - set(codes.ravel().tolist()))
    codebook[twin] = codebook[codes[0, -1]]
    codes[0, -1] = twin
    report = check_tokenizer(
        tokenizer.graphs, replace(reference, codebook=codebook, code_indices=codes, images=reference.images[:1])
    )
    (flip,) = report.flips
    assert (flip.scale, flip.position, flip.expected, flip.got) == (3, 15, twin, reference.code_indices[0, -1])
    assert abs(flip.margin) < TIE_DISTANCE
    assert not any("flipped" in text for text in report.failures())


def test_a_damaged_reference_is_named(mini_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(mini_bundle, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b", TokenizerConfig)
    (tmp_path / "b" / "reference.npz").write_bytes(b"x" * bundle.asset("reference").size)
    with pytest.raises(CorruptBundleError, match="reference.npz is damaged"):
        TokenizerReference.load(bundle)
