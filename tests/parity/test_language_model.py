from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.fake_graphs import UNDERSTANDER, transformer_graph
from tokenflow_sdk.bundle.arrays import load_reference
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.errors import CorruptBundleError, PagesExhausted
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.language_model import LanguageModelReport, hidden_agreement, run_pieces
from tokenflow_sdk.parity.understander import UnderstanderReference


def transformer(pages: int) -> PagedTransformer:
    return PagedTransformer(transformer_graph(UNDERSTANDER), 1, 1, 1, pages, page_size=4)


def test_pieces_are_run_in_order_and_leave_no_page() -> None:
    paged = transformer(3)
    x = np.arange(22, dtype=np.float32).reshape(1, 11, 2)
    pieces = [(x[:, start:stop], np.arange(1, stop - start + 1, dtype=np.int32)) for start, stop in ((0, 5), (5, 10), (10, 11))]
    np.testing.assert_array_equal(run_pieces(paged, pieces, 11), x[0])
    assert paged.token_forwards == 11
    assert paged.pool.free == 3
    paged = transformer(2)
    with pytest.raises(PagesExhausted):
        run_pieces(paged, pieces, 11)
    assert paged.pool.free == 2


def test_agreement_is_of_the_worst_position() -> None:
    expected = np.asarray([[1, 0], [0, 2]], np.float32)
    assert hidden_agreement(expected, expected) == (0, 1)
    error, cosine = hidden_agreement(np.asarray([[1, 0], [2, 0]], np.float32), expected)
    assert (error, cosine) == (2, 0)
    assert np.isnan(hidden_agreement(np.full((2, 2), np.nan, np.float32), expected)[1])


def test_every_bar_is_checked() -> None:
    assert LanguageModelReport(0.1, 0.995, 0.95, "token").failures() == []
    assert LanguageModelReport(0.1, 0.98, 0.95, "token").failures() == ["hidden states have a cosine of 0.9800"]
    found = LanguageModelReport(0.1, 0.995, 0.5, "token").failures()
    assert found == ["the likeliest token is the same at only 50.0% of positions"]
    assert len(LanguageModelReport(0.1, float("nan"), 0.0, "code").failures()) == 2


@dataclass(frozen=True)
class Other:
    """A reference of another kind."""

    layout = "latent float32 n"
    latent: np.ndarray


def test_a_reference_must_be_there_whole_and_of_its_kind(mini_understander: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(mini_understander, UnderstanderConfig)
    assert load_reference(bundle, UnderstanderReference).hidden.dtype == np.float32
    with pytest.raises(CorruptBundleError, match=r"reference\.npz is no reference file.*Export the bundle again"):
        load_reference(bundle, Other)
    with pytest.raises(CorruptBundleError, match=r"has no 'reference' file.*Export the bundle again"):
        load_reference(replace(bundle, assets={}), UnderstanderReference)
    (tmp_path / "reference.npz").write_bytes(b"x" * bundle.asset("reference").size)
    with pytest.raises(CorruptBundleError, match=r"reference\.npz is damaged"):
        load_reference(replace(bundle, path=tmp_path), UnderstanderReference)
