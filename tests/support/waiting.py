"""Waiting for what another thread does: an answer or a signal often comes before it has finished with everything else."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60
"""Seconds, for a loaded machine; nothing here waits that long unless it fails."""


def comes_true(condition: Callable[[], object]) -> bool:
    """Whether a condition is true, now or soon."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
