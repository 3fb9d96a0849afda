"""The `tokenflow` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all went well, 1 when some files of several failed, 2 for a mistake the user can mend, 130 when interrupted.
    """
    from tokenflow_sdk.cli.exit_status import run
    from tokenflow_sdk.cli.parser import make_parser

    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["export"]:
        return _export(words[1:])
    arguments = make_parser().parse_args(words)
    try:
        return run(lambda: int(arguments.run(arguments)))
    except BrokenPipeError:
        # The reader of our output went away (`tokenflow info | head -1`); leave quietly, also at interpreter exit.
        sys.stdout = None
        return 141


def _export(words: list[str]) -> int:
    """Hand over to the exporter, which is a package of its own: the runtime never imports it, nor what it needs."""
    return int(importlib.import_module("tokenflow_export.cli").main(words))
