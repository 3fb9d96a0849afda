"""`StepLog`: logs the steps of a long job, so that it is seen to go on where there is no progress bar."""

from __future__ import annotations

import logging
import threading
from time import perf_counter
from types import TracebackType

__all__ = ["StepLog"]


class StepLog:
    """Logs a line when a step starts, and while it lasts one every half minute. A context manager.

    The lines are at the level INFO, and the first one of a `brief` step, which seldom lasts, at DEBUG.

    Args:
        logger: name of the logger, `tokenflow_sdk` or `tokenflow_export`.
        every: seconds between lines of a step that lasts.
    """

    def __init__(self, logger: str, every: float = 30.0) -> None:
        self._logger, self._every = logging.getLogger(logger), every
        self._step, self._share, self._began = "", None, 0.0  # type: tuple[str, float | None, float]
        self._ended: threading.Event | None = None

    def start(self, step: str, brief: bool = False) -> None:
        """Start a step, which ends the one before."""
        self._step, self._share, self._began = step, None, perf_counter()
        self._logger.log(logging.DEBUG if brief else logging.INFO, "%s", step)
        if self._ended is None and self._logger.isEnabledFor(logging.INFO):
            self._ended = threading.Event()
            threading.Thread(target=self._repeat, args=(self._ended,), name="tokenflow-steps", daemon=True).start()

    def fraction(self, done: float) -> None:
        """Set the share of the current step that is done, from 0 to 1."""
        self._share = done

    def _repeat(self, ended: threading.Event) -> None:
        while not ended.wait(self._every):
            share = "" if self._share is None else f" {self._share:.0%} done,"
            self._logger.info("%s:%s %.0f s", self._step, share, perf_counter() - self._began)

    def close(self) -> None:
        """End the last step."""
        if self._ended is not None:
            self._ended.set()
            self._ended = None

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
