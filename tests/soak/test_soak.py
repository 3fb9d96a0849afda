"""A few seconds of `make soak`, on the smallest models."""

from __future__ import annotations

from pathlib import Path

from tests.soak.soak import soak


def test_nothing_is_left_of_threads_cancels_closes_and_garbage(mini_generator: Path, mini_understander: Path) -> None:
    found = soak(mini_generator, mini_understander, seconds=3, seed=1)
    assert found.problems == []
    assert sum(found.done.values()) > 5
