"""The argument parser's class: help that keeps its words whole, and suggestions for misspelt ones."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Parser", "add_verbosity"]

_CHOICE = re.compile(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)")


class _Formatter(argparse.HelpFormatter):
    """Breaks lines at spaces only, so that `tensorrt-rtx` and paths stay whole. Texts of several lines stay as they are."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines() if "\n" in text else self._split_lines(text, width)
        return "\n".join(f"{indent}{line}".rstrip() for line in lines)


class Parser(argparse.ArgumentParser):
    """Lets `main` handle output that cannot be written, which argparse ignores. Its subparsers are of this class too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"formatter_class": _Formatter} | options))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is not None:
            file.write(message)

    def error(self, message: str) -> NoReturn:
        """As argparse's, with the nearest name where one is misspelt."""
        if (found := _CHOICE.search(message)) is not None:
            names = re.findall(r"[\w.-]+", found[2])
            close = difflib.get_close_matches(found[1].lower(), names, 1)
            message += f"; did you mean {close[0]}?" if close else ""
        super().error(message)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add -q and -v, which set `verbosity` to -1 and 1; else it is 0. The exporter's commands have them too."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-q", "--quiet", dest="verbosity", action="store_const", const=-1, default=0, help="print results and errors only"
    )
    group.add_argument("-v", "--verbose", dest="verbosity", action="store_const", const=1, default=0, help="also print details")
