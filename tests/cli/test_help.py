from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tokenflow_export.cli.parser import make_parser as make_export_parser
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.parser import make_parser


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


def words(texts: Iterator[str]) -> set[str]:
    return {word for text in texts for word in text.split()}


def test_help_fits_80_columns_and_keeps_words_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for parser in [*parsers(make_parser()), *parsers(make_export_parser())]:
        shown = parser.format_help()
        assert max(map(len, shown.splitlines())) < 80, parser.prog
        helps = (action.help % (vars(action) | {"prog": parser.prog}) for action in parser._actions if action.help)
        assert words(helps) <= words(iter([shown])), parser.prog


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("encod x.png", "encode"),
        ("Info", "info"),
        ("encode x.png --backend tensort", "tensorrt"),
        ("export tokeniser", "tokenizer"),
        ("export tokenizer --checkpoint x.pt --out y --variant clipb256", "clipb_256"),
    ],
)
def test_misspelt_words_are_told_the_nearest(line: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert f"; did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "command", "remedy"),
    [
        ("encode x.png --bundel tiny", "tokenflow encode", "--bundel tiny; did you mean --bundle?"),
        ("verify --bundel=tiny", "tokenflow verify", "--bundel=tiny; did you mean --bundle?"),
        ("export standin --out x --varient y", "tokenflow export standin", "--varient y; did you mean --variant?"),
        ("generate a red apple", "tokenflow generate", "red apple; put words that belong together in quotes"),
        ("reconstruct my photo.jpg", "tokenflow reconstruct", "photo.jpg; put words that belong together in quotes"),
        ("-q encode x.png", "tokenflow", "-q is no option of tokenflow; options of a command come after it"),
        ("--bundle tiny encode x.png", "tokenflow", "--bundle is no option of tokenflow; options of a command come after it"),
        ("export -v standin", "tokenflow export", "-v is no option of tokenflow export; options of a command come after it"),
    ],
)
def test_words_that_a_command_does_not_know_get_its_usage_and_a_remedy(
    line: str, command: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: {command} [-h]")
    assert error.startswith(f"{command}: error: ")
    assert error.endswith(remedy)


def test_every_command_and_argument_is_described() -> None:
    for parser in [*parsers(make_parser()), *parsers(make_export_parser())]:
        # What is handed on by its name alone has no help here.
        assert parser.description or not parser.add_help, parser.prog
        arguments = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
        assert [action.dest for action in arguments if not action.help] == [], parser.prog


def test_a_word_like_no_other_is_told_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["xyzzy"])
    with pytest.raises(SystemExit, match="2"):
        main(["encode", "x.png", "--xyzzy", "-p"])
    assert "did you mean" not in capsys.readouterr().err


def test_the_package_itself_runs_the_command() -> None:
    command = [sys.executable, "-m", "tokenflow_sdk", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("tokenflow-sdk ")
