"""Small jobs of `tokenflow tokenize`, on a tokenizer without an engine; run as a module, jobs in processes that are killed.

`python -m tests.support.dataset_jobs POINT:N ... -- WORDS` runs `tokenflow WORDS` in a new process for each point, which kills
itself at the N-th call of that function, and once more, to the end. A point of `after:SECONDS` kills it from outside.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.session import OpenSession
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli import tokenize as command
from tokenflow_sdk.dataset.outputs import Writer
from tokenflow_sdk.dataset.storage import Storage

POINTS: dict[str, tuple[Any, str]] = {"row": (Writer, "add"), "record": (Storage, "write"), "file": (os, "fsync")}
"""Functions at which a process can kill itself: before a row is written, a small file, or a file appears."""


def fake_tokenizer(batch_limit: int = 1, open_session: OpenSession = FakeSession, sha256: str = "ab" * 32) -> Tokenizer:
    return Tokenizer(replace(fake_bundle(), sha256=sha256), batch_limit=batch_limit, open_session=open_session)


def write_pictures(directory: Path, count: int, bad: Sequence[int] = ()) -> Path:
    """Pictures 000.png and on, all different; those of some numbers are none."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        content = b"no picture" if i in bad else picture(i)
        (directory / f"{i:03d}.png").write_bytes(content)
    return directory


def picture(seed: int, size: tuple[int, int] = (9, 8)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 200, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def content(output: Path) -> dict[str, bytes]:
    """The output's files by name, without the job's state."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def _dies_at(point: str, number: int) -> None:
    owner, name = POINTS[point]
    plain: Callable[..., Any] = getattr(owner, name)
    calls: list[None] = []

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **keywords)

    setattr(owner, name, call)


def _run(words: Sequence[str], point: str | None) -> int:
    """Run the command in a child, which a point kills. Returns its status, negative if it was killed."""
    name, _, value = (point or "").partition(":")
    child = os.fork()
    if child == 0:
        if name in POINTS:
            _dies_at(name, int(value))
        os._exit(main(words))
    if name == "after":
        time.sleep(float(value))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    at = sys.argv.index("--")
    if "--bundle" not in sys.argv:
        command._open = lambda arguments: [fake_tokenizer()]  # type: ignore[assignment]
    for each in (*sys.argv[1:at], None):
        sys.stdout.write(f"{each} {_run(sys.argv[at + 1 :], each)}\n")
        sys.stdout.flush()
