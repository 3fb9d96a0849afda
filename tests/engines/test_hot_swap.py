from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from tests.support.fakes import GRAPHS
from tokenflow_sdk.backends.session import Array, Session, SessionOptions, Tensor
from tokenflow_sdk.engines.hot_swap import EngineSwap, SwappingSession, SwappingSessions
from tokenflow_sdk.errors import BackendError

CODES = {"code_indices": np.zeros((1, 5), np.int32)}


class Constant(Session):
    """Answers with its number, after `gate` opens."""

    def __init__(self, number: int) -> None:
        super().__init__(GRAPHS["decode"].inputs, GRAPHS["decode"].outputs)
        self.number, self.closed = number, 0
        self.started, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    @property
    def device(self) -> str:
        return f"device {self.number}"

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        self.started.set()
        assert self.gate.wait(30)
        assert not self.closed
        return [np.full((1, 8, 8, 3), self.number, np.uint8)]

    def close(self) -> None:
        self.closed += 1


def answer(session: Session) -> int:
    return int(session.run(CODES)["images"][0, 0, 0, 0])


def test_the_old_engine_is_closed_after_its_last_call() -> None:
    old, new = Constant(1), Constant(2)
    old.gate.clear()
    session = SwappingSession(old)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(answer(session)))
    thread.start()
    assert old.started.wait(30)
    session.swap(new)
    assert answer(session) == 2
    assert (session.device, old.closed) == ("device 2", 0)
    old.gate.set()
    thread.join()
    assert (found, old.closed) == ([1], 1)
    session.close()
    assert new.closed == 1


def test_an_idle_engine_is_closed_at_once_and_a_closed_session_takes_no_other() -> None:
    old, new, late = Constant(1), Constant(2), Constant(3)
    session = SwappingSession(old)
    session.swap(new)
    assert old.closed == 1
    session.close()
    session.swap(late)
    assert (new.closed, late.closed) == (2, 1)


def test_open_graphs_move_and_later_ones_open_there() -> None:
    made: list[Constant] = []

    def opener(number: int):
        def open_session(path, entry, options) -> Constant:
            made.append(Constant(number))
            return made[-1]

        return open_session

    sessions = SwappingSessions(opener(1))
    first = sessions.open(None, GRAPHS["decode"], SessionOptions())  # type: ignore[arg-type]
    sessions.swap(opener(2))
    second = sessions.open(None, GRAPHS["decode"], SessionOptions())  # type: ignore[arg-type]
    assert (answer(first), answer(second)) == (2, 2)
    assert [session.closed for session in made] == [1, 0, 0]


def test_waiting_tells_what_went_wrong() -> None:
    moved = threading.Event()
    swap = EngineSwap(lambda: None, moved.set)
    assert swap.wait(30)
    assert moved.is_set()

    def fail() -> None:
        raise BackendError("no GPU", "use another")

    with pytest.raises(BackendError, match="no GPU"):
        EngineSwap(fail, moved.set).wait(30)
