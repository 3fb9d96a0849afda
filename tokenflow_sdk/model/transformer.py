"""A transformer over paged keys and values: the graph, the pages it reads, and the steps between them.

Used for prefill, for a scale of image tokens, and for single tokens alike. Nothing that a batch could change enters a row's
arithmetic: the width of its block table is fixed by its caller, so a sequence gives the same numbers in any batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.model_config import LanguageModelConfig
from tokenflow_sdk.model.kv_cache import PagePool, PageTable

__all__ = ["PREFILL_CHUNK", "PagedTransformer", "StepOutput"]

PREFILL_CHUNK = 256
"""Tokens of a prompt in one step: what running answers wait for a newcomer between two tokens."""


@dataclass(frozen=True)
class StepOutput:
    """hidden float32 [B, Q, H]; the step's own keys and values [layers, B, Q, kv_heads, head_dim], in the pages' type.

    They lie where the engine left them, and are valid until the next step.
    """

    hidden: Tensor
    new_k: Tensor
    new_v: Tensor


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
        self.max_rows = session.max_size("batch") or sys.maxsize
        """Most rows in a step."""
        self._session = session
        shape = (layers, pages, page_size, kv_heads, head_dim)
        dtype = np.dtype(next(spec.dtype for spec in session.inputs if spec.name == "k_pages"))
        self._k, self._v = session.make_pages(shape, dtype), session.make_pages(shape, dtype)

    @classmethod
    def of(cls, config: LanguageModelConfig, session: Session, pages: int, page_size: int) -> PagedTransformer:
        """For a model of these sizes. An engine is built for a pool of one size and has that instead of `pages`."""
        slots = session.max_size("slots")
        pages = slots // config.layers if slots else pages
        return cls(session, config.layers, config.kv_heads, config.head_dim, pages, page_size)

    def close(self) -> None:
        """Free the pages. The session stays open."""
        for pages in (self._k, self._v):
            pages.close()

    @property
    def page_bytes(self) -> int:
        """Memory of one page, keys and values of all layers."""
        return 2 * self._k.page_bytes

    def step(
        self,
        embeddings: Tensor,
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
        found = self._session.run_resident(
            {
                "embeddings": embeddings,
                "positions": positions,
                "visible": visible,
                "context": np.asarray(context, np.int32),
                "block_tables": np.stack([table.block_table_row(width) for table in tables]),
                "k_pages": self._k.slots,
                "v_pages": self._v.slots,
            }
        )
        return StepOutput(found["hidden"], found["new_k"], found["new_v"])

    def store(self, output: StepOutput, tables: Sequence[PageTable]) -> None:
        """Append a step's keys and values to the rows' tables.

        Raises:
            PagesExhausted: the pool has too few free pages; rows before the failing one are stored.
        """
        for row, table in enumerate(tables):
            append = table.append(output.new_k.shape[2])
            for source, target in append.copies:
                self._k.copy_page(source, target)
                self._v.copy_page(source, target)
            self._k.write(output.new_k, row, append.pages, append.offsets)
            self._v.write(output.new_v, row, append.pages, append.offsets)
