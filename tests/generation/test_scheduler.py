"""The scheduler on a loop without a model: which images take which step, and who holds how many pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_graphs import GENERATOR
from tokenflow_sdk.errors import BackendError, NotFiniteError, PagesExhausted
from tokenflow_sdk.generation.scale_loop import ImageState, Prefix, ScaleLoop
from tokenflow_sdk.generation.scheduler import PATIENCE, ImageRequest, ScaleScheduler
from tokenflow_sdk.model.kv_cache import PagePool, PageTable
from tokenflow_sdk.model.sampling import SamplingParams

CONFIG = replace(GENERATOR, patch_nums=(1, 2, 3, 4))
SCALES = len(CONFIG.patch_nums)
PARAMS = SamplingParams()
HIDDEN = np.zeros(2, np.float32)


class FakeLoop:
    """Takes the pages that the real one takes, and writes down what it was asked for."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.config = CONFIG
        self.transformer = SimpleNamespace(pool=PagePool(pages, page_size))
        self.prompts: list[tuple[int, ...]] = []
        self.steps: list[list[ImageState]] = []
        self.failing: Callable[[Any], BaseException | None] = lambda what: None
        self.wrong: Callable[[ImageState], NotFiniteError | None] = lambda image: None

    def prefill(self, ids: Sequence[int]) -> Prefix:
        self._fail(ids)
        self.prompts.append(tuple(ids))
        table = PageTable(self.transformer.pool)
        table.append(len(ids) + 1 + len(CONFIG.image_start_ids))
        return Prefix(table, HIDDEN)

    def start(self, params: SamplingParams, number: int, conditional: Prefix, unconditional: Prefix) -> ImageState:
        forks = [Prefix(prefix.table.fork(), HIDDEN) for prefix in (conditional, unconditional)]
        return ImageState(params, number, forks[0], forks[1], HIDDEN)

    def sample_scale(self, images: Sequence[ImageState]) -> None:
        scale = images[0].scale
        assert {image.scale for image in images} == {scale}
        self._fail(images)
        self.steps.append(list(images))
        for image in images:
            image.error = self.wrong(image)
            for prefix in (image.conditional, image.unconditional):
                # Neither the first scale nor the last leaves keys behind.
                prefix.table.append(CONFIG.scales.counts[scale] if 0 < scale < SCALES - 1 else 0)
            image.codes.append(np.zeros(CONFIG.scales.counts[scale], np.int32))

    def _fail(self, what: Any) -> None:
        error = self.failing(what)
        if error is not None:
            raise error


def make(pages: int, page_size: int = 4) -> tuple[ScaleScheduler, FakeLoop]:
    loop = FakeLoop(pages, page_size)
    return ScaleScheduler(cast(ScaleLoop, loop)), loop


def request(prompt: int = 2, negative: Sequence[int] = (9,), n: int = 1) -> ImageRequest:
    """For a prompt of so many tokens."""
    return ImageRequest((5,) * prompt, tuple(negative), PARAMS, n)


def drain(scheduler: ScaleScheduler, *requests: ImageRequest) -> None:
    for _ in range(10_000):
        if all(r.reached(SCALES) or r.error for r in requests):
            return
        scheduler.step()
    raise AssertionError("somebody starves")


def negative_pages(scheduler: ScaleScheduler) -> int:
    return len({page for prefix in scheduler._negative.values() for page in prefix.table.pages})


def is_clean(scheduler: ScaleScheduler) -> bool:
    pool = scheduler.loop.transformer.pool
    return not scheduler._live and not scheduler._waiting and pool.free == pool.pages - negative_pages(scheduler)


def drawn(loop: FakeLoop, *requests: ImageRequest) -> list[list[int]]:
    """Of each step the numbers of the requests that took it."""
    owners = {id(image): number for number, r in enumerate(requests) for image in r.images}
    return [sorted({owners[id(image)] for image in images}) for images in loop.steps]


def test_requests_at_one_scale_share_steps() -> None:
    scheduler, loop = make(200)
    requests = [request(n=1), request(n=3), request(n=2)]
    for r in requests:
        scheduler.submit(r)
    drain(scheduler, *requests)
    assert drawn(loop, *requests) == [[0, 1, 2]] * SCALES
    assert [len(images) for images in loop.steps] == [6] * SCALES
    assert [[image.number for image in r.images] for r in requests] == [[0], [0, 1, 2], [0, 1]]
    assert is_clean(scheduler)


