"""Schedules images: each step samples one pass of one scale, for some images of one request and of others of about its size.

The request with the least work left goes first (`LeastWorkFirst`), and a step is small, so a small newcomer waits for hardly
more than the step that is running. First scales take no step of the transformer and go before everything, so that each request
has a preview at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.errors import PagesExhausted
from tokenflow_sdk.generation.scale_loop import ImageState, Prefix, ScaleLoop
from tokenflow_sdk.loaded_model import Progress
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.sampling import SamplingParams
from tokenflow_sdk.scheduling import LeastWorkFirst, WaitingQueue

__all__ = ["STEP_TOKENS", "ImageRequest", "ScaleScheduler"]

STEP_TOKENS = 1024
"""Most tokens in a step of several images, which bounds how long a newcomer waits for the one that is running."""

COMPANY = 2
"""Requests that have at most so many times the work left of the one whose step it is take part in it."""


@dataclass(eq=False)
class ImageRequest:
    """Some images of one prompt. `images` is filled when the request is admitted to the pool."""

    prompt: tuple[int, ...]
    negative: tuple[int, ...]
    params: SamplingParams
    n: int
    images: list[ImageState] = field(default_factory=list)
    began: float = field(default_factory=perf_counter)
    timings: list[float] = field(default_factory=list)
    """Seconds from `began` to the end of each scale."""
    progress: Progress = field(default_factory=Progress)
    error: BaseException | None = None
    """What a step for this request raised; it cannot go on."""

    @property
    def scale(self) -> int:
        """Scales sampled so far for all images."""
        return min((image.scale for image in self.images), default=0)

    def reached(self, count: int) -> bool:
        """Whether `count` scales are sampled."""
        # The last image's codes are there before the time.
        return len(self.timings) >= count


class ScaleScheduler:
    """Admits requests to the pool and runs them on one loop. `check` may be called from any thread,
    everything else by one thread at a time.

    A request is admitted when the pages it can need at most fit beside those of all live requests, so a step never runs out
    of pages.
    """

    def __init__(self, loop: ScaleLoop) -> None:
        self.loop = loop
        self._waiting = WaitingQueue(self._left)
        self._live: list[ImageRequest] = []
        self._order: LeastWorkFirst[ImageRequest] = LeastWorkFirst()
        self._negative: dict[tuple[int, ...], Prefix] = {}

    def _needs(self, request: ImageRequest) -> int:
        """Pages that a request holds at most, without those of its negative prompt, which requests share."""
        config, size = self.loop.config, self.loop.transformer.pool.page_size
        return self._prefix_pages(request.prompt) + request.n * request.params.rows * config.image_pages(size) // 2

    def check(self, request: ImageRequest) -> None:
        """Raise if a request could never run.

        Raises:
            PagesExhausted: it needs more pages than the pool has.
        """
        pool = self.loop.transformer.pool
        needed = self._needs(request) + self._negative_pages([request])
        if needed > pool.pages:
            raise PagesExhausted(needed, pool.pages, pool.pages)

    def submit(self, request: ImageRequest) -> None:
        """Queue a request. Errors as in `check`."""
        self.check(request)
        self._waiting.put(request)

    def remove(self, request: ImageRequest) -> None:
        """Drop a request and free its pages; its codes stay. Dropping a finished request does nothing."""
        if request in self._live:
            self._live.remove(request)
            for image in request.images:
                image.release()
        else:
            self._waiting.remove(request)

    def kept(self) -> list[PageTable]:
        """The prefixes of negative prompts, which other requests may share."""
        return [prefix.table for prefix in list(self._negative.values())]

    def step(self) -> None:
        """Admit the requests that fit, then sample one pass of some images."""
        while (request := self._waiting.take(self._fits)) is not None:
            self._run([request], partial(self._admit, request))
        if not self._live:
            return
        chosen = self._order.next(
            self._live,
            left=lambda request: self._left(request) if request.scale else 0,
            step=lambda request: len(self._next_images([request])) * self.loop.config.scales.counts[request.scale],
        )
        most = COMPANY * self._left(chosen)
        company = sorted((other for other in self._live if other is not chosen and self._left(other) <= most), key=self._left)
        group = self._next_images([chosen, *company])
        requests = list(dict.fromkeys(request for request, _ in group))
        self._run(requests, lambda: self.loop.sample_pass([image for _, image in group]))
        for request, image in group:
            if image.error is not None and request.error is None:
                request.error = image.error
                self.remove(request)
        for request in requests:
            request.timings += [perf_counter() - request.began] * (request.scale - len(request.timings))
            if request.scale == len(self.loop.config.patch_nums):
                self.remove(request)

    def _next_images(self, requests: Sequence[ImageRequest]) -> list[tuple[ImageRequest, ImageState]]:
        """The images of the first request's next step, and with them those of the others at the same pass of the same scale
        that have as many rows.
        """
        first = min(requests[0].images, key=lambda image: image.position)
        position, rows = first.position, len(first.prefixes)
        tokens = rows * self.loop.config.scales.counts[position[0]]
        most = max(1, min(STEP_TOKENS // tokens, self.loop.transformer.max_rows // rows))
        images = [(request, image) for request in requests for image in request.images]
        return [each for each in images if (each[1].position, len(each[1].prefixes)) == (position, rows)][:most]

    def _left(self, request: ImageRequest) -> int:
        """Work left: codes that are still to be sampled, each as often as it has passes."""
        counts, passes = self.loop.config.scales.counts, len(request.params.passes)
        positions = [image.position for image in request.images] or [(0, 0)] * request.n
        return sum(passes * sum(counts[scale:]) - done * sum(counts[scale : scale + 1]) for scale, done in positions)

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
        together = [*self._live, request]
        promised = sum(map(self._needs, together)) + self._negative_pages(together)
        return promised <= self.loop.transformer.pool.pages

    def _negative_pages(self, requests: Sequence[ImageRequest]) -> int:
        """Pages of the negative prompts of requests, which those without guidance do not read."""
        return sum(map(self._prefix_pages, {request.negative for request in requests if request.params.rows == 2}))

    def _forget_negatives(self, keep: tuple[int, ...]) -> None:
        """Free the prefixes of negative prompts that no live request uses, except `keep`."""
        used = {request.negative for request in self._live if request.params.rows == 2} | {keep}
        for ids in [ids for ids in self._negative if ids not in used]:
            self._negative.pop(ids).table.release()

    def _admit(self, request: ImageRequest) -> None:
        self._forget_negatives(request.negative)
        if request.params.rows == 2 and request.negative not in self._negative:
            self._negative[request.negative] = self.loop.prefill(request.negative)
        prefix = self.loop.prefill(request.prompt)
        negative = self._negative[request.negative] if request.params.rows == 2 else None
        try:
            request.images = [self.loop.start(request.params, i, prefix, negative) for i in range(request.n)]
        finally:
            prefix.table.release()
        self._live.append(request)
