"""Run the `transformer` graph over a paged key/value cache: prefill, a scale of image tokens, or one token per sequence.

The shape of a row's computation must not depend on the other rows, because sums of another length round differently. The caller
therefore gives the width of the block tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.model_config import LanguageModelConfig
from tokenflow_sdk.errors import NotFiniteError
from tokenflow_sdk.model.kv_cache import PagePool, PageTable

__all__ = ["PREFILL_CHUNK", "PagedTransformer", "StepOutput", "filled_up", "not_finite"]

T = TypeVar("T")

PREFILL_CHUNK = 256
"""Largest number of prompt tokens in one prefill step, which bounds how long running answers wait for their next token."""


@dataclass(frozen=True)
class StepOutput:
    """Outputs of a step, in the memory of the session's device. They are valid until the next step.

    Args:
        hidden: hidden states after the final norm, float32 [B, Q, H].
        new_k, new_v: keys and values of the step's tokens [layers, B, Q, kv_heads, head_dim], in the type of the pages.
    """

    hidden: Tensor
    new_k: Tensor
    new_v: Tensor


class PagedTransformer:
    """The `transformer` graph with its key/value cache.

    Args:
        session: the loaded graph.
        layers: number of layers.
        kv_heads: key/value heads of a layer.
        head_dim: width of a head.
        pages: number of pages.
        page_size: tokens in a page.
    """

    def __init__(self, session: Session, layers: int, kv_heads: int, head_dim: int, pages: int, page_size: int) -> None:
        self.token_forwards = 0
        """Number of tokens run through the transformer so far, summed over rows."""
        self.max_rows = session.max_size("batch") or sys.maxsize
        """Largest number of rows B in a step."""
        self.limits = session.limits("batch", "queries", "table")
        """Most rows, queries and pages of a block table in each optimization profile; empty if only memory limits them."""
        self._session = session
        shape = (layers, pages, page_size, kv_heads, head_dim)
        dtype = np.dtype(next(spec.dtype for spec in session.inputs if spec.name == "k_pages"))
        self._k, self._v = session.make_pages(shape, dtype), session.make_pages(shape, dtype)
        # After the memory, which may be refused.
        self.pool = PagePool(pages, page_size)

    @classmethod
    def of(cls, config: LanguageModelConfig, session: Session, pages: int, page_size: int) -> PagedTransformer:
        """Create one with the sizes of `config`.

        A TensorRT engine is built for one number of pages, which then replaces `pages`.
        """
        slots = session.max_size("slots")
        pages = slots // config.layers if slots else pages
        return cls(session, config.layers, config.kv_heads, config.head_dim, pages, page_size)

    def close(self) -> None:
        """Free the pages. The session stays open."""
        for pages in (self._k, self._v):
            pages.close()

    @property
    def page_bytes(self) -> int:
        """Size in bytes of one page: keys and values of all layers."""
        return 2 * self._k.page_bytes

    def padded(self, dim: str, size: int) -> int:
        """See `Session.padded`; rows are padded with `filled_up`."""
        return self._session.padded(dim, size)

    def joined(self, parts: Iterable[Tensor], length: int) -> Tensor:
        """See `Session.joined`."""
        return self._session.joined(parts, length)

    def step(
        self,
        embeddings: Tensor,
        positions: NDArray[np.int32],
        visible: NDArray[np.int32],
        tables: Sequence[PageTable],
        context: Sequence[int],
        width: int,
    ) -> StepOutput:
        """Run one forward pass. The new keys and values are not stored; `store` does that.

        Args:
            embeddings: input embeddings, float32 [B, Q, H].
            positions: positions for the rotary embedding, int32 [B, Q].
            visible: int32 [B, Q]; query q attends to the first `visible[b, q]` of the step's own keys: q + 1 is causal
                attention, Q bidirectional.
            tables: pages of each row's sequence, B of them.
            context: number of cached tokens that each row attends to.
            width: number of pages in each row of the block table, at least as many as `context` takes.
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

    def store(
        self, output: StepOutput, tables: Sequence[PageTable], rows: Sequence[int] | None = None, count: int | None = None
    ) -> list[bool]:
        """Append the keys and values of a step to the cache, except those of rows that are not finite.

        Pages are reused, and block tables are filled up with the pages of others. Attention multiplies what it masks by 0,
        which is 0 for finite numbers only.

        Args:
            output: result of the last step.
            tables: the tables that were given to it, without those of padded rows.
            rows: row of each table; None: in order.
            count: how many tokens to store of each row; None: all.

        Returns:
            For each table whether its row was stored. The other tables are unchanged; their sequences cannot go on.

        Raises:
            PagesExhausted: the pool has too few free pages; rows before the failing one are stored.
        """
        rows = range(len(tables)) if rows is None else rows
        batch, length, _ = output.hidden.shape
        count = length if count is None else count
        finite = _finite_rows(output, rows, count)
        places = np.full((batch, length), -1, np.int32)
        try:
            for row, table, stored in zip(rows, tables, finite, strict=True):
                if stored:
                    append = table.append(count)
                    places[row, :count] = append.pages * self.pool.page_size + append.offsets
                    for source, target in append.copies:
                        self._k.copy_page(source, target)
                        self._v.copy_page(source, target)
        finally:
            self._k.write(output.new_k, places)
            self._v.write(output.new_v, places)
        return finite


def filled_up(rows: Sequence[T], count: int) -> list[T]:
    """A list of `count` rows: the given ones, then the last one again. What it computes is what that one computes."""
    return [*rows, *[rows[-1]] * (count - len(rows))]


def not_finite() -> NotFiniteError:
    """The error of a request for which the model computed NaN or infinity."""
    return NotFiniteError(
        "The model computed NaN or infinity for this request.",
        "Give features as Tokenizer.features gives them; if pictures and text fail as well, check the bundle with "
        "`tokenflow verify`, or export it in float32.",
    )


def _finite_rows(output: StepOutput, rows: Sequence[int], count: int) -> list[bool]:
    """Whether the numbers of rows of a step are finite, in their first `count` tokens.

    The last query sees all keys and values of its row, so NaN in any of them, and infinite values, reach its hidden state; it
    alone is fetched from a device. Keys that hide, because infinity of the right sign weighs nothing, are found in host memory;
    engines make them finite (`tokenflow_sdk.passes.finite_pages`).
    """
    hidden, last = output.hidden, count - 1
    ends = hidden[:, last] if isinstance(hidden, np.ndarray) else hidden.column(last)
    new = [array for array in (output.new_k, output.new_v) if isinstance(array, np.ndarray)]
    return [
        bool(np.isfinite(ends[row]).all() and all(np.isfinite(array[:, row, :count]).all() for array in new)) for row in rows
    ]
