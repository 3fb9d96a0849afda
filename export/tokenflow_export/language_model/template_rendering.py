"""Renders chat templates in a process of their own, which is ended when it takes too long or too much memory.

A template is a program: its loops may never end, and `'a' * 10**10` takes 10 GB. jinja2's sandbox bounds neither. Time is
bounded within the process, by a thread of C, as one operation can hold Python's lock for long; memory is bounded from outside.
"""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

__all__ = ["RenderingError", "render"]

SECONDS, MEGABYTES, CHARACTERS = 5.0, 500, 100_000
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from tokenflow_export.language_model.template_rendering import main; main()"


class RenderingError(Exception):
    """A template cannot be rendered; the message says why."""


def render(source: str, conversations: Sequence[Sequence[Mapping[str, str]]], tokens: Mapping[str, str]) -> list[str]:
    """Render a chat template for conversations, each up to where the next answer begins.

    Args:
        source: the template.
        conversations: messages with `role` and `content`.
        tokens: special tokens by the names that templates have for them, as `bos_token`.

    Raises:
        RenderingError: it cannot be rendered, or takes more than `SECONDS`, `MEGABYTES` or `CHARACTERS`.
    """
    import jinja2  # noqa: F401  (is missing here where it is missing there)

    with tempfile.TemporaryFile("w+") as request:
        json.dump({"source": source, "conversations": conversations, "tokens": tokens}, request)
        request.seek(0)
        status, output, errors = _run_process(request)
    if status:
        late = "Timeout (" in errors
        raise RenderingError(f"it takes more than {SECONDS:g} s" if late else f"its process failed ({status})")
    result = json.loads(output)
    if "error" in result:
        raise RenderingError(result["error"])
    texts: list[str] = result["texts"]
    return texts


def _run_process(request: IO[str]) -> tuple[int, str, str]:
    """Run the process until it ends, or takes too much memory. Returns its exit status and what it wrote."""
    words, pipe = [sys.executable, "-c", _PROGRAM, str(SECONDS), *sys.path], subprocess.PIPE
    with subprocess.Popen(words, stdin=request, stdout=pipe, stderr=pipe, text=True) as process:  # noqa: S603
        try:
            while _memory(process.pid) <= MEGABYTES * 1e6:
                with suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=0.02)
                    return process.returncode, output, errors
        finally:
            process.kill()
    raise RenderingError(f"it takes more than {MEGABYTES} MB of memory")


def _memory(process_id: int) -> int:
    import psutil

    try:
        return int(psutil.Process(process_id).memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0


def main() -> None:
    """What the process does: read a request, and write the texts or why there are none."""
    request = json.load(sys.stdin)
    try:
        result: dict[str, Any] = {"texts": _texts(**request)}
    except Exception as error:  # a template can raise any kind
        result = {"error": f"{str(error) or type(error).__name__:.300}"}
    json.dump(result, sys.stdout)


def _texts(source: str, conversations: Sequence[Sequence[Mapping[str, str]]], tokens: Mapping[str, str]) -> list[str]:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object) -> None:
        raise TemplateError(str(message))

    faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(source)
    texts = [
        template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens)
        for messages in conversations
    ]
    if max(map(len, texts)) > CHARACTERS:
        raise TemplateError(f"it writes more than {CHARACTERS} characters")
    return texts