def test_the_newest_go_first_and_catch_up() -> None:
    scheduler, loop = make(200)
    old, new = request(), request()
    scheduler.submit(old)
    scheduler.step()
    scheduler.step()
    scheduler.submit(new)
    assert (old.scale, new.scale) == (2, 0)
    scheduler.step()
    assert (old.scale, new.scale) == (2, 1)
    drain(scheduler, old, new)
    assert drawn(loop, old, new) == [[0], [0], [1], [1], [0, 1], [0, 1]]
    assert [old.waited, new.waited] == [0, 0]


def test_nobody_is_passed_over_more_than_patience_allows() -> None:
    """One old request, and newcomers without end at a coarser scale."""
    scheduler, loop = make(200)
    old = request()
    scheduler.submit(old)
    for _ in range(SCALES - 1):
        scheduler.step()
    steps = 0
    while not old.reached(SCALES):
        newcomer = request()
        scheduler.submit(newcomer)
        scheduler.step()
        steps += 1
        scheduler.remove(newcomer)
    assert steps == PATIENCE + 1
    assert loop.steps[-1] == old.images
    assert is_clean(scheduler)


def test_waiting_requests_are_admitted_in_order_and_never_overtaken() -> None:
    """The second does not fit beside the first; the third would, and waits its turn all the same."""
    scheduler, loop = make(60)
    pages = CONFIG.image_pages(4)
    first, large, small = request(n=2), request(n=60 // pages - 1), request()
    for r in (first, large, small):
        scheduler.submit(r)
    scheduler.step()
    assert [bool(r.images) for r in (first, large, small)] == [True, False, False]
    drain(scheduler, first, large, small)
    order = drawn(loop, first, large, small)
    assert order[:SCALES] == [[0]] * SCALES
    assert order[SCALES][0] == 1
    assert is_clean(scheduler)


def test_pages_are_promised_for_a_whole_life() -> None:
    """A request is let in when the worst case of all fits, so no step ever runs out of pages."""
    alone = 1 + CONFIG.image_pages(4)
    for pages, together in ((1 + 2 * alone - 1, 1), (1 + 2 * alone, 2)):
        scheduler, loop = make(pages)
        first, second = request(), request()
        scheduler.submit(first)
        scheduler.submit(second)
        scheduler.step()
        assert len(loop.steps[0]) == together
        drain(scheduler, first, second)
        assert is_clean(scheduler)


def test_a_request_that_fits_nowhere_says_how_many_pages_it_needs() -> None:
    needed = 2 + 1 + 3 * CONFIG.image_pages(4)
    scheduler, _ = make(needed - 1)
    # BOS, four tokens and the image start fill two pages, the negative prompt one.
    too_much = request(prompt=4, n=3)
    for take in (scheduler.check, scheduler.submit):
        with pytest.raises(PagesExhausted) as caught:
            take(too_much)
        assert (caught.value.needed, caught.value.total) == (needed, needed - 1)
    assert is_clean(scheduler)
    scheduler, _ = make(needed)
    scheduler.submit(too_much)
    drain(scheduler, too_much)
    assert is_clean(scheduler)


def test_a_negative_prompt_is_run_once_for_all_who_share_it() -> None:
    scheduler, loop = make(200)
    requests = [request(prompt=n, negative=(9, 9)) for n in (1, 2, 3)]
    for r in requests:
        scheduler.submit(r)
        scheduler.step()
    assert loop.prompts.count((9, 9)) == 1
    drain(scheduler, *requests)
    later = request(negative=(9, 9))
    scheduler.submit(later)
    drain(scheduler, later)
    assert loop.prompts.count((9, 9)) == 1
    pool = loop.transformer.pool
    assert pool.free == pool.pages - 1


def test_a_negative_prompt_that_nobody_uses_gives_its_pages_to_the_next_request() -> None:
    scheduler, _ = make(200)
    for number in range(5):
        r = request(negative=(9,) * (number + 1))
        scheduler.submit(r)
        drain(scheduler, r)
        assert list(scheduler._negative) == [r.negative]
    assert is_clean(scheduler)
    # Those that live requests use stay.
    first, second = request(negative=(1,)), request(negative=(2,))
    for r in (first, second):
        scheduler.submit(r)
        scheduler.step()
    assert set(scheduler._negative) == {(1,), (2,)}


def test_two_negative_prompts_count_twice() -> None:
    alone = 1 + CONFIG.image_pages(4)
    for negative, pages, together in (((9,), 1 + 2 * alone, 2), ((8,), 1 + 2 * alone, 1), ((8,), 2 + 2 * alone, 2)):
        scheduler, loop = make(pages)
        first, second = request(), request(negative=negative)
        scheduler.submit(first)
        scheduler.submit(second)
        scheduler.step()
        assert len(loop.steps[0]) == together, (negative, pages)


def test_removing_a_waiting_request_forgets_it() -> None:
    scheduler, _ = make(1 + 1 + CONFIG.image_pages(4))
    first, second, third = (request() for _ in range(3))
    for r in (first, second, third):
        scheduler.submit(r)
    scheduler.step()
    scheduler.remove(second)
    drain(scheduler, first, third)
    assert (second.images, second.reached(1)) == ([], False)
    assert is_clean(scheduler)


def test_removing_a_live_request_frees_its_pages_and_leaves_its_codes() -> None:
    scheduler, _ = make(100)
    gone, stays = request(n=2), request()
    for r in (gone, stays):
        scheduler.submit(r)
    for _ in range(3):
        scheduler.step()
    scheduler.remove(gone)
    assert [image.scale for image in gone.images] == [3, 3]
    assert all(not prefix.table.pages for image in gone.images for prefix in (image.conditional, image.unconditional))
    drain(scheduler, stays)
    # Finished and removed ones are unknown by now; removing them again changes nothing.
    for r in (gone, stays):
        scheduler.remove(r)
    assert is_clean(scheduler)


def test_without_requests_a_step_does_nothing() -> None:
    scheduler, loop = make(10)
    scheduler.step()
    assert (loop.steps, loop.prompts) == ([], [])


def test_the_error_of_a_group_stays_with_the_group() -> None:
    """Whoever runs the step: a request at another scale goes on."""
    scheduler, loop = make(200)
    old, first, second = request(), request(), request(n=2)
    scheduler.submit(old)
    scheduler.step()
    scheduler.submit(first)
    scheduler.submit(second)
    error = BackendError("No memory.", "Free some.")
    loop.failing = lambda what: error if what and what == [*first.images, *second.images] else None
    scheduler.step()
    assert [old.error, first.error, second.error] == [None, error, error]
    assert scheduler._live == [old]
    loop.failing = lambda what: None
    drain(scheduler, old)
    assert old.reached(SCALES)
    assert is_clean(scheduler)


def test_the_error_of_a_prompt_stays_with_its_request() -> None:
    scheduler, loop = make(200)
    good, bad, next_one = request(prompt=1), request(prompt=3), request(prompt=2)
    for r in (good, bad, next_one):
        scheduler.submit(r)
    error = BackendError("No memory.", "Free some.")
    loop.failing = lambda what: error if what == bad.prompt else None
    scheduler.step()
    assert [good.error, bad.error, next_one.error] == [None, error, None]
    drain(scheduler, good, next_one)
    assert good.reached(SCALES)
    assert next_one.reached(SCALES)
    assert is_clean(scheduler)


def test_whatever_a_step_raises_stays_with_its_requests() -> None:
    """Steps run on a thread of the model's own, where nothing but its requests could take it."""
    scheduler, loop = make(200)
    r = request()
    scheduler.submit(r)
    loop.failing = lambda what: SystemExit()
    scheduler.step()
    assert isinstance(r.error, SystemExit)
    assert is_clean(scheduler)


@dataclass
class Oracle:
    """The scheduler's rules over plain lists; requests are their numbers, `scale` and `waited` say how far they are."""

    pages: int
    page_size: int
    requests: list[ImageRequest] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    scale: dict[int, int] = field(default_factory=dict)
    waited: dict[int, int] = field(default_factory=dict)
    steps: list[list[int]] = field(default_factory=list)

    def pages_for(self, tokens: int) -> int:
        return (tokens + self.page_size - 1) // self.page_size

    def promised(self, numbers: Sequence[int]) -> int:
        """Prompts, images, and each different negative prompt once."""
        total = 0
        for number in numbers:
            r = self.requests[number]
            total += self.pages_for(len(r.prompt) + 2)
            # Two rows: keys of all scales but the first and the last, a copied page before them, a broken one behind.
            total += r.n * 2 * (self.pages_for(sum(side**2 for side in CONFIG.patch_nums[1:-1])) + 2)
        return total + sum(self.pages_for(len(ids) + 2) for ids in {self.requests[i].negative for i in numbers})

    def step(self) -> None:
        while self.waiting and self.promised([*self.live, self.waiting[0]]) <= self.pages:
            number = self.waiting.pop(0)
            self.live.append(number)
            self.scale[number] = self.waited[number] = 0
        if not self.live:
            return
        coarsest = min(self.scale[i] for i in self.live)
        longest = max(self.waited[i] for i in self.live)
        if longest >= PATIENCE:
            coarsest = next(self.scale[i] for i in self.live if self.waited[i] == longest)
        group = [i for i in self.live if self.scale[i] == coarsest]
        self.steps.append(group)
        for i in list(self.live):
            self.waited[i] = 0 if i in group else self.waited[i] + 1
            self.scale[i] += i in group
            if self.scale[i] == SCALES:
                self.live.remove(i)

    def remove(self, number: int) -> None:
        for queue in (self.waiting, self.live):
            if number in queue:
                queue.remove(number)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_of_requests_takes_the_steps_that_the_rules_say(data: st.DataObject) -> None:
    page_size, pages = data.draw(st.integers(1, 7)), data.draw(st.integers(40, 160))
    scheduler, loop = make(pages, page_size)
    pool, oracle = loop.transformer.pool, Oracle(pages, page_size)
    choices = st.sampled_from(["submit", "remove", "step", "step", "step", "many"])
    for choice in data.draw(st.lists(choices, min_size=20, max_size=80)):
        if choice == "submit":
            negative = data.draw(st.sampled_from([(9,), (8,) * 5, (7,) * 6]))
            r = request(data.draw(st.integers(1, 6)), negative, data.draw(st.integers(1, 3)))
            number = len(oracle.requests)
            oracle.requests.append(r)
            if oracle.promised([number]) > pages:
                with pytest.raises(PagesExhausted):
                    scheduler.submit(r)
                continue
            scheduler.submit(r)
            oracle.waiting.append(number)
        elif choice == "remove" and oracle.requests:
            number = data.draw(st.integers(0, len(oracle.requests) - 1))
            scheduler.remove(oracle.requests[number])
            oracle.remove(number)
        else:
            # Many, so that patience ends now and then.
            for _ in range(40 if choice == "many" else 1):
                scheduler.step()
                oracle.step()
        live = [oracle.requests[i] for i in oracle.live]
        assert scheduler._live == live
        tables = [prefix.table for r in live for image in r.images for prefix in (image.conditional, image.unconditional)]
        held = {page for table in tables for page in table.pages}
        negatives = {page for prefix in scheduler._negative.values() for page in prefix.table.pages}
        assert pool.free == pool.pages - len(held | negatives)
        assert len(held) <= oracle.promised(oracle.live)
    assert drawn(loop, *oracle.requests) == [sorted(group) for group in oracle.steps]
    for number, r in enumerate(oracle.requests):
        assert r.scale == oracle.scale.get(number, 0)
        scheduler.remove(r)
    assert is_clean(scheduler)


def test_a_request_is_as_far_as_its_last_image() -> None:
    """A step may be split between its images, and is asked about in the middle."""
    r = request(n=2)
    r.images = [SimpleNamespace(scale=3), SimpleNamespace(scale=2)]  # type: ignore[list-item]
    assert r.scale == 2
    assert not r.reached(3)


def test_a_request_with_an_image_that_cannot_go_on_leaves_with_its_error() -> None:
    scheduler, loop = make(300)
    requests = [request(n=1), request(n=3), request(n=2)]
    for r in requests:
        scheduler.submit(r)
    scheduler.step()
    error = NotFiniteError("It broke.", "Mend it.")
    loop.wrong = lambda image: error if image is requests[1].images[2] else None
    drain(scheduler, *requests)
    assert [r.error for r in requests] == [None, error, None]
    assert drawn(loop, *requests) == [[0, 1, 2]] * 2 + [[0, 2]] * 2
    assert is_clean(scheduler)
