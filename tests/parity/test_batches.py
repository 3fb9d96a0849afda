from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.fake_graphs import UNDERSTANDER, transformer_graph
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.errors import EngineRefusedError
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.batches import Rows, batch_sizes, check_batches
from tokenflow_sdk.parity.language_model import BatchAgreement, LanguageModelReport


@pytest.mark.parametrize(
    ("limits", "max_rows", "sizes"),
    [
        ([], 2**31, [(4, 64)]),
        ([(16, 16, 4), (16, 100, 9), (16, 256, 20)], 16, [(4, 64), (16, 16), (16, 64)]),
        ([(8, 1, 9), (1, 256, 9)], 8, [(4, 64), (8, 1)]),
        ([(1, 1, 9), (1, 256, 9)], 1, []),
    ],
)
def test_the_largest_batch_of_each_profile(limits: list[Any], max_rows: int, sizes: list[tuple[int, int]]) -> None:
    assert batch_sizes(SimpleNamespace(limits=limits, max_rows=max_rows), rows=4, queries=64) == sizes  # type: ignore[arg-type]


def engines(path: Path, config: type[Any], **settings: Any) -> Engines:
    return Engines(Bundle.open(path, config), BuildConfig("tensorrt", precision="fp32", **settings))


@pytest.mark.parametrize("graph", ["transformer", "embed_image", "sample"])
def test_a_generators_engine_that_is_right_for_one_row_only_is_refused(machine: Any, graph: str, mini_generator: Path) -> None:
    found = engines(mini_generator, GeneratorConfig, batch=(1, 1, 2))
    figures = found.prepare().figures
    assert {batch["rows"] for batch in figures["batches"]} == {4}
    assert all(batch["same_choice"] == 1 and batch["hidden_error"] < 1e-4 for batch in figures["batches"])
    machine[1].right_alone.add(graph)
    certificate = found.recertify()
    assert all("in a batch of 4 rows" in text for text in certificate.failures)
    with pytest.raises(EngineRefusedError, match=r"in a batch of 4 rows of \d+, compared with each alone, .*--batch-limit 1"):
        certificate.require("An engine")


@pytest.mark.parametrize("most", [1, 3, 8])
def test_answers_are_compared_as_many_at_once_as_the_engine_takes(machine: Any, most: int, mini_understander: Path) -> None:
    found = engines(mini_understander, UnderstanderConfig, batch=(1, 1, most), pages=9)
    assert [(batch["rows"], batch["queries"]) for batch in found.prepare().figures["batches"]] == [(most, 1)][: most - 1]
    machine[1].right_alone.add("transformer")
    assert found.recertify().passed == (most == 1)


@pytest.mark.parametrize("pages", [1, 3])
def test_batches_take_no_more_pages_than_one_row(pages: int) -> None:
    """Each row is given its own number, and sees its own share of the cached tokens."""
    seen: list[list[int]] = []

    def compute(feeds: Any) -> Any:
        x = feeds["embeddings"]
        seen.append(feeds["context"].tolist())
        assert feeds["block_tables"].shape[1] in (1, pages)
        stored = np.zeros((1, *x.shape[:2], 1, 1), np.float32)
        return {"hidden": x + feeds["context"][:, None, None], "new_k": stored, "new_v": stored}

    transformer = PagedTransformer(transformer_graph(UNDERSTANDER, compute), 1, 1, 1, pages, page_size=4)
    rows = Rows(
        lambda numbers, queries: np.stack([np.full((queries, 2), number + 1, np.float32) for number in numbers]),
        lambda queries: np.full(queries, queries, np.int32),
        lambda hidden: hidden.argmax(axis=-1).astype(np.int32),
    )
    context = np.zeros((1, 4 * pages, 2), np.float32), np.arange(1, 4 * pages + 1, dtype=np.int32)
    (found,) = check_batches(transformer, context, rows, [(6, 3)])
    assert (found.rows, found.queries, found.hidden_error, found.same_choice) == (6, 3, 0, 1)
    assert found.hidden_cosine == pytest.approx(1)
    lengths = seen[-1]
    assert lengths == [*lengths[:4], *lengths[:2]]
    assert max(lengths) == 4 * pages
    assert min(lengths) >= 1
    assert transformer.pool.free == pages


def test_where_nothing_is_finite_no_batch_is_run() -> None:
    transformer = PagedTransformer(transformer_graph(UNDERSTANDER), 1, 1, 1, 2, page_size=4)
    context = np.full((1, 4, 2), np.nan, np.float32), np.arange(1, 5, dtype=np.int32)
    assert check_batches(transformer, context, None, [(4, 1)]) == ()  # type: ignore[arg-type]
    assert transformer.pool.free == 2


def test_a_report_judges_its_batches_by_the_same_tolerances() -> None:
    report = LanguageModelReport(0.1, 0.995, 0.95, "code", (BatchAgreement(4, 16, 0, 1, 1), BatchAgreement(16, 1, 9, 0.5, 0.5)))
    assert report.failures() == [
        "in a batch of 16 rows of 1, compared with each alone, hidden states have a cosine of 0.5000",
        "in a batch of 16 rows of 1, compared with each alone, the likeliest code is the same at only 50.0% of positions",
    ]
    assert report.summary.endswith("in batches of up to 16 rows cosine 0.50000 with each alone")
