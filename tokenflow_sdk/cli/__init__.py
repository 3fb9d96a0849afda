"""The `tokenflow` command."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all went well, 1 when some files of several failed, 2 for a mistake the user can mend, 130 when interrupted (129
        by SIGHUP, 143 by SIGTERM), 141 when the reader of the output went away (`tokenflow info | head -1`).
    """
    try:
        _prepare_streams()
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            # The interpreter would flush when it ends, and print a traceback if that fails.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        # While modules were imported; `exit_status.run` handles it afterwards.
        return _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stdout = None
        return 141
    except OSError as error:
        sys.stdout = None
        return _fail(f"error: The output cannot be written: {error}", 2)


def _run(words: list[str]) -> int:
    # Imported here, so that Ctrl-C meanwhile is handled.
    try:
        from tokenflow_sdk.cli.exit_status import run
        from tokenflow_sdk.cli.parser import make_parser
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        return _fail("error: The command line needs rich, which is not installed. Run `pip install rich`.", 2)

    if words[:1] == ["export"]:
        return _export(words[1:])
    if words[:1] == ["serve"]:
        return _serve(words[1:])
    arguments = make_parser().parse_args(words)
    return run(lambda: int(arguments.run(arguments)), arguments.verbosity)


def _prepare_streams() -> None:
    """Let stdout and stderr write characters that their encoding lacks as escapes, and keep closed ones from being reused."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else a file that is opened next would get this number, and messages of C libraries would be written into it.
            os.open(os.devnull, os.O_RDWR)


def _fail(sentence: str, status: int) -> int:
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"{sentence}\n")
    return status


def _export(words: list[str]) -> int:
    """Hand over to the exporter, which is a package of its own: the runtime never imports it, nor what it needs."""
    return int(importlib.import_module("tokenflow_export.cli").main(words))


def _serve(words: list[str]) -> int:
    """Hand over to the server's parser, which is made of its settings and needs the packages of its extra."""
    return int(importlib.import_module("tokenflow_sdk.cli.serve").main(words))
