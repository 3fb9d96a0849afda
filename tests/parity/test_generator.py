from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk import Generator
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.parity.generator import (
    GeneratorInputs,
    GeneratorReference,
    check_generator,
    embed_inputs,
    likeliest_codes,
    run_inputs,
)
from tokenflow_sdk.parity.language_model import LanguageModelReport


@pytest.fixture(scope="module")
def generator(mini_generator: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(mini_generator, device="cpu", threads=1) as generator:
        yield generator


def test_a_bundle_gives_its_own_reference(generator: Generator) -> None:
    running, bundle = generator._runner.model, generator.bundle
    transformer = running.scheduler.loop.transformer
    report = check_generator(bundle, running.sessions, transformer, load_codebook(bundle))
    assert report.failures() == []
    assert report.same_choice == 1
    assert report.hidden_error < 1e-4
    assert transformer.pool.free == transformer.pool.pages
    (batch,) = report.batches
    assert (batch.rows, batch.queries) == (4, bundle.config.scales.counts[-1])
    assert (batch.hidden_error < 1e-4, batch.same_choice) == (True, 1)


def test_other_hidden_states_are_found_out(generator: Generator) -> None:
    running, bundle = generator._runner.model, generator.bundle
    steps = GeneratorInputs.random(bundle.config)
    embeddings = embed_inputs(running.sessions, load_codebook(bundle), steps)
    hidden = run_inputs(running.scheduler.loop.transformer, *embeddings)
    reference = GeneratorReference.load(bundle)
    np.testing.assert_allclose(hidden, reference.hidden[0], atol=1e-4)
    np.testing.assert_array_equal(likeliest_codes(running.sessions["sample"], hidden[None]), reference.likeliest[:1])
    other = likeliest_codes(running.sessions["sample"], np.roll(hidden, 1, axis=1)[None])
    assert (other == reference.likeliest[:1]).mean() < 0.5


def test_results_must_be_of_the_same_positions(generator: Generator, tmp_path: Path) -> None:
    reference = GeneratorReference.load(generator.bundle)
    arrays = vars(reference) | {"hidden": reference.hidden[0]}
    np.savez(tmp_path / "reference.npz", **arrays)
    entry = file_entry(tmp_path / "reference.npz")
    with pytest.raises(
        CorruptBundleError, match=r"no reference file: hidden is float32\[\d+, 32\], not.*Export the bundle again"
    ):
        GeneratorReference.load(replace(generator.bundle, path=tmp_path, assets={"reference": entry}))


def test_the_nearest_of_several_right_results_counts(generator: Generator) -> None:
    own = GeneratorReference.load(generator.bundle)

    def report_with(hidden: list[np.ndarray], likeliest: list[np.ndarray]) -> LanguageModelReport:
        right = replace(own, hidden=np.stack(hidden), likeliest=np.stack(likeliest))
        return right.compare(own.hidden[0], own.likeliest[0], "code")

    states, codes = own.hidden[0], own.likeliest[0]
    assert report_with([-states, states], [codes - 1, codes]).failures() == []
    assert report_with([states, -states], [codes, codes - 1]).failures() == []
    # Each result is whole: hidden states of one and codes of another are no agreement.
    assert len(report_with([states, -states], [codes - 1, codes]).failures()) == 1
    assert len(report_with([-states, -states], [codes, codes]).failures()) == 1


def test_every_bar_is_checked() -> None:
    assert LanguageModelReport(0.1, 0.995, 0.95, "code").failures() == []
    assert "cosine of 0.9000" in LanguageModelReport(0.1, 0.9, 0.95, "code").failures()[0]
    assert "only 50.0%" in LanguageModelReport(0.1, 0.995, 0.5, "code").failures()[0]
    assert len(LanguageModelReport(float("nan"), float("nan"), 0.5, "code").failures()) == 2


def test_a_damaged_reference_is_named(mini_generator: Path, tmp_path: Path) -> None:
    shutil.copytree(mini_generator, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b", GeneratorConfig)
    (tmp_path / "b" / "reference.npz").write_bytes(b"x" * bundle.asset("reference").size)
    with pytest.raises(CorruptBundleError, match=r"reference\.npz is damaged"):
        GeneratorReference.load(bundle)
