"""Lets one run at a time write a job's output, or one process for each of the tasks that share it."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, DatasetError, MissingPackageError, OutputError
from tokenflow_sdk.files import reason

__all__ = ["Task", "job_lock", "start_lock"]

_HINT = "Wait until it ends, or choose another -o."
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems without locks say."""


class Task(NamedTuple):
    """One of several processes that share a job, the `number`-th of `total`. Each makes shards that follow each other."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Task:
        """From `3/16`, the third of sixteen.

        Raises:
            ArgumentError: it is no such text.
        """
        number, _, total = text.partition("/")
        if not (number.isdecimal() and total.isdecimal() and text.isascii() and 1 <= int(number) <= int(total)):
            raise ArgumentError(f"--shard {text} is no part of a job.", "Write it as --shard 1/16, up to --shard 16/16.")
        return cls(int(number), int(total))

    def has(self, index: int, shards: int) -> bool:
        """Whether a shard, by its index, is this task's, of a job of so many shards."""
        return index * self.total // shards == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


@contextmanager
def job_lock(output: Storage, state: str, task: Task | None) -> Iterator[None]:
    """Hold an output within the block: all of it, or what a task writes. The lock of a process that died is free.

    Locks are files below the output's state. For output that is not on a local disk they are in the user's cache directory, or,
    where that cannot be written, in the one of temporary files: two processes on one machine are told apart. On several, and on
    file systems without locks, nothing is: what they write is the same and appears whole.

    Args:
        output: where the job writes.
        state: the directory of the job's state in it.
        task: which task of the job this process is; None: it makes all shards.

    Raises:
        DatasetError: another process writes there.
        OutputError: the directory of the locks cannot be written.
        MissingPackageError: filelock is not installed.
    """
    name = "whole" if task is None else f"task-{task.number}-of-{task.total}"
    with ExitStack() as held:
        # For the moment of looking and taking, so that of two processes that start at once one sees the other.
        with start_lock(output, state) as directory:
            _refuse_others(directory, output, task)
            try:
                held.enter_context(_lock(directory / f"{name}.lock"))
            except TimeoutError:
                raise DatasetError(f"{_who(task)} writes {output.address} already.", _HINT) from None
        yield


@contextmanager
def start_lock(output: Storage, state: str) -> Iterator[Path]:
    """Hold what processes that begin in an output hold one after the other, each for a moment. Gives the locks' directory.

    Raises:
        DatasetError: others have held it for a minute.
        OutputError, MissingPackageError: see `job_lock`.
    """
    directory = Path(output.address, state, "locks") if output.is_local else _cache(output.address)
    with ExitStack() as held:
        try:
            held.enter_context(_lock(directory / "start.lock", 60))
        except TimeoutError:
            raise DatasetError(f"Other processes begin in {output.address}.", "Run the command again in a minute.") from None
        yield directory


def _refuse_others(directory: Path, output: Storage, task: Task | None) -> None:
    """Raise DatasetError if a process holds what this one would write too."""
    if task is not None and _is_held(directory / "whole.lock"):
        raise DatasetError(f"Another run writes all of {output.address}.", _HINT)
    for path in sorted(directory.glob("task-*-of-*.lock")):
        number, _, total = path.stem.removeprefix("task-").partition("-of-")
        other = Task(int(number), int(total))
        if (task is None or other.total != task.total) and _is_held(path):
            hint = _HINT if task is None else f"All tasks of a job are of the same number: give --shard {task.number}/{total}."
            raise DatasetError(f"{_who(other)} writes {output.address}.", hint)


def _who(task: Task | None) -> str:
    return "Another run" if task is None else f"A process with --shard {task}"


def _is_held(path: Path) -> bool:
    try:
        with _lock(path):
            return False
    except TimeoutError:
        return True


@contextmanager
def _lock(path: Path, seconds: float = 0) -> Iterator[None]:
    """Hold a lock; on a file system without locks nothing. Raises TimeoutError: another process holds it."""
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingPackageError("filelock is not installed.", "Run `pip install 'tokenflow-sdk[dataset]'`.") from error
    # The existence of a file, which newer versions take for a lock where there are none, would outlive a process that died.
    options: Any = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock).parameters else {}
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path, timeout=seconds, **options))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) not in _WITHOUT_LOCKS:
                hint = "Choose another -o, or check its permissions."
                raise OutputError(f"{path.parent} cannot be written: {reason(error)}.", hint) from error
        except NotImplementedError:  # of older versions, for ENOSYS
            pass
        yield


def _cache(address: str) -> Path:
    """The directory of locks for output that is elsewhere."""
    import platformdirs

    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:32]
    directory = platformdirs.user_cache_path() / "tokenflow" / "jobs" / digest
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if os.access(directory, os.W_OK):
        return directory
    # A user's own: what another has made there could not be written.
    return Path(tempfile.gettempdir(), f"tokenflow-jobs-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}")
