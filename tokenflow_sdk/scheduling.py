"""Which request is next: the one with the least work left, but so that none waits for ever.

Least work first makes the mean time of all requests shortest: a small request hardly notices a large one, and a large one loses
no more than what the small ones take. Work is counted in tokens that the model is run on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import takewhile
from typing import Generic, TypeVar

__all__ = ["PATIENCE", "LeastWorkFirst", "WaitingQueue"]

PATIENCE = 4
"""So many times the work of its own next step others may do before the oldest running request has a step."""

R = TypeVar("R", bound=Hashable)


class LeastWorkFirst(Generic[R]):
    """Says whose step is next. At least one part in `PATIENCE` + 1 of all work is the oldest's, so each ends."""

    def __init__(self) -> None:
        self._passed_over = 0
        """Work of steps since the oldest request's own."""

    def next(self, running: Sequence[R], left: Callable[[R], int], step: Callable[[R], int]) -> R:
        """Choose the request of the next step.

        Args:
            running: all that are running, oldest first; at least one.
            left: how much work a request has left.
            step: how much of it its next step is.
        """
        oldest = running[0]
        overdue = self._passed_over >= PATIENCE * step(oldest)
        chosen = oldest if overdue else min(running, key=left)
        self._passed_over = 0 if chosen is oldest else self._passed_over + step(chosen)
        return chosen


class WaitingQueue(Generic[R]):
    """Requests that wait for room, in order of arrival.

    Smaller ones may overtake a larger one that does not fit yet, but not with more work together than its own is.

    Args:
        work: how much a request is.
    """

    def __init__(self, work: Callable[[R], int]) -> None:
        self._work = work
        self._overtaken: dict[R, int] = {}
        """For each request the work of later ones that were taken before it."""

    def __len__(self) -> int:
        return len(self._overtaken)

    def put(self, request: R) -> None:
        """Add a request behind all others."""
        self._overtaken[request] = 0

    def remove(self, request: R) -> None:
        """Forget a request, if it is here."""
        self._overtaken.pop(request, None)

    def take(self, fits: Callable[[R], bool]) -> R | None:
        """Remove and return the smallest request that fits and may overtake those before it; None if there is none."""
        chosen, least, allowed = None, math.inf, math.inf
        for request, overtaken in self._overtaken.items():
            work = self._work(request)
            if work < least and work <= allowed and fits(request):
                chosen, least = request, work
            allowed = min(allowed, work - overtaken)
        if chosen is not None:
            for request in takewhile(lambda earlier: earlier is not chosen, self._overtaken):
                self._overtaken[request] += int(least)
            self.remove(chosen)
        return chosen
