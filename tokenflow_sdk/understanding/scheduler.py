"""Schedules answers: each step runs one chunk of one prompt, and then one token of every answer that has begun.

Prompts are prefilled in chunks, the one with the least work left first (`LeastWorkFirst`), and another begins before it is done
only if it is smaller. So running answers wait for one chunk at most between two tokens, a short prompt for one chunk of a long
one, and the second of two questions about the same image finds the first one's pages in the prefix cache.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.errors import ArgumentError, PagesExhausted, PromptError
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.transformer import PREFILL_CHUNK
from tokenflow_sdk.scheduling import LeastWorkFirst, WaitingQueue
from tokenflow_sdk.understanding.prefix_cache import PrefixCache
from tokenflow_sdk.understanding.token_loop import AnswerRequest, TokenLoop

__all__ = ["TokenScheduler"]


class TokenScheduler:
    """Admits requests to the pool and runs them on one loop. `check` may be called from any thread,
    everything else by one thread at a time.

    A request is admitted when the pages it can need at most fit beside those of all live requests, so a step never runs out of
    pages. Pages that only the prefix cache holds count as free; they are evicted when they are needed.
    """

    def __init__(self, loop: TokenLoop) -> None:
        self.loop = loop
        self.cache = PrefixCache()
        self._waiting = WaitingQueue(self._left)
        self._live: list[AnswerRequest] = []
        self._order: LeastWorkFirst[AnswerRequest] = LeastWorkFirst()

    def check(self, request: AnswerRequest) -> None:
        """Raise if a request could never run.

        Raises:
            ArgumentError: a stop token that the model does not have.
            PromptError: prompt and answer are longer than the model reads.
            PagesExhausted: it needs more pages than the pool has.
        """
        pool, config = self.loop.transformer.pool, self.loop.config
        if wrong := [i for i in request.params.stop_ids or () if i >= config.vocabulary]:
            raise ArgumentError(
                f"stop_ids={wrong[0]} ends no answer: this model has tokens 0 .. {config.vocabulary - 1}.", "Leave it out."
            )
        total = len(request.prompt) + request.limit
        if total > config.context:
            raise PromptError(
                f"Images and text have {len(request.prompt)} tokens, and max_tokens={request.limit} more make "
                f"{total}; this model reads {config.context}.",
                "Shorten the conversation, give fewer images, or a smaller max_tokens.",
            )
        if self._pages(request) > pool.pages:
            raise PagesExhausted(self._pages(request), pool.pages, pool.pages)

    def submit(self, request: AnswerRequest) -> None:
        """Queue a request. Errors as in `check`."""
        self.check(request)
        self._waiting.put(request)

    def remove(self, request: AnswerRequest) -> None:
        """Drop a request and free its pages; its tokens stay. Dropping a finished request does nothing."""
        if request in self._live:
            self._live.remove(request)
            if request.table is not None:
                request.table.release()
        else:
            self._waiting.remove(request)

    def kept(self) -> list[PageTable]:
        """What the prefix cache holds."""
        return self.cache.tables()

    def step(self) -> None:
        """Prefill one chunk of the smallest prompt, then decode one token of every answer that has begun."""
        self._admit()
        if pending := [request for request in self._live if request.pending is not None]:
            self._run(
                [self._order.next(pending, self._left, lambda request: min(PREFILL_CHUNK, request.unread))], self._prefill
            )
        answering, most = [request for request in self._live if request.pending is None], self.loop.transformer.max_rows
        for start in range(0, len(answering), most):
            self._run(answering[start : start + most], self._decode)

    def _admit(self) -> None:
        """Admit a waiting request that has less work left than all whose prompts are being prefilled, if its pages fit."""
        least = min((self._left(request) for request in self._live if request.pending is not None), default=math.inf)
        request = self._waiting.take(lambda request: self._left(request) < least and self._fits(request))
        if request is not None:
            self._live.append(request)
            self._run([request], lambda _: self.loop.begin(request, self._cached(request)))

    def _fits(self, request: AnswerRequest) -> bool:
        table = self._cached(request)
        live = [(other.table, self._pages(other)) for other in self._live if other.table is not None]
        committed = self._committed([*live, (table, self._pages(request))])
        table.release()
        return committed <= table.pool.pages

    def _cached(self, request: AnswerRequest) -> PageTable:
        """A new table of the longest beginning of the prompt that the prefix cache has; the caller releases it."""
        return self.cache.find(self._digests(request)) or PageTable(self.loop.transformer.pool)

    @staticmethod
    def _digests(request: AnswerRequest) -> list[bytes]:
        return [digest for _, digest in reversed(request.prompt.prefix_boundaries)]

    def _left(self, request: AnswerRequest) -> int:
        """Work left at most: tokens of the prompt that are neither run nor cached, and of the answer."""
        waits = request.table is None
        unread = len(request.prompt) - self.cache.length(self._digests(request)) if waits else request.unread
        return unread + request.limit - len(request.tokens)

    def _prefill(self, requests: Sequence[AnswerRequest]) -> None:
        (request,) = requests
        assert request.table is not None
        read, count = request.table.length, min(PREFILL_CHUNK, request.unread)
        self._make_room([request.table], count)
        self.loop.prefill(request, count)
        for length, digest in request.prompt.prefix_boundaries:
            if read < length <= request.table.length:
                self.cache.put(digest, request.table, length)

    def _decode(self, requests: Sequence[AnswerRequest]) -> None:
        self._make_room([request.table for request in requests if request.table is not None], 1)
        self.loop.decode(requests)

    def _run(self, requests: Sequence[AnswerRequest], work: Callable[[Sequence[AnswerRequest]], None]) -> None:
        """Run a part of a step for some requests. They leave when they are finished, or with its error; others go on."""
        try:
            work(requests)
        except BaseException as error:
            for request in requests:
                request.error = error
                self.remove(request)
            return
        for request in requests:
            if request.finish is not None:
                self._keep(request)
            if request.finish is not None or request.error is not None:
                self.remove(request)

    def _keep(self, request: AnswerRequest) -> None:
        """Put the pages of a finished turn of a conversation into the prefix cache."""
        if request.keep and request.table is not None:
            length, digest = request.history.prefix_boundaries[-1]
            self.cache.put(digest, request.table, length)

    def _pages(self, request: AnswerRequest) -> int:
        """Pages that a request holds at its end at most."""
        return pages_for(request.most_stored, self.loop.transformer.pool.page_size)

    @staticmethod
    def _committed(tables: Sequence[tuple[PageTable, int]]) -> int:
        """Pages that some tables hold together and may still need; each table comes with its number of pages at the end."""
        holders = Counter(page for table, _ in tables for page in table.pages)
        more = 0
        for table, pages in tables:
            partly = bool(table.length % table.pool.page_size) and holders[table.pages[-1]] > 1
            more += pages - len(table.pages) + partly
        return len(holders) + more

    def _make_room(self, tables: Iterable[PageTable], count: int) -> None:
        """Evict from the prefix cache until each table has room for `count` more tokens."""
        tables = list(tables)
        pool = self.loop.transformer.pool
        while sum(table.pages_needed(count) for table in tables) > pool.free and self.cache.evict():
            pass
