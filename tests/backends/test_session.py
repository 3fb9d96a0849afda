from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.fakes import GRAPHS, FakeSession
from tokenflow_sdk.backends.session import HostPages, SessionOptions
from tokenflow_sdk.errors import ArgumentError

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(Path(), GRAPHS["encode"], SessionOptions())


def test_only_the_outputs_asked_for_are_computed(session: FakeSession) -> None:
    assert set(session.run({"images": IMAGES})) == {"code_indices", "latent"}
    assert set(session.run({"images": IMAGES}, ["latent"])) == {"latent"}
    assert session.calls == [(2, ("code_indices", "latent")), (2, ("latent",))]


@pytest.mark.parametrize(
    "feeds",
    [{}, {"pictures": IMAGES}, {"images": IMAGES, "more": IMAGES}, {"images": IMAGES[0]}, {"images": IMAGES.astype(np.int32)}],
)
def test_feeds_that_do_not_fit_are_a_bug_not_a_crash_in_the_engine(session: FakeSession, feeds: dict) -> None:
    with pytest.raises(ValueError, match="images"):
        session.run(feeds)
    with pytest.raises(ValueError, match="no output"):
        session.run({"images": IMAGES}, ["surprise"])
    assert session.calls == []


def test_a_session_is_a_context_manager(session: FakeSession) -> None:
    with session:
        pass
    assert session.closed == 1


@pytest.mark.parametrize(
    "options",
    [{"device": "tpu"}, {"device": "cuda:x"}, {"device": "cpu:1"}, {"device": 0}, {"device": None}]
    + [{"threads": value} for value in (0, "2", 2.0, True, 10**12)],
)
def test_options_that_cannot_work_are_named(options: dict) -> None:
    with pytest.raises(ArgumentError):
        SessionOptions(**options)


def test_pages_beyond_the_machines_memory_are_refused_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"pages=1000000000000 of page_size=16 take \d+ GB, keys and values together, and"):
        HostPages((2, 10**12, 16, 1, 4), np.dtype(np.float32))
    shape, page = (2, 10, 16, 1, 4), 2 * 2 * 16 * 4 * 4
    monkeypatch.setattr("tokenflow_sdk.backends.session._memory", lambda: 10 * page)
    assert 2 * HostPages(shape, np.dtype(np.float32)).page_bytes == page
    monkeypatch.setattr("tokenflow_sdk.backends.session._memory", lambda: 10 * page - 1)
    with pytest.raises(ArgumentError, match="pages=10 of page_size=16"):
        HostPages(shape, np.dtype(np.float32))


def test_a_system_that_does_not_say_its_memory_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")
    HostPages((1, 1, 1, 1, 1), np.dtype(np.float32))


def test_options_that_can() -> None:
    assert SessionOptions(threads=np.int64(2)).threads == 2  # type: ignore[arg-type]
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        assert SessionOptions(device=device).device == device
