"""Who is next, with requests that are nothing but amounts of work."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tokenflow_sdk.scheduling import PATIENCE, LeastWorkFirst, WaitingQueue


@dataclass(eq=False)
class Job:
    left: int
    step: int = 1

    def run(self) -> None:
        self.left -= self.step


def work(job: Job) -> int:
    return job.left


def anything(job: Job) -> bool:
    return True


def next_of(order: LeastWorkFirst[Job], running: list[Job]) -> Job:
    return order.next(running, work, lambda job: job.step)


def test_the_least_work_left_goes_first_and_of_equals_the_oldest() -> None:
    order: LeastWorkFirst[Job] = LeastWorkFirst()
    large, small, equal = Job(90, 10), Job(3), Job(3)
    found = []
    running = [large, small, equal]
    while running:
        chosen = next_of(order, running)
        found.append(chosen)
        chosen.run()
        running = [job for job in running if job.left > 0]
    assert found == [small] * 3 + [equal] * 3 + [large] * 9


def test_the_oldest_has_its_part_however_many_smaller_ones_come() -> None:
    """Measured in work, not in steps: a large step is waited for longer."""
    order: LeastWorkFirst[Job] = LeastWorkFirst()
    oldest, others = Job(10_000, 50), 0
    for _ in range(8):
        while (chosen := next_of(order, [oldest, Job(10, 10)])) is not oldest:
            others += chosen.step
        oldest.run()
    assert others == 8 * PATIENCE * oldest.step


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=12))
def test_every_job_ends_while_small_ones_never_stop_coming(jobs: list[tuple[int, int]]) -> None:
    order: LeastWorkFirst[Job] = LeastWorkFirst()
    running = [Job(left, step) for left, step in jobs]
    total = sum(job.left + job.step for job in running)
    ran = 0
    while running:
        chosen = next_of(order, [*running, Job(1)])
        chosen.run()
        ran += chosen.step
        running = [job for job in running if job.left > 0]
        assert ran <= (PATIENCE + 1) * total


def test_what_waits_is_taken_smallest_first_and_of_equals_in_order() -> None:
    queue = WaitingQueue(work)
    jobs = [Job(50), Job(5), Job(20), Job(5)]
    for job in jobs:
        queue.put(job)
    assert [queue.take(anything) for _ in range(5)] == [jobs[1], jobs[3], jobs[2], jobs[0], None]
    assert len(queue) == 0


def test_a_large_one_that_does_not_fit_is_overtaken_by_its_own_work_at_most() -> None:
    queue = WaitingQueue(work)
    large = Job(20)
    queue.put(large)
    taken = 0
    for _ in range(30):
        queue.put(Job(3))
        if small := queue.take(lambda job: job is not large):
            taken += small.left
    assert taken == 18
    # Then it is its turn, and whoever is behind it goes on afterwards.
    assert queue.take(anything) is large
    assert len(queue) == 30 - 6
    assert queue.take(anything) is not None


def test_nobody_is_overtaken_by_a_larger_one() -> None:
    queue = WaitingQueue(work)
    small, larger = Job(5), Job(6)
    queue.put(small)
    queue.put(larger)
    assert queue.take(lambda job: job is larger) is None
    queue.remove(small)
    queue.remove(small)
    assert queue.take(lambda job: job is larger) is larger


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=40))
def test_nobody_is_overtaken_by_more_work_than_its_own(arrivals: list[tuple[int, bool]]) -> None:
    """Whatever fits and whatever comes; and an empty room is filled."""
    queue = WaitingQueue(work)
    overtaken: dict[Job, int] = {}
    waiting: list[Job] = []
    for left, fits in arrivals:
        job = Job(left, 1 if fits else 2)
        queue.put(job)
        waiting.append(job)
        taken = queue.take(lambda job: job.step == 1)
        if taken is None:
            continue
        for earlier in waiting[: waiting.index(taken)]:
            overtaken[earlier] = overtaken.get(earlier, 0) + taken.left
            assert overtaken[earlier] <= earlier.left
        waiting.remove(taken)
    assert len(queue) == len(waiting)
    assert {queue.take(anything) for _ in range(len(waiting))} == set(waiting)
