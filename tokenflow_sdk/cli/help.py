"""The argument parser's class: help that keeps its words whole, and suggestions for misspelt ones."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Parser", "add_command", "add_verbosity"]

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

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override] # argparse's has overloads
        """As argparse's, but a command refuses words that it does not know itself, with its own usage: none are left over."""
        words = sys.argv[1:] if args is None else list(args)
        # Else the option's value might be taken for the command.
        if self._subparsers is not None and words and words[0].startswith("-") and not self._begins_an_option(words[0]):
            self.error(f"{words[0]} is no option of {self.prog}; options of a command come after it")
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._remedy(unknown)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """As argparse's, with the nearest name where one is misspelt."""
        if (found := _CHOICE.search(message)) is not None:
            message += _nearest(found[1].lower(), re.findall(r"[\w.-]+", found[2]))
        super().error(message)

    def _begins_an_option(self, word: str) -> bool:
        return any(option.startswith(word) for option in self._option_string_actions)

    def _remedy(self, unknown: Sequence[str]) -> str:
        misspelt = next((word for word in unknown if word.startswith("-")), None)
        if misspelt is None:
            return "; put words that belong together in quotes"
        return _nearest(misspelt.partition("=")[0], self._option_string_actions, 0.7)


def _nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(word, list(names), 1, cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def add_command(subparsers: argparse._SubParsersAction[Parser], name: str, summary: str) -> Parser:
    """Add a command with -q and -v, whose help begins with its summary."""
    parser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    add_verbosity(parser)
    return parser


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add -q and -v, which set `verbosity` to -1 and 1; else it is 0. The exporter's commands have them too."""
    group = parser.add_mutually_exclusive_group()
    quiet = "print results and errors only: no progress, and no lines about files that were written"
    group.add_argument("-q", "--quiet", dest="verbosity", action="store_const", const=-1, default=0, help=quiet)
    group.add_argument("-v", "--verbose", dest="verbosity", action="store_const", const=1, default=0, help="also print details")
