"""Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that what it has half written is deleted and one line is said."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Stopped", "stopped_by_signals"]


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end. What cleans up after Ctrl-C takes it for that. `status` is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` at SIGTERM and SIGHUP within the block, once. Where one is ignored, as under nohup, it stays so."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handled in numbers:  # another one must not interrupt the cleaning up
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    found = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    main = threading.current_thread() is threading.main_thread()  # of others Python lets none handle signals
    numbers = [number for number in found if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
