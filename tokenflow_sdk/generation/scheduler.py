"""Schedules images: each step samples one scale for all live requests that are at the same scale.

The group at the coarsest scale goes first, because coarse scales are cheap: a new request gets its first preview before
anybody else's fine scale, and catches up with the others to share their steps. A request that was passed over `PATIENCE` times
goes first nevertheless.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.errors import PagesExhausted
from tokenflow_sdk.generation.scale_loop import ImageState, Prefix, ScaleLoop
from tokenflow_sdk.loaded_model import Progress
from tokenflow_sdk.model.sampling import SamplingParams

__all__ = ["ImageRequest", "ScaleScheduler"]

PATIENCE = 32
"""Steps for which a live request is passed over at most."""


@dataclass(eq=False)
class ImageRequest:
    """Some images of one prompt. `images` is filled when the request is admitted to the pool."""

    prompt: tuple[int, ...]
    negative: tuple[int, ...]
    params: SamplingParams
    n: int
    images: list[ImageState] = field(default_factory=list)
    waited: int = 0
    progress: Progress = field(default_factory=Progress)
    error: BaseException | None = None
    """What a step for this request raised; it cannot go on."""

    @property
    def scale(self) -> int:
        """Scales sampled so far."""
        return min((image.scale for image in self.images), default=0)

    def reached(self, count: int) -> bool:
        """Whether `count` scales are sampled."""
        return self.scale >= count


class ScaleScheduler:
    """Admits requests to the pool and runs them on one loop. `check` may be called from any thread,
    everything else by one thread at a time.

    A request is admitted when the pages it can need at most fit beside those of all live requests, so a step never runs out
    of pages.
    """

    def __init__(self, loop: ScaleLoop) -> None:
        self.loop = loop
        self._waiting: deque[ImageRequest] = deque()
        self._live: list[ImageRequest] = []
        self._negative: dict[tuple[int, ...], Prefix] = {}

    def _needs(self, request: ImageRequest) -> int:
        """Pages that a request holds at most, without those of its negative prompt, which requests share."""
        config, size = self.loop.config, self.loop.transformer.pool.page_size
        return self._prefix_pages(request.prompt) + request.n * config.image_pages(size)

    def check(self, request: ImageRequest) -> None:
        """Raise if a request could never run.

        Raises:
            PagesExhausted: it needs more pages than the pool has.
        """
        pool = self.loop.transformer.pool
        needed = self._needs(request) + self._prefix_pages(request.negative)
        if needed > pool.pages:
            raise PagesExhausted(needed, pool.pages, pool.pages)

    def submit(self, request: ImageRequest) -> None:
        """Queue a request. Errors as in `check`."""
        self.check(request)
        self._waiting.append(request)

    def remove(self, request: ImageRequest) -> None:
        """Drop a request and free its pages; its codes stay. Dropping a finished request does nothing."""
        if request in self._live:
            self._live.remove(request)
            for image in request.images:
                image.release()
        elif request in self._waiting:
            self._waiting.remove(request)

    def step(self) -> None:
        """Admit the requests that fit, then sample one scale for one group."""
        while self._waiting and self._fits(self._waiting[0]):
            request = self._waiting.popleft()
            self._run([request], partial(self._admit, request))
        if not self._live:
            return
        newest = min(self._live, key=lambda request: request.scale)
        overdue = max(self._live, key=lambda request: request.waited)
        chosen = overdue if overdue.waited >= PATIENCE else newest
        group = [request for request in self._live if request.scale == chosen.scale]
        self._run(group, lambda: self.loop.sample_scale([image for request in group for image in request.images]))
        for request in group:
            if request.error is None and (errors := [image.error for image in request.images if image.error is not None]):
                request.error = errors[0]
                self.remove(request)
        for request in list(self._live):
            request.waited = 0 if request in group else request.waited + 1
            if request.scale == len(self.loop.config.patch_nums):
                self.remove(request)

    def _run(self, requests: Sequence[ImageRequest], work: Callable[[], None]) -> None:
        """Do a part of a step. Those it was for leave with the error when it fails; others go on."""
        try:
            work()
        except BaseException as error:
            for request in requests:
                request.error = error
                self.remove(request)

    def _prefix_pages(self, ids: tuple[int, ...]) -> int:
        return pages_for(len(ids) + 1 + len(self.loop.config.image_start_ids), self.loop.transformer.pool.page_size)

    def _fits(self, request: ImageRequest) -> bool:
        promised = sum(self._needs(other) for other in self._live) + self._needs(request)
        pool = self.loop.transformer.pool
        self._forget_negatives(request.negative)
        kept = {*self._negative, request.negative}
        return promised + sum(map(self._prefix_pages, kept)) <= pool.pages

    def _forget_negatives(self, keep: tuple[int, ...]) -> None:
        """Free the prefixes of negative prompts that no live request uses, except `keep`."""
        used = {request.negative for request in self._live} | {keep}
        for ids in [ids for ids in self._negative if ids not in used]:
            self._negative.pop(ids).table.release()

    def _admit(self, request: ImageRequest) -> None:
        if request.negative not in self._negative:
            self._negative[request.negative] = self.loop.prefill(request.negative)
        prefix = self.loop.prefill(request.prompt)
        negative = self._negative[request.negative]
        try:
            request.images = [self.loop.start(request.params, i, prefix, negative) for i in range(request.n)]
        finally:
            prefix.table.release()
        self._live.append(request)
