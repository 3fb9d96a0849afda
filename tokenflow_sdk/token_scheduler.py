"""Which answers take the next step: all of them, and one newcomer reads a piece of its prompt before.

Prompts are read one after another, in pieces, so that running answers wait for a piece at most, and a second question about the
same picture finds the first one's pages.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from tokenflow_sdk.config import UnderstanderConfig
from tokenflow_sdk.errors import PagesExhausted, PromptError
from tokenflow_sdk.kv_cache import PageTable
from tokenflow_sdk.prefix_cache import PrefixCache
from tokenflow_sdk.token_loop import TokenLoop, Turn

__all__ = ["TokenScheduler", "default_pages"]

CHUNK = 256
"""Tokens of a prompt in one step: what running answers wait for a newcomer between two tokens."""
DEFAULT_TURNS = 8
DEFAULT_TEXT = 512
"""Tokens of a question and its answer that the default pool has room for, eight times."""


def default_pages(config: UnderstanderConfig, page_size: int) -> int:
    """A pool for eight questions about eight pictures."""
    return DEFAULT_TURNS * -(-min(config.image_tokens + DEFAULT_TEXT, config.context) // page_size)


class TokenScheduler:
    """Turns over one loop. Not safe for several threads: its owner locks.

    A turn begins when its worst case fits beside those of all live ones, so a step never runs out of pages: what only the
    prefix cache holds counts as free, and is given back when it is needed.
    """

    def __init__(self, loop: TokenLoop) -> None:
        self.loop = loop
        self.cache = PrefixCache()
        self._waiting: deque[Turn] = deque()
        self._live: list[Turn] = []

    def check(self, turn: Turn) -> None:
        """Whether a turn could ever be taken.

        Raises:
            PromptError: prompt and answer are longer than the model reads.
            PagesExhausted: it would not fit even alone.
        """
        pool, config = self.loop.transformer.pool, self.loop.config
        total = len(turn.prompt) + turn.params.max_tokens
        if total > config.context:
            raise PromptError(
                f"Pictures and text have {len(turn.prompt)} tokens, and max_tokens={turn.params.max_tokens} more make {total}; "
                f"this model reads {config.context}.",
                "Shorten the conversation, give fewer pictures, or a smaller max_tokens.",
            )
        if self._pages(turn) > pool.pages:
            raise PagesExhausted(self._pages(turn), pool.pages, pool.pages)

    def submit(self, turn: Turn) -> None:
        """Take a turn. Errors as in `check`."""
        self.check(turn)
        self._waiting.append(turn)

    def remove(self, turn: Turn) -> None:
        """Forget a turn and free its pages; its tokens stay. A finished one has been forgotten already."""
        if turn in self._live:
            self._live.remove(turn)
            if turn.table is not None:
                turn.table.release()
        elif turn in self._waiting:
            self._waiting.remove(turn)

    def step(self) -> None:
        """Read a piece of the oldest unread prompt, then add a token to every answer that has begun."""
        if all(turn.pending is None for turn in self._live):
            self._admit()
        for turn in [turn for turn in self._live if turn.pending is not None]:
            self._run([turn], self._prefill)
        answering, most = [turn for turn in self._live if turn.pending is None], self.loop.transformer.max_rows
        for start in range(0, len(answering), most):
            self._run(answering[start : start + most], self._decode)

    def _admit(self) -> None:
        """Begin the turn that has waited longest, if it fits."""
        if not self._waiting:
            return
        turn = self._waiting[0]
        digests = [digest for _, digest in reversed(turn.prompt.points)]
        table = self.cache.find(digests) or PageTable(self.loop.transformer.pool)
        live = [(other.table, self._pages(other)) for other in self._live if other.table is not None]
        if self._committed([*live, (table, self._pages(turn))]) > table.pool.pages:
            table.release()
            return
        turn.table = table
        self._live.append(self._waiting.popleft())
        self._run([turn], lambda _: self.loop.begin(turn, table))

    def _prefill(self, turns: Sequence[Turn]) -> None:
        (turn,) = turns
        assert turn.table is not None
        read, count = turn.table.length, min(CHUNK, turn.unread)
        self._make_room([turn.table], count)
        self.loop.prefill(turn, count)
        for length, digest in turn.prompt.points:
            if read < length <= turn.table.length:
                self.cache.put(digest, turn.table, length)

    def _decode(self, turns: Sequence[Turn]) -> None:
        self._make_room([turn.table for turn in turns if turn.table is not None], 1)
        self.loop.decode(turns)

    def _run(self, turns: Sequence[Turn], work: Callable[[Sequence[Turn]], None]) -> None:
        """Do a part of a step. Those it was for leave when they are done, or with the error when it fails; others go on."""
        try:
            work(turns)
        except BaseException as error:
            for turn in turns:
                turn.error = error
                self.remove(turn)
            if not isinstance(error, Exception):
                raise
            return
        for turn in turns:
            if turn.finish is not None:
                self._keep(turn)
                self.remove(turn)

    def _keep(self, turn: Turn) -> None:
        if turn.keep and turn.table is not None:
            length, digest = turn.history.points[-1]
            self.cache.put(digest, turn.table, length)

    def _pages(self, turn: Turn) -> int:
        """Pages of a turn by its end at most."""
        return -(-turn.most_stored // self.loop.transformer.pool.page_size)

    @staticmethod
    def _committed(tables: Sequence[tuple[PageTable, int]]) -> int:
        """Pages that some live tables hold together and may still ask for, given how many each has by its end."""
        holders = Counter(page for table, _ in tables for page in table.pages)
        more = 0
        for table, pages in tables:
            partly = bool(table.length % table.pool.page_size) and holders[table.pages[-1]] > 1
            more += pages - len(table.pages) + partly
        return len(holders) + more

    def _make_room(self, tables: Iterable[PageTable], count: int) -> None:
        """Give back what only the cache holds until `count` more tokens fit each table."""
        tables = list(tables)
        pool = self.loop.transformer.pool
        while sum(table.needs(count) for table in tables) > pool.free and self.cache.evict():
            pass
