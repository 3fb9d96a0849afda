"""Which pictures take the next step: live requests at the same scale go together, newcomers first.

Coarse scales are cheap, so the group at the coarsest scale goes first: a newcomer sees its first preview before anyone's fine
scale, and catches up with the others to share their steps. A request that was passed over too often goes first nevertheless.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.errors import PagesExhausted
from tokenflow_sdk.sampling import SamplingParams
from tokenflow_sdk.scale_loop import Picture, Prefix, ScaleLoop

__all__ = ["PAGE_SIZE", "Request", "Scheduler", "default_pages", "pages_of_picture"]

PAGE_SIZE = 16
"""Tokens in a page unless told otherwise."""
DEFAULT_IMAGES = 8
PATIENCE = 32
"""Steps of others that a request lets pass at most."""


def pages_of_picture(config: GeneratorConfig, page_size: int) -> int:
    """Most pages that one picture's two rows take beyond their prefixes, with a copied page each."""
    stored = config.place(len(config.patch_nums) - 1) - 1
    return 2 * (-(-stored // page_size) + 2)


def default_pages(config: GeneratorConfig, page_size: int) -> int:
    """A pool for eight pictures of eight prompts of any length, and one negative prompt."""
    prefix = -(-(config.prefix_length + 1) // page_size)
    return DEFAULT_IMAGES * (pages_of_picture(config, page_size) + prefix) + prefix


@dataclass(eq=False)
class Request:
    """Some pictures of one prompt. `pictures` exist once it has been admitted to the pool."""

    prompt: tuple[int, ...]
    negative: tuple[int, ...]
    params: SamplingParams
    n: int
    pictures: list[Picture] = field(default_factory=list)
    waited: int = 0
    error: BaseException | None = None
    """Why it cannot go on: a step that it shared failed."""

    @property
    def scale(self) -> int:
        """Scales drawn so far."""
        return self.pictures[0].scale if self.pictures else 0


class Scheduler:
    """Requests over one loop. Not safe for several threads: its owner locks.

    Pages are promised before a request begins, for its whole life, so that a step never runs out of them.
    """

    def __init__(self, loop: ScaleLoop) -> None:
        self.loop = loop
        self._waiting: deque[Request] = deque()
        self._live: list[Request] = []
        self._negative: dict[tuple[int, ...], Prefix] = {}

    def _needs(self, request: Request) -> int:
        """Pages promised to a request: its prompt's and its pictures'; the negative prompt's are counted apart."""
        config, size = self.loop.config, self.loop.transformer.pool.page_size
        return self._prefix_pages(request.prompt) + request.n * pages_of_picture(config, size)

    def submit(self, request: Request) -> None:
        """Take a request.

        Raises:
            PagesExhausted: it would not fit even alone.
        """
        pool = self.loop.transformer.pool
        needed = self._needs(request) + self._prefix_pages(request.negative)
        if needed > pool.pages:
            raise PagesExhausted(needed, pool.free, pool.pages)
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request and free its pages; its codes stay. A finished request has been forgotten already."""
        if request in self._live:
            self._live.remove(request)
            for picture in request.pictures:
                picture.release()
        elif request in self._waiting:
            self._waiting.remove(request)

    def step(self) -> None:
        """Admit what fits, then draw one scale for one group."""
        while self._waiting and self._fits(self._waiting[0]):
            self._admit(self._waiting.popleft())
        if not self._live:
            return
        newest = min(self._live, key=lambda request: request.scale)
        overdue = max(self._live, key=lambda request: request.waited)
        chosen = overdue if overdue.waited >= PATIENCE else newest
        group = [request for request in self._live if request.scale == chosen.scale]
        try:
            self.loop.draw_scale([picture for request in group for picture in request.pictures])
        except BaseException as error:
            for request in group:
                request.error = error
                self.remove(request)
            raise
        for request in list(self._live):
            request.waited = 0 if request in group else request.waited + 1
            if request.scale == len(self.loop.config.patch_nums):
                self.remove(request)

    def _prefix_pages(self, ids: tuple[int, ...]) -> int:
        size = self.loop.transformer.pool.page_size
        return -(-(len(ids) + 1 + len(self.loop.config.image_start_ids)) // size)

    def _fits(self, request: Request) -> bool:
        promised = sum(self._needs(other) for other in self._live) + self._needs(request)
        pool = self.loop.transformer.pool
        self._forget_negatives(request.negative)
        kept = {*self._negative, request.negative}
        return promised + sum(map(self._prefix_pages, kept)) <= pool.pages

    def _forget_negatives(self, keep: tuple[int, ...]) -> None:
        """Free negative prompts that no live request uses."""
        used = {request.negative for request in self._live} | {keep}
        for ids in [ids for ids in self._negative if ids not in used]:
            self._negative.pop(ids).table.release()

    def _admit(self, request: Request) -> None:
        if request.negative not in self._negative:
            self._negative[request.negative] = self.loop.prefill(request.negative)
        prefix = self.loop.prefill(request.prompt)
        negative = self._negative[request.negative]
        request.pictures = [self.loop.picture(request.params, i, prefix, negative) for i in range(request.n)]
        prefix.table.release()
        self._live.append(request)
