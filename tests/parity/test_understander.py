from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenflow_sdk import Understander
from tokenflow_sdk.parity.language_model import LanguageModelReport, run_pieces
from tokenflow_sdk.parity.understander import (
    UnderstanderInputs,
    UnderstanderReference,
    check_understander,
    embed_pieces,
    likeliest_tokens,
)


@pytest.fixture(scope="module")
def understander(mini_understander: Path) -> Iterator[Understander]:
    with Understander.from_pretrained(mini_understander, device="cpu", threads=1) as understander:
        yield understander


def test_a_bundle_gives_its_own_reference(understander: Understander) -> None:
    running = understander._runner.model
    report = check_understander(understander.bundle, running.sessions, running.transformer)
    assert report.failures() == []
    assert report.same_choice == 1
    assert report.hidden_error < 1e-4
    assert running.transformer.pool.free == running.transformer.pool.pages


def test_other_inputs_and_other_hidden_states_are_found_out(understander: Understander) -> None:
    """Each of the steps' parts counts, and so does what the head is given."""
    running, config = understander._runner.model, understander.config
    reference = UnderstanderReference.load(understander.bundle)
    for change in (
        {"before": reference.before[::-1].copy()},
        {"features": -reference.features},
        {"answer": reference.answer[::-1].copy()},
    ):
        steps = replace(reference, **change)
        hidden = run_pieces(running.transformer, embed_pieces(running.sessions, steps), len(steps))
        assert np.abs(hidden - reference.hidden[0]).max() > 0.1
    head = running.sessions["head"]
    np.testing.assert_array_equal(likeliest_tokens(head, reference.hidden[0], config), reference.likeliest[0])
    other = likeliest_tokens(head, np.roll(reference.hidden[0], 1, axis=1), config)
    assert (other == reference.likeliest[0]).mean() < 0.5


def test_the_nearest_of_several_right_results_counts(understander: Understander, monkeypatch: pytest.MonkeyPatch) -> None:
    running, reference = understander._runner.model, UnderstanderReference.load(understander.bundle)

    def report_with(hidden: list[np.ndarray], likeliest: list[np.ndarray]) -> LanguageModelReport:
        stored = replace(reference, hidden=np.stack(hidden), likeliest=np.stack(likeliest))
        monkeypatch.setattr(UnderstanderReference, "load", lambda bundle: stored)
        return check_understander(understander.bundle, running.sessions, running.transformer)

    own, tokens = reference.hidden[0], reference.likeliest[0]
    assert report_with([-own, own], [tokens - 1, tokens]).failures() == []
    assert report_with([own, -own], [tokens, tokens - 1]).failures() == []
    # Each result is whole: hidden states of one and tokens of another are no agreement.
    assert len(report_with([own, -own], [tokens - 1, tokens]).failures()) == 1
    assert len(report_with([-own, -own], [tokens, tokens]).failures()) == 1


def test_the_head_is_given_as_many_rows_as_it_takes(understander: Understander, monkeypatch: pytest.MonkeyPatch) -> None:
    head, reference = understander._runner.model.sessions["head"], UnderstanderReference.load(understander.bundle)
    batches: list[int] = []
    plain = head._infer
    monkeypatch.setattr(head, "max_size", lambda dim: 7)
    monkeypatch.setattr(head, "_infer", lambda feeds, names: (batches.append(len(feeds["hidden"])), plain(feeds, names))[1])
    tokens = likeliest_tokens(head, reference.hidden[0], understander.config)
    np.testing.assert_array_equal(tokens, reference.likeliest[0])
    assert max(batches) == 7
    assert sum(batches) == len(reference)


def test_steps_are_the_same_for_every_bundle_of_these_sizes(understander: Understander) -> None:
    codebook = np.random.default_rng(1).standard_normal((30, 40)).astype(np.float32)
    first, again = (UnderstanderInputs.random(understander.config, codebook) for _ in range(2))
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, vars(again)[name])
    assert first.features.shape == (16, 40)
    assert len(first) == 24 + 16 + 24 + 4


def test_every_bar_is_checked() -> None:
    assert LanguageModelReport(0.1, 0.995, 0.95, "token").failures() == []
    assert "cosine of 0.9000" in LanguageModelReport(0.1, 0.9, 0.95, "token").failures()[0]
    assert "likeliest token is the same at only 50.0%" in LanguageModelReport(0.1, 0.995, 0.5, "token").failures()[0]
