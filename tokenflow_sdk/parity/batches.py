"""Compares rows of batches with the same rows alone: a reference has one row, and kernels differ by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Tensor
from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.language_model import BatchAgreement, Piece, hidden_agreement

__all__ = ["Rows", "batch_sizes", "check_batches"]

_DISTINCT = 4
"""Different rows in a batch; more are repeated. Two images have four."""

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """The rows of a model's batches. Each differs from the others, and does not depend on them.

    Attributes:
        embed: embeddings float32 [B, Q, H] of the rows with these B numbers, Q queries each.
        visible: how many of the step's keys each of Q queries sees, int32 [Q].
        choose: likeliest codes or tokens int32 [R, Q] after hidden states float32 [B, Q, H], of the first R rows.
    """

    embed: Callable[[Sequence[int], int], Tensor]
    visible: Callable[[int], Int32]
    choose: Callable[[Float32], Int32]


def batch_sizes(transformer: PagedTransformer, rows: int, queries: int) -> list[tuple[int, int]]:
    """Rows and queries of the batches to compare: the given one, and the largest of each optimization profile.

    Args:
        transformer: a batch has no more rows than it takes, and profiles for one row are left out.
        rows: of a batch that every backend must take.
        queries: most queries in a step.
    """
    largest = [(batch, min(most, queries)) for batch, most, _ in transformer.limits]
    sizes = {(min(rows, transformer.max_rows), queries), *largest}
    return sorted(size for size in sizes if size[0] > 1)


def check_batches(
    transformer: PagedTransformer, context: Piece, rows: Rows, sizes: Iterable[tuple[int, int]]
) -> tuple[BatchAgreement, ...]:
    """Run batches, and their rows alone, over cached tokens.

    All rows read the same pages, each another number of their tokens, so that a batch of any size takes no more pages than one.

    Args:
        transformer: whose pool has room for `context`.
        context: the cached tokens.
        rows: gives the embeddings, and the choices.
        sizes: rows and queries of each batch.

    Returns:
        The agreement of each batch; empty if hidden states of `context` are not finite, so that nothing can follow it.

    Raises:
        PagesExhausted: the pool is too small.
        BackendError: a session cannot be run.
    """
    embeddings, visible = context
    table = PageTable(transformer.pool)
    try:
        positions = np.arange(len(visible), dtype=np.int32)[None]
        output = transformer.step(embeddings, positions, visible[None], [table], [0], width=1)
        if not all(transformer.store(output, [table])):
            return ()
        steps = _Steps(transformer, table, rows)
        return tuple(steps.compare(count, queries) for count, queries in sizes)
    finally:
        table.release()


class _Steps:
    """Steps over the cached tokens of one table, of which nothing is stored."""

    def __init__(self, transformer: PagedTransformer, table: PageTable, rows: Rows) -> None:
        self.transformer, self.table, self.rows = transformer, table, rows
        size = transformer.pool.page_size
        # An engine's profile for few queries may not take all pages.
        self.width = min([pages_for(table.length, size), *(width for _, _, width in transformer.limits)])
        cached = min(table.length, self.width * size)
        self.contexts = [max(1, cached - number * (cached // _DISTINCT + 1)) for number in range(_DISTINCT)]
        self.alone: dict[tuple[int, int], tuple[Float32, Int32]] = {}

    def compare(self, count: int, queries: int) -> BatchAgreement:
        numbers = [row % _DISTINCT for row in range(count)]
        for number in set(numbers):
            if (number, queries) not in self.alone:
                self.alone[number, queries] = self.run([number], queries)
        hidden, chosen = self.run(numbers, queries)
        expected = [self.alone[number, queries] for number in numbers]
        right = np.concatenate([codes for _, codes in expected[: len(chosen)]])
        error, cosine = hidden_agreement(
            hidden.reshape(count * queries, -1), np.concatenate([states for states, _ in expected]).reshape(count * queries, -1)
        )
        return BatchAgreement(count, queries, error, cosine, float((chosen == right).mean()))

    def run(self, numbers: Sequence[int], queries: int) -> tuple[Float32, Int32]:
        context = [self.contexts[number] for number in numbers]
        output = self.transformer.step(
            self.rows.embed(numbers, queries),
            np.stack([np.arange(length, length + queries, dtype=np.int32) for length in context]),
            np.stack([self.rows.visible(queries)] * len(numbers)),
            [self.table] * len(numbers),
            context,
            self.width,
        )
        hidden = np.array(output.hidden, np.float32)
        return hidden, self.rows.choose(hidden)
