"""Requests of several threads on one model: failures, Ctrl-C, abandoned streams and closing, at every point of a step."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tokenflow_sdk import Generator, Understander
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.errors import ArgumentError, BackendError


@pytest.fixture
def generator(mini_generator: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(mini_generator, device="cpu", threads=1, pages=400, page_size=4) as generator:
        yield generator


@pytest.fixture
def understander(mini_understander: Path) -> Iterator[Understander]:
    with Understander.from_pretrained(mini_understander, device="cpu", threads=1, pages=200, page_size=4) as understander:
        yield understander


def free(model: Any) -> bool:
    """Whether every page of the pool is free, but for what is kept for later requests on purpose."""
    scheduler = model._runner.model.scheduler
    if isinstance(model, Generator):
        scheduler._forget_negatives(())
    else:
        while scheduler.cache.evict():
            pass
    pool = model._runner.model.transformer.pool
    return bool(pool.free == pool.pages)


def count_calls(model: Any, use: Callable[[], object]) -> int:
    """How often `use` runs a session."""
    return len(list(_recorded(model, use, lambda number: None)))


def _recorded(model: Any, use: Callable[[], object], before: Callable[[int], None]) -> list[int]:
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for session in model._runner.model.sessions.values():
            patch.setattr(session, "_infer", _noting(session, calls, before))
        use()
    return calls


def _noting(session: Session, calls: list[int], before: Callable[[int], None]) -> Callable[..., Any]:
    plain = session._infer

    def infer(*arguments: Any) -> Any:
        calls.append(len(calls))
        before(calls[-1])
        return plain(*arguments)

    return infer


def fail_at(number: int) -> Callable[[int], None]:
    def before(call: int) -> None:
        if call == number:
            raise BackendError(f"call {number} failed", "x")

    return before


def test_a_failure_at_any_call_is_its_own_requests_alone(generator: Generator) -> None:
    """Two requests of other prompts, one of them submitted while the other is under way; each call of a step fails once."""
    right = {prompt: generator.generate(prompt, seed=1, preset="balanced").codes for prompt in ("w1 w2", "w5")}

    def both() -> dict[str, object]:
        found: dict[str, object] = {}

        def run(prompt: str) -> None:
            try:
                found[prompt] = generator.generate(prompt, seed=1, preset="balanced").codes
            except BackendError as error:
                found[prompt] = error

        first = generator.stream("w1 w2", seed=1, preset="balanced")
        other = threading.Thread(target=run, args=("w5",))
        try:
            next(first)
            other.start()
            found["w1 w2"] = [step.codes for step in first][-1]
        except BackendError as error:
            found["w1 w2"] = error
            if not other.ident:
                other.start()
        other.join(60)
        assert not other.is_alive()
        return found

    total = count_calls(generator, both)
    assert total > 10
    failed = set()
    for number in range(total):
        outcomes: list[dict[str, object]] = []
        _recorded(generator, lambda outcomes=outcomes: outcomes.append(both()), fail_at(number))  # type: ignore[misc]
        for prompt, found in outcomes[0].items():
            if isinstance(found, BackendError):
                failed.add((prompt, number))
            else:
                assert found == right[prompt], number
        assert free(generator)
        assert generator.generate("w5", seed=1, preset="balanced").codes == right["w5"]
    assert {prompt for prompt, _ in failed} == {"w1 w2", "w5"}
    # A prompt that cannot be prefilled takes nobody with it: some failures are one request's alone.
    numbers = [number for _, number in failed]
    assert any(numbers.count(number) == 1 for number in numbers)


def test_an_answer_fails_alone_or_with_those_that_share_its_step(understander: Understander) -> None:
    import numpy as np

    features = np.random.default_rng(0).standard_normal((16, 40)).astype(np.float32)

    def ask() -> object:
        return understander.answer(features, "what?", max_tokens=3).token_ids

    right, total = ask(), count_calls(understander, ask)
    for number in range(total):
        with pytest.raises(BackendError, match=f"call {number} failed"):
            _recorded(understander, ask, fail_at(number))
        assert free(understander)
        assert ask() == right


def test_a_stream_collected_in_the_middle_of_a_step_is_cancelled(generator: Generator) -> None:
    """An unclosed stream in a reference cycle is collected inside a step: its cancelling must not wait for that step."""

    def abandon() -> None:
        cycle: list[Any] = [generator.stream("w3", seed=2, preset="fast")]
        next(cycle[0])
        cycle.append(cycle)

    def collect() -> None:
        # Nothing was collected since, so that the cycle is in the youngest generation.
        gc.collect(0)

    gc.disable()
    try:
        abandon()
        _recorded(generator, lambda: generator.generate("w1", seed=1, preset="fast"), lambda _: collect())
    finally:
        gc.enable()
    assert free(generator)


CTRL_C = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from tokenflow_sdk import Generator
generator = Generator.from_pretrained(sys.argv[1], device="cpu", threads=1, pages=400, page_size=4)
right = generator.generate("w5", seed=1, preset="fast").codes
begun, go, found = threading.Event(), threading.Event(), []
loop = generator._runner.model.scheduler.loop
plain = loop.sample_pass
def slow(images):
    begun.set()
    go.wait(20)
    plain(images)
loop.sample_pass = slow
def other():
    found.append(generator.generate("w5", seed=1, preset="fast").codes)
thread = threading.Thread(target=other)
try:
    stream = generator.stream("w1", seed=1, preset="fast")
    thread.start()
    begun.wait(20)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    next(stream)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
go.set()
stream.close()
thread.join(20)
print("the other is right:", found == [right])
pool = generator._runner.model.transformer.pool
generator._runner.model.scheduler._forget_negatives(())
print("all pages are free:", pool.free == pool.pages)
generator.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_ctrl_c_is_raised_in_its_own_thread_only(mini_generator: Path) -> None:
    command = [sys.executable, "-c", CTRL_C, mini_generator]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["interrupted", "the other is right: True", "all pages are free: True"], done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers here")
def test_a_signal_handler_may_use_and_close_the_model(generator: Generator) -> None:
    done: list[object] = []

    def ring(*_: object) -> None:
        try:
            done.append(generator.generate("w2", seed=1, preset="fast").codes)
        except ArgumentError as error:
            # It came at one of the moments when the interrupted thread hands requests over: said, instead of waiting for ever.
            assert "busy in the thread that a signal handler interrupted" in str(error)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        generator.close()

    before = signal.signal(signal.SIGALRM, ring)
    try:
        right = generator.generate("w2", seed=1, preset="fast").codes
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ArgumentError, match="This Generator is closed"):
            for seed in range(10_000):
                generator.generate("w1", n=4, seed=seed, preset="paper")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert done == [right]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_is_told_to_open_its_own(generator: Generator) -> None:
    """Threads and locks do not survive a fork, so the child must not wait for them."""
    generator.generate("w1", seed=1, preset="fast")
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            generator.generate("w1", seed=1, preset="fast")

    thread = threading.Thread(target=draw)
    thread.start()
    stream = generator.stream("w2", seed=1, preset="fast")
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            stream.close()
            generator.generate("w1", seed=1, preset="fast")
        except ArgumentError as error:
            os._exit(0 if "Open it in the child process" in str(error) else 3)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    stop.set()
    thread.join(60)
    stream.close()
    assert os.waitstatus_to_exitcode(status) == 0
