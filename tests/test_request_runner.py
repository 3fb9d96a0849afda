"""Requests of several threads on a scheduler that counts."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tests.support.fake_graphs import UNDERSTANDER, FakeGraph, understander_graphs
from tokenflow_sdk.errors import ArgumentError, PromptError, RequestCancelledError, RequestTimeoutError
from tokenflow_sdk.loaded_model import LoadedModel, Progress
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.request_runner import RequestRunner, RequestStream


@dataclass(eq=False)
class Count:
    """A request for so many steps."""

    last: int = 10
    done: int = 0
    error: BaseException | None = None
    progress: Progress = field(default_factory=Progress)
    by: set[str] = field(default_factory=set)
    """Threads that ran its steps."""

    def reached(self, count: int) -> bool:
        return self.done >= min(count, self.last)


class FakeScheduler:
    """Brings every request forward by one at each step. Notices when two threads are in it at once."""

    def __init__(self) -> None:
        self.requests: list[Count] = []
        self.removed: list[Count] = []
        self.steps = 0
        self.failing: dict[int, Callable[[], object]] = {}
        """What happens at a step, by its number."""
        self._inside = threading.Lock()

    def check(self, request: Count, /) -> None:
        if request.last < 0:
            raise PromptError("It is too long.", "Shorten it.")

    def submit(self, request: Count, /) -> None:
        self.check(request)
        with self.alone():
            self.requests.append(request)

    def remove(self, request: Count, /) -> None:
        with self.alone():
            self.removed.append(request)
            if request in self.requests:
                self.requests.remove(request)

    def step(self) -> None:
        with self.alone():
            self.steps += 1
            self.failing.get(self.steps, lambda: None)()
            for request in self.requests:
                request.done += 1
                request.by.add(threading.current_thread().name)

    @contextmanager
    def alone(self) -> Iterator[None]:
        assert self._inside.acquire(blocking=False), "two threads at once"
        try:
            yield
        finally:
            self._inside.release()


def loaded() -> tuple[LoadedModel[Count], FakeScheduler, dict[str, FakeGraph]]:
    graphs, scheduler = understander_graphs(), FakeScheduler()
    transformer = PagedTransformer.of(UNDERSTANDER, graphs["transformer"], 4, 4)
    return LoadedModel(graphs, transformer, scheduler), scheduler, graphs


def make() -> tuple[RequestRunner[Count], FakeScheduler, dict[str, FakeGraph]]:
    model, scheduler, graphs = loaded()
    return RequestRunner("Counter", model), scheduler, graphs


def is_closed(model: LoadedModel[Count]) -> bool:
    closed = {cast(FakeGraph, session).closed > 0 for session in model.sessions.values()}
    assert len(closed) == 1
    (found,) = closed
    assert (cast(Any, model.transformer._k.slots).size == 0) == found
    return found


def test_a_request_runs_as_far_as_it_is_asked_for() -> None:
    runner, scheduler, _ = make()
    request = Count(last=3)
    with runner.submitted([request]) as model:
        assert (scheduler.requests, model.users) == ([request], 1)
        assert scheduler.steps == 0
        runner.advance(model, request, 2)
        assert (request.done, scheduler.steps) == (2, 2)
        runner.advance(model, request, 2)
        runner.advance(model, request, 1)
        assert scheduler.steps == 2
        # It is finished with fewer.
        runner.advance(model, request, 100)
        assert scheduler.steps == 3
    assert (scheduler.requests, scheduler.removed, runner.model.users) == ([], [request], 0)


def test_requests_submitted_together_share_steps() -> None:
    runner, scheduler, _ = make()
    requests = [Count(last=count) for count in (2, 5, 3)]
    with runner.submitted(requests) as model:
        for request in requests:
            runner.advance(model, request, 100)
    assert scheduler.steps == 5
    assert scheduler.removed == requests


def test_nothing_may_be_submitted_and_the_model_stays_in_use() -> None:
    runner, _, _ = make()
    with runner.submitted([]) as model:
        assert model.users == 1
    assert runner.model.users == 0


def test_checking_runs_nothing() -> None:
    runner, scheduler, _ = make()
    runner.check(Count())
    with pytest.raises(PromptError):
        runner.check(Count(last=-1))
    assert (scheduler.requests, scheduler.steps) == ([], 0)


def test_a_request_that_cannot_run_takes_those_before_it_along() -> None:
    runner, scheduler, _ = make()
    requests = [Count(), Count(last=-1), Count()]
    with pytest.raises(PromptError), runner.submitted(requests):
        pytest.fail("entered")
    assert scheduler.requests == []
    assert runner.model.users == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_whatever_ends_the_block_removes_its_requests(error: type[BaseException]) -> None:
    runner, scheduler, _ = make()
    with pytest.raises(error), runner.submitted([Count(), Count()]):
        raise error
    assert (scheduler.requests, len(scheduler.removed), runner.model.users) == ([], 2, 0)


def test_the_error_of_a_request_is_raised_to_its_own_thread() -> None:
    runner, scheduler, _ = make()
    mine, other = Count(), Count()
    with runner.submitted([mine, other]) as model:
        scheduler.failing[2] = lambda: setattr(other, "error", ZeroDivisionError("its step"))
        runner.advance(model, mine, 4)
        assert mine.done == 4
        with pytest.raises(ZeroDivisionError, match="its step"):
            runner.advance(model, other, 5)
        # What it has already, it may have.
        runner.advance(model, other, 4)


def test_what_a_step_raises_for_no_request_ends_all_that_are_there() -> None:
    """Schedulers keep failures with their requests; the runner goes on with new ones after any other."""
    runner, scheduler, _ = make()
    requests = [Count(), Count()]

    def fail() -> None:
        raise ZeroDivisionError("nobody's")

    scheduler.failing[1] = fail
    with runner.submitted(requests) as model:
        for request in requests:
            with pytest.raises(ZeroDivisionError, match="nobody's"):
                runner.advance(model, request, 1)
    later = Count()
    with runner.submitted([later]) as model:
        runner.advance(model, later, 1)
    assert later.done == 1


def test_new_requests_run_on_the_new_model_and_old_ones_are_finished_on_theirs() -> None:
    runner, old_scheduler, _ = make()
    old = runner.model
    new, new_scheduler, _ = loaded()
    first, second, third = Count(), Count(), Count()
    with runner.submitted([first]) as model:
        assert model is old
        with runner.submitted([second]):
            runner.replace(new)
            assert (runner.model, is_closed(old)) == (new, False)
            with runner.submitted([third]) as later:
                assert later is new
                runner.advance(later, third, 1)
            runner.advance(model, first, 2)
        assert (old.users, is_closed(old)) == (1, False)
    assert is_closed(old)
    assert not is_closed(new)
    assert (old_scheduler.steps, new_scheduler.steps) == (2, 1)


def test_a_model_that_nobody_uses_is_closed_when_it_is_replaced() -> None:
    runner, _, _ = make()
    old = runner.model
    for _ in range(3):
        before = runner.model
        runner.replace(loaded()[0])
        assert is_closed(before)
    assert is_closed(old)
    assert not is_closed(runner.model)


def test_a_closed_runner_refuses_everything() -> None:
    runner, _, _ = make()
    request = Count()
    words = r"This Counter is closed\. Make a new one with Counter\.from_pretrained"
    with runner.submitted([request]) as model:
        runner.close()
        with pytest.raises(ArgumentError, match=words):
            runner.advance(model, request, 1)
    with pytest.raises(ArgumentError, match=words), runner.submitted([request]):
        pytest.fail("entered")
    assert is_closed(runner.model)
    runner.close()


def test_a_model_that_comes_after_closing_is_closed_at_once() -> None:
    runner, _, _ = make()
    runner.close()
    late, _, _ = loaded()
    runner.replace(late)
    assert is_closed(late)


def test_requests_of_many_threads_share_steps_one_at_a_time() -> None:
    runner, scheduler, _ = make()
    requests = [Count(last=200) for _ in range(6)]
    begin = threading.Barrier(len(requests))

    def use(request: Count) -> None:
        with runner.submitted([request]) as model:
            begin.wait()
            for count in range(1, 201):
                runner.advance(model, request, count)

    threads = [threading.Thread(target=use, args=[request]) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Everybody was brought forward by every step, whoever ran it, until it left.
    assert all(request.done >= 200 for request in requests)
    assert 200 <= scheduler.steps < 6 * 200
    assert (scheduler.requests, runner.model.users) == ([], 0)
    assert sorted(map(id, scheduler.removed)) == sorted(map(id, requests))


def test_a_waiting_thread_is_served_by_a_running_one() -> None:
    """It needs no step of its own where one for another request brought its request forward."""
    runner, scheduler, _ = make()
    waiting, running = Count(last=5), Count(last=5)
    entered = threading.Event()
    with runner.submitted([waiting]) as model:

        def run() -> None:
            with runner.submitted([running]) as shared:
                runner.advance(shared, running, 5)
            entered.set()

        thread = threading.Thread(target=run, name="other")
        thread.start()
        assert entered.wait(60)
        thread.join()
        runner.advance(model, waiting, 5)
    assert (waiting.by, scheduler.steps) == ({"tokenflow-steps"}, 5)


def test_models_are_replaced_under_requests_of_many_threads() -> None:
    """Every request is finished on one model, and every model but the last is closed when its last request has gone."""
    runner, _, _ = make()
    models, problems = [runner.model], []

    def use() -> None:
        try:
            for _ in range(30):
                request = Count(last=5)
                with runner.submitted([request]) as model:
                    for count in range(1, 6):
                        runner.advance(model, request, count)
                        assert not is_closed(model)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        models.append(loaded()[0])
        runner.replace(models[-1])
    for thread in threads:
        thread.join()
    assert problems == []
    assert [is_closed(model) for model in models] == [True] * (len(models) - 1) + [False]
    assert all(model.users == 0 for model in models)


@pytest.mark.parametrize("timeout", [-1, math.nan, "1", True, -math.inf])
def test_a_timeout_that_is_no_time_is_named(timeout: object) -> None:
    with pytest.raises(ArgumentError, match=r"timeout=.* is no time to wait\. Give seconds, or None"):
        Progress(cast(float, timeout))


@pytest.mark.parametrize("timeout", [None, math.inf, 10**12])
def test_a_timeout_may_be_as_long_as_one_likes(timeout: float | None) -> None:
    runner, _, _ = make()
    request = Count(progress=Progress(timeout))
    with runner.submitted([request]) as model:
        runner.advance(model, request, 3)
    assert request.done == 3


def test_a_request_whose_time_is_over_ends_while_a_step_still_runs() -> None:
    """A step cannot be interrupted; the caller need not wait for it. Others go on."""
    runner, scheduler, _ = make()
    go = threading.Event()
    scheduler.failing[1] = lambda: go.wait(60)
    hurried, patient = Count(progress=Progress(0.05)), Count()
    with runner.submitted([patient]) as model:
        words = r"not finished within timeout=0\.05 seconds\. Give it more time"
        with pytest.raises(RequestTimeoutError, match=words), runner.submitted([hurried]):
            runner.advance(model, hurried, 5)
        assert not go.is_set()
        go.set()
        runner.advance(model, patient, 10)
        assert hurried not in scheduler.requests
        assert hurried.done < 10
    assert (scheduler.requests, runner.model.users) == ([], 0)


def test_time_begins_when_a_request_is_made_and_counts_while_it_waits() -> None:
    runner, scheduler, _ = make()
    request = Count(progress=Progress(5, began=-1e9))
    with pytest.raises(RequestTimeoutError), runner.submitted([request]) as model:
        runner.advance(model, request, 1)
    assert (scheduler.steps, scheduler.requests) == (0, [])


def test_a_late_request_that_nobody_waits_for_gives_its_pages_to_others() -> None:
    """What it had by then, it may have."""
    runner, scheduler, _ = make()
    late, other = Count(), Count()
    with runner.submitted([late, other]) as model:
        runner.advance(model, late, 2)
        late.progress.timeout = 0
        runner.advance(model, other, 4)
        assert scheduler.removed == [late]
        runner.advance(model, late, 2)
        with pytest.raises(RequestTimeoutError):
            runner.advance(model, late, 3)
    assert late.done == 2


def stream_of(runner: RequestRunner[Count], request: Count) -> RequestStream[int, str]:
    def pieces() -> Generator[int, None, None]:
        with runner.submitted([request]) as model:
            for count in range(1, request.last + 1):
                runner.advance(model, request, count)
                yield count

    return RequestStream(request, pieces(), lambda: f"{request.done} in all")


def test_a_stream_has_a_result_however_much_of_it_was_read() -> None:
    runner, _, _ = make()
    for read in (0, 2, 3, 4):
        with stream_of(runner, Count(last=3)) as stream:
            assert [next(stream, None) for _ in range(read)] == [1, 2, 3, None][:read]
            assert stream.result() == "3 in all"
            assert list(stream) == []
        # Closed after its end: nothing is cancelled.
        assert stream.result() == "3 in all"
    assert runner.model.users == 0


def test_a_closed_stream_cannot_be_taken_for_a_finished_one() -> None:
    runner, scheduler, _ = make()
    for read in (0, 2):
        stream = stream_of(runner, Count())
        for _ in range(read):
            next(stream)
        stream.close()
        stream.close()
        assert (scheduler.requests, runner.model.users) == ([], 0)
        for way in (stream.result, lambda stream=stream: next(stream)):
            with pytest.raises(RequestCancelledError, match="closed before its end"):
                way()


def test_a_stream_that_failed_cannot_be_taken_for_a_finished_one() -> None:
    runner, scheduler, _ = make()
    request = Count()
    stream = stream_of(runner, request)
    scheduler.failing[2] = lambda: setattr(request, "error", ZeroDivisionError("its step"))
    with pytest.raises(ZeroDivisionError):
        for _ in range(10):
            next(stream)
            request.done = min(request.done, 1)
    for way in (stream.result, lambda: next(stream)):
        with pytest.raises(ZeroDivisionError, match="its step"):
            way()
    stream.close()
    assert (scheduler.requests, runner.model.users) == ([], 0)


def test_a_stream_may_be_closed_while_another_thread_waits_for_it() -> None:
    runner, scheduler, _ = make()
    inside, go, errors = threading.Event(), threading.Event(), []
    scheduler.failing[1] = lambda: (inside.set(), go.wait(60))
    stream = stream_of(runner, Count())

    def read() -> None:
        try:
            stream.result()
        except RequestCancelledError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(ArgumentError, match="Another thread is reading this stream"):
        next(stream)
    stream.close()
    # Before the step that is running ends.
    thread.join(60)
    assert (len(errors), go.is_set()) == (1, False)
    go.set()
    later = Count(last=2)
    assert stream_of(runner, later).result() == "2 in all"
    assert (scheduler.requests, runner.model.users) == ([], 0)


def test_a_dropped_stream_is_cancelled_at_once() -> None:
    runner, scheduler, _ = make()
    gc.disable()
    try:
        stream = stream_of(runner, Count())
        next(stream)
        del stream
        assert (scheduler.requests, runner.model.users) == ([], 0)
    finally:
        gc.enable()


def test_an_abandoned_await_ends_its_request() -> None:
    """As the guide to serving says: closing the stream ends the thread that the event loop left behind."""
    runner, scheduler, _ = make()
    inside, go = threading.Event(), threading.Event()
    scheduler.failing[1] = lambda: (inside.set(), go.wait(60))
    left: list[type[BaseException]] = []

    async def ask() -> str:
        stream = stream_of(runner, Count())

        def result() -> str:
            try:
                return stream.result()
            except RequestCancelledError as error:
                left.append(type(error))
                raise

        try:
            return await asyncio.to_thread(result)
        finally:
            stream.close()

    async def main() -> None:
        task = asyncio.create_task(ask())
        assert await asyncio.to_thread(inside.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    # Returns only when the threads of the loop have ended.
    asyncio.run(main())
    assert (left, go.is_set()) == ([RequestCancelledError], False)
    go.set()
    assert stream_of(runner, Count(last=1)).result() == "1 in all"
    assert (scheduler.requests, runner.model.users) == ([], 0)
