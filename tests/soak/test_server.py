"""A few seconds of `make soak-server`, on the smallest models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.server import soak


@pytest.mark.slow
def test_nothing_is_lost_of_a_server_under_load_that_is_killed(
    mini_bundle: Path, mini_generator: Path, mini_understander: Path
) -> None:
    bundles = {"--tokenizer": mini_bundle, "--generator": mini_generator, "--understander": mini_understander}
    options = [str(word) for pair in bundles.items() for word in pair]
    clients, _ = soak([*options, "--threads", "1"], seconds=5, seed=1, kills=2)
    assert clients.problems == []
    assert min(clients.done.values()) > 0
