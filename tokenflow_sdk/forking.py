"""Lets a process fork while its threads work: a child gets all locks as they are, and none of the threads that hold them."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

__all__ = ["keep_in_children", "no_fork"]

_POLL = 0.001
"""Seconds between two looks. There is no lock here, which a child could inherit locked."""

_busy: list[int] = []
"""Threads in a block of `no_fork`, once for each block."""
_forking: list[int] = []
"""Threads that fork now."""
_kept: weakref.WeakSet[Any] = weakref.WeakSet()


@contextmanager
def no_fork() -> Iterator[None]:
    """A block that holds locks of its own or of onnxruntime: other threads fork before or after it."""
    thread = get_ident()
    # A block inside another, and a thread that forks itself, must not wait: those who fork wait for the outer block.
    waits = thread not in _busy and thread not in _forking
    _busy.append(thread)
    try:
        # Whoever forks says so before it looks who is busy, so one of the two always sees the other.
        while waits and _forking:
            _busy.remove(thread)
            try:
                time.sleep(_POLL)
            finally:
                _busy.append(thread)
        yield
    finally:
        _busy.remove(thread)


def keep_in_children(session: Any) -> None:
    """Never free a session of onnxruntime in a forked child: it would wait for threads that are not there."""
    _kept.add(session)


def _before() -> None:
    thread = get_ident()
    _forking.append(thread)
    while any(other != thread for other in list(_busy)):
        time.sleep(_POLL)


def _in_parent() -> None:
    _forking.remove(get_ident())


def _in_child() -> None:
    _forking.clear()
    for session in list(_kept):
        # A reference that nobody gives back, so that not even the end of the interpreter frees it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
