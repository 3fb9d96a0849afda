"""Requests of several threads on a scheduler that counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tests.support.fake_graphs import UNDERSTANDER, FakeGraph, understander_graphs
from tokenflow_sdk.errors import ArgumentError, PromptError
from tokenflow_sdk.loaded_model import LoadedModel, Progress
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.request_runner import RequestRunner


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
