"""`tokenflow serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COMMAND = [sys.executable, "-m", "tokenflow_sdk", "serve"]


class Served:
    """A server in a process of its own that is ready. It can be killed and started again at the same port."""

    def __init__(self, *options: str) -> None:
        self._options, self._port = options, 0
        self.lines: list[str] = []
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [*COMMAND, "--port", str(self._port), *self._options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        stderr: Any = self.process.stderr
        for line in stderr:
            self.lines.append(line)
            if found := re.search(r"listening at http://127\.0\.0\.1:(\d+)", line):
                self._port = int(found[1])
            if line.startswith("ready"):
                break
        else:
            raise RuntimeError("".join(self.lines))
        self._reader = threading.Thread(target=self.lines.extend, args=(stderr,))
        self._reader.start()

    def kill(self) -> None:
        self.process.kill()
        self._reader.join()
        self.process.communicate()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def running(*options: str) -> Iterator[Served]:
    """A server that is killed at the end of the block."""
    served = Served(*options)
    try:
        yield served
    finally:
        served.kill()
