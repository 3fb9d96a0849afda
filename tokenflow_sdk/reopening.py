"""`Reopening`: models cross processes as the arguments that opened them, and open again at their first use there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.forking import no_fork

__all__ = ["Reopening"]

T = TypeVar("T", bound="Reopening")


class Reopening:
    """Base of what a class method `open` opens and `close` closes. Copies, by `pickle` or `copy`, open at their first use.

    Not at once, because results hold the model that made them, and should arrive also where its bundle is not. A copy of
    what is closed is closed.
    """

    _arguments: tuple[Any, ...] | None = None
    """Arguments of `open`; None: it was made without it."""
    _unopened: threading.Lock | None = None
    """None: this is open. Else the lock for the moment in which a copy becomes open; not held while it is opened."""
    _closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        if self._arguments is None and not self._closed:
            raise ArgumentError(
                f"This {type(self).__name__} was made from parts, so another process cannot open it.",
                f"Open it with {type(self).__name__}.from_pretrained.",
            )
        return _copied, (type(self), self._arguments, self._closed)

    if not TYPE_CHECKING:  # a type checker would take every attribute for one that exists

        def __getattr__(self, name: str) -> Any:
            if self._unopened is None or name.startswith("__"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._open_again(self._unopened)
            return getattr(self, name)

    def _open_again(self, publishing: threading.Lock) -> None:
        if self._closed:
            raise ArgumentError(
                f"This {type(self).__name__} is closed.", f"Make a new one with {type(self).__name__}.from_pretrained."
            )
        assert self._arguments is not None
        opened = type(self).open(*self._arguments)  # type: ignore[attr-defined]
        with no_fork(), publishing:
            first = self._unopened is not None
            if first:
                vars(self).update(vars(opened), _unopened=None)
        if not first:
            # Another thread was faster.
            opened.close()


def _copied(kind: type[T], arguments: tuple[Any, ...] | None, closed: bool) -> T:
    copy = kind.__new__(kind)
    copy._arguments, copy._unopened, copy._closed = arguments, threading.Lock(), closed
    return copy
