"""Writes docs/reference/cli.md from the parsers of `tokenflow` and `tokenflow export`: `python docs/write_cli.py`.

It is made from what the parsers hold, because each version of Python formats help differently. A test fails when the file is
not what this gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenflow_export.cli.parser import make_parser as make_export_parser
from tokenflow_sdk.cli.parser import make_parser
from tokenflow_sdk.cli.serve import make_parser as make_serve_parser

PAGE = Path(__file__).parent / "reference" / "cli.md"

_HEAD = """\
# Command line

Written by `docs/write_cli.py` from the parsers; `tokenflow COMMAND --help` says the same. The exit status is 0 when all went
well, 1 when some files of several failed, 2 for a mistake that the message tells how to mend, 130 after Ctrl-C, 143 after
SIGTERM, 129 after SIGHUP.

"""


def page() -> str:
    """The whole page."""
    parsers = make_parser(), make_serve_parser(), make_export_parser()
    return _HEAD + "\n".join(line for parser in parsers for line in _section(parser))


def _section(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A parser and what is below it."""
    commands = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
    yield f"## {parser.prog}\n"
    first, _, examples = (parser.description or "").partition("\n\n")
    yield f"{' '.join(first.split())}\n"
    if examples:
        yield "```text\n{}\n```\n".format(examples.strip("\n"))
    if commands is not None:
        for name, command in commands.choices.items():
            # These are parsers of their own, which follow.
            if name not in ("export", "serve"):
                yield from _section(command)
        return
    yield f"```text\n{_usage(parser)}\n```\n"
    yield "| argument | what |"
    yield "| --- | --- |"
    for action in parser._actions:
        if action.option_strings != ["-h", "--help"]:
            yield f"| {_name(action)} | {_help(action)} |"
    yield ""


def _usage(parser: argparse.ArgumentParser) -> str:
    required = [action for action in parser._actions if action.required and action.option_strings]
    options = [f"{action.option_strings[-1]} {_value(action)}" for action in required]
    positional = [_value(action) for action in parser._actions if not action.option_strings]
    return " ".join([parser.prog, *positional, *options, "[OPTION ...]"])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    name = action.metavar or choices or action.dest.upper()
    if action.nargs == "?":
        return f"[{name}]"
    return f"{name} [{name} ...]" if action.nargs == "+" else str(name)


def _name(action: argparse.Action) -> str:
    words = " ".join([", ".join(action.option_strings), _value(action)]).strip()
    return f"`{words}`".replace("|", "\\|")


def _help(action: argparse.Action) -> str:
    return ((action.help or "") % vars(action)).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
