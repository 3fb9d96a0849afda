"""The scheduler on a loop without a model: which images take which step, and who holds how many pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_graphs import GENERATOR
from tokenflow_sdk.errors import BackendError, NotFiniteError, PagesExhausted
from tokenflow_sdk.generation.scale_loop import ImageState, Prefix, ScaleLoop
from tokenflow_sdk.generation.scheduler import COMPANY, STEP_TOKENS, ImageRequest, ScaleScheduler
from tokenflow_sdk.model.kv_cache import PagePool, PageTable
from tokenflow_sdk.model.sampling import Pass, SamplingParams
from tokenflow_sdk.scheduling import PATIENCE

CONFIG = replace(GENERATOR, patch_nums=(1, 2, 3, 4))
SCALES = len(CONFIG.patch_nums)
WORK = sum(CONFIG.scales.counts)
"""Of an image with one pass."""
HIDDEN = np.zeros(2, np.float32)


class FakeLoop:
    """Takes the pages that the real one takes, and writes down what it was asked for."""

    def __init__(self, pages: int, page_size: int, rows: int) -> None:
        self.config = CONFIG
        self.transformer = SimpleNamespace(pool=PagePool(pages, page_size), max_rows=rows)
        self.prompts: list[tuple[int, ...]] = []
        self.steps: list[list[ImageState]] = []
        self.work: list[int] = []
        """Codes that each step sampled."""
        self.failing: Callable[[Any], BaseException | None] = lambda what: None
        self.wrong: Callable[[ImageState], NotFiniteError | None] = lambda image: None

    def prefill(self, ids: Sequence[int]) -> Prefix:
        self._fail(ids)
        self.prompts.append(tuple(ids))
        table = PageTable(self.transformer.pool)
        table.append(len(ids) + 1 + len(CONFIG.image_start_ids))
        return Prefix(table, HIDDEN)

    def start(self, params: SamplingParams, number: int, conditional: Prefix, unconditional: Prefix | None) -> ImageState:
        negative = unconditional and Prefix(unconditional.table.fork(), HIDDEN)
        return ImageState(params, number, Prefix(conditional.table.fork(), HIDDEN), negative, HIDDEN)

    def sample_pass(self, images: Sequence[ImageState]) -> None:
        scale, done = images[0].position
        assert {image.position for image in images} == {(scale, done)}
        self._fail(images)
        self.steps.append(list(images))
        self.work.append(len(images) * self.config.scales.counts[scale])
        for image in images:
            image.error = self.wrong(image)
            for prefix in image.prefixes:
                # Neither the first scale nor the last leaves keys behind, nor does a refinement pass.
                prefix.table.append(
                    self.config.scales.counts[scale] if 0 < scale < len(self.config.scales) - 1 and not done else 0
                )
            if scale and done + 1 < len(image.params.passes):
                image.refinement += 1
            else:
                image.refinement = 0
                image.codes.append(np.zeros(self.config.scales.counts[scale], np.int32))

    def _fail(self, what: Any) -> None:
        error = self.failing(what)
        if error is not None:
            raise error


def make(pages: int, page_size: int = 4, rows: int = 1000) -> tuple[ScaleScheduler, FakeLoop]:
    loop = FakeLoop(pages, page_size, rows)
    return ScaleScheduler(cast(ScaleLoop, loop)), loop


def request(
    prompt: int = 2, negative: Sequence[int] = (9,), n: int = 1, passes: int = 1, cfg_scale: float = 7.5
) -> ImageRequest:
    """For a prompt of so many tokens."""
    return ImageRequest((5,) * prompt, tuple(negative), SamplingParams((Pass(1, 0.0),) * passes, cfg_scale), n)


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


def test_requests_of_one_size_share_steps() -> None:
    scheduler, loop = make(200)
    requests = [request(n=2), request(n=2), request(n=2)]
    for r in requests:
        scheduler.submit(r)
    drain(scheduler, *requests)
    assert drawn(loop, *requests) == [[0, 1, 2]] * SCALES
    assert [len(images) for images in loop.steps] == [6] * SCALES
    assert [[image.number for image in r.images] for r in requests] == [[0, 1]] * 3
    assert is_clean(scheduler)


def test_a_small_request_does_not_take_a_large_one_along() -> None:
    """Each has its first scale at once, which is a preview; then the small one runs alone, with those of about its size."""
    scheduler, loop = make(200)
    large, small, double = request(n=2 * COMPANY + 1), request(), request(n=COMPANY)
    for r in (large, small, double):
        scheduler.submit(r)
    drain(scheduler, large, small, double)
    assert drawn(loop, large, small, double) == [[1, 2], [0]] + [[1, 2]] * (SCALES - 1) + [[0]] * (SCALES - 1)
    assert [r.scale for r in (large, small, double)] == [SCALES] * 3
    assert is_clean(scheduler)


def test_whoever_has_the_least_work_left_goes_first() -> None:
    scheduler, loop = make(200)
    old, new = request(), request()
    scheduler.submit(old)
    scheduler.step()
    scheduler.step()
    scheduler.submit(new)
    drain(scheduler, old, new)
    # The newcomer's preview costs nothing; then the old one is nearer to its end.
    assert drawn(loop, old, new) == [[0], [0], [1], [0], [0], [1], [1], [1]]


@pytest.mark.parametrize("passes", [1, 3])
def test_a_newcomer_never_waits_for_strangers_refinement_passes(passes: int) -> None:
    """Whenever it comes, what others do until its end is a part of its own work and a step at most."""
    own = 1 + passes * (WORK - 1)
    for arrival in range(1, 20, 3):
        scheduler, loop = make(400, rows=4)
        large, small = request(n=6, passes=3), request(passes=passes)
        scheduler.submit(large)
        for _ in range(arrival):
            scheduler.step()
        assert scheduler._left(large) > own
        begun = len(loop.steps)
        scheduler.submit(small)
        drain(scheduler, small)
        # Two images are the most that a step takes here, of at most 16 codes each.
        assert sum(loop.work[begun:]) - own <= own / PATIENCE + 2 * 16
        drain(scheduler, large)
        assert is_clean(scheduler)


def test_a_large_request_is_not_starved() -> None:
    """Small ones come without end, each smaller than what the large one has left; it has its part nevertheless."""
    scheduler, loop = make(400)
    large = request(n=3, passes=3)
    scheduler.submit(large)
    while not large.reached(SCALES):
        if not any(r is not large for r in scheduler._live):
            scheduler.submit(request())
        scheduler.step()
        assert sum(loop.work) <= (PATIENCE + 2) * large.n * 3 * WORK
    assert sum(loop.work) > 3 * large.n * 3 * WORK


def test_a_large_waiting_request_is_overtaken_by_small_ones_for_a_while() -> None:
    """It does not fit beside the first. Those behind it, which do, go before it with as much work together as its own is."""
    scheduler, _ = make(2 + 4 * (1 + CONFIG.image_pages(4)))
    first, large, *small = request(n=3, passes=8), request(n=4), *(request() for _ in range(12))
    scheduler.submit(first)
    scheduler.step()
    for r in (large, *small):
        scheduler.submit(r)
    ends: list[ImageRequest] = []
    while len(ends) < 14:
        scheduler.step()
        ends += [r for r in (first, large, *small) if r.reached(SCALES) and r not in ends]
    assert ends == [*small[:4], first, large, *small[4:]]
    assert is_clean(scheduler)


def test_steps_are_no_larger_than_a_newcomer_may_wait_for() -> None:
    for rows in (2, 5, 1000):
        scheduler, loop = make(4000, rows=rows)
        loop.config = replace(CONFIG, patch_nums=(1, 2, 4, 16))
        requests = [request(n=7, passes=2), request(n=9, passes=2)]
        for r in requests:
            scheduler.submit(r)
        drain(scheduler, *requests)
        counts = [[len(images) for images in loop.steps if images[0] in r.images] for r in requests]
        assert max(map(max, counts)) == min(rows // 2, 16)
        assert max(max(found[-8:]) for found in counts) == min(rows // 2, STEP_TOKENS // 512)
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


def test_without_guidance_a_request_takes_half_the_pages_and_steps_with_its_like() -> None:
    half = 1 + CONFIG.image_pages(4) // 2
    scheduler, loop = make(2 * half)
    plain = [request(cfg_scale=0), request(cfg_scale=0, negative=(9, 9, 9))]
    for each in plain:
        scheduler.submit(each)
    scheduler.step()
    assert len(loop.steps[0]) == 2
    assert loop.prompts == [(5, 5)] * 2  # no negative prompt was run
    drain(scheduler, *plain)
    assert is_clean(scheduler)
    scheduler, loop = make(100)
    both = [request(), request(cfg_scale=0), request()]
    for each in both:
        scheduler.submit(each)
    drain(scheduler, *both)
    assert {tuple({len(image.prefixes) for image in images}) for images in loop.steps} == {(1,), (2,)}
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
    assert all(not prefix.table.pages for image in gone.images for prefix in image.prefixes)
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


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_of_requests_keeps_the_rules(data: st.DataObject) -> None:
    """Nobody has pages that were not promised, so nothing fails, and everybody comes to an end."""
    page_size, pages = data.draw(st.integers(1, 7)), data.draw(st.integers(40, 160))
    scheduler, loop = make(pages, page_size, rows=data.draw(st.integers(2, 9)))
    pool = loop.transformer.pool
    requests: list[ImageRequest] = []
    choices = st.sampled_from(["submit", "remove", "step", "step", "step", "many"])
    for choice in data.draw(st.lists(choices, min_size=20, max_size=80)):
        if choice == "submit":
            negative = data.draw(st.sampled_from([(9,), (8,) * 5, (7,) * 6]))
            r = request(data.draw(st.integers(1, 6)), negative, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
            try:
                scheduler.submit(r)
            except PagesExhausted as error:
                assert error.needed > pages
            else:
                requests.append(r)
        elif choice == "remove" and requests:
            scheduler.remove(requests.pop(data.draw(st.integers(0, len(requests) - 1))))
        for _ in range({"step": 1, "many": 40}.get(choice, 0)):
            scheduler.step()
        live = [r for r in requests if r in scheduler._live]
        tables = [prefix.table for r in live for image in r.images for prefix in image.prefixes]
        held = {page for table in tables for page in table.pages}
        negatives = {page for prefix in scheduler._negative.values() for page in prefix.table.pages}
        assert pool.free == pool.pages - len(held | negatives)
        prefixes = {r.negative for r in live}
        assert len(held) <= sum(map(scheduler._needs, live)) + sum(map(scheduler._prefix_pages, prefixes)) <= pages
    drain(scheduler, *requests)
    assert not any(r.error for r in requests)
    assert is_clean(scheduler)


def test_a_request_is_as_far_as_its_last_image() -> None:
    """A step has room for one of its two images, and it is asked about in between."""
    scheduler, _ = make(200, rows=2)
    r = request(n=2)
    scheduler.submit(r)
    scheduler.step()
    assert [image.scale for image in r.images] == [1, 0]
    assert not r.reached(1)
    scheduler.step()
    assert r.reached(1)
    drain(scheduler, r)
    assert len(r.timings) == SCALES
    assert r.timings == sorted(r.timings)


def test_a_request_with_an_image_that_cannot_go_on_leaves_with_its_error() -> None:
    scheduler, loop = make(300)
    requests = [request(n=2) for _ in range(3)]
    for r in requests:
        scheduler.submit(r)
    scheduler.step()
    error = NotFiniteError("It broke.", "Mend it.")
    loop.wrong = lambda image: error if image is requests[1].images[1] else None
    drain(scheduler, *requests)
    assert [r.error for r in requests] == [None, error, None]
    assert drawn(loop, *requests) == [[0, 1, 2]] * 2 + [[0, 2]] * 2
    assert is_clean(scheduler)
