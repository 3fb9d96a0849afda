"""A transformer over paged keys and values: the graph, the pages it reads, and the steps between them.

Used for prefill, for a scale of image tokens, and for single tokens alike. Nothing that a batch could change enters a row's
arithmetic: the width of its block table is fixed by its caller, so a sequence gives the same numbers in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.base import Array, Session
from tokenflow_sdk.kv_cache import PagePool, PageTable

__all__ = ["PagedTransformer", "StepOutput"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class StepOutput:
    """hidden float32 [B, Q, H]; the step's own keys and values [layers, B, Q, kv_heads, head_dim], in the pages' type."""

    hidden: Float32
    new_k: Array
    new_v: Array


class PagedTransformer:
    """Runs steps and keeps the pages.

    Args:
        session: the `transformer` graph.
        layers: of the transformer.
        kv_heads: key/value heads.
        head_dim: values in a head.
        pages: pages in the pool.
        page_size: tokens in a page.
    """

    def __init__(self, session: Session, layers: int, kv_heads: int, head_dim: int, pages: int, page_size: int) -> None:
        self.pool = PagePool(pages, page_size)
        self.token_forwards = 0
        """Tokens run through the transformer so far, all rows counted."""
        self._session = session
        shape = (layers, pages, page_size, kv_heads, head_dim)
        dtype = next(spec.dtype for spec in session.inputs if spec.name == "k_pages")
        self._k, self._v = np.zeros(shape, dtype), np.zeros(shape, dtype)

    @property
    def page_bytes(self) -> int:
        """Memory of one page, keys and values of all layers."""
        return 2 * self._k[:, 0].nbytes

    def step(
        self,
        embeddings: Float32,
        positions: NDArray[np.int32],
        visible: NDArray[np.int32],
        tables: Sequence[PageTable],
        context: Sequence[int],
        width: int,
    ) -> StepOutput:
        """One forward pass; nothing is stored.

        Args:
            embeddings: float32 [B, Q, H].
            positions: int32 [B, Q].
            visible: int32 [B, Q], how many of the step's own keys each query sees, in order.
            tables: each row's pages.
            context: how many of its tokens each row sees.
            width: pages of every row's block table.
        """
        batch, length, _ = embeddings.shape
        self.token_forwards += batch * length
        slots = (-1, *self._k.shape[2:])
        found = self._session.run(
            {
                "embeddings": embeddings,
                "positions": positions,
                "visible": visible,
                "context": np.asarray(context, np.int32),
                "block_tables": np.stack([table.row(width) for table in tables]),
                "k_pages": self._k.reshape(slots),
                "v_pages": self._v.reshape(slots),
            }
        )
        return StepOutput(*(found[name] for name in ("hidden", "new_k", "new_v")))  # type: ignore[arg-type]

    def store(self, output: StepOutput, tables: Sequence[PageTable]) -> None:
        """Append a step's keys and values to the rows' tables.

        Raises:
            PagesExhausted: the pool has too few free pages; rows before the failing one are stored.
        """
        for row, table in enumerate(tables):
            append = table.append(output.new_k.shape[2])
            for source, target in append.copies:
                self._k[:, target] = self._k[:, source]
                self._v[:, target] = self._v[:, source]
            self._k[:, append.pages, append.offsets] = output.new_k[:, row]
            self._v[:, append.pages, append.offsets] = output.new_v[:, row]
