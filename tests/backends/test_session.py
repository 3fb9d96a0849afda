from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.fakes import GRAPHS, FakeSession
from tokenflow_sdk.backends.session import SessionOptions
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


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cuda:x"}, {"device": "cpu:1"}, {"threads": 0}])
def test_options_that_cannot_work_are_named(options: dict) -> None:
    with pytest.raises(ArgumentError):
        SessionOptions(**options)


def test_options_that_can() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        assert SessionOptions(device=device).device == device
