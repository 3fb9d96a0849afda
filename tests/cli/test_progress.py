from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_export.cli import main as export
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.exit_status import run
from tokenflow_sdk.cli.progress import progress_bar

LOGGER = logging.getLogger("tokenflow_sdk")


def steps(verbosity: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command with two kinds of steps, a warning and an error says on stderr."""

    def command() -> int:
        with progress_bar("measuring", 2) as done, ProgressSteps() as exporting:
            done(1)
            exporting.start("tracing encode", total=1)
            exporting.fraction(0.5)
        LOGGER.debug("detail")
        LOGGER.warning("odd")
        LOGGER.error("bad")
        return 0

    assert run(command, verbosity) == 0
    return capsys.readouterr().err.splitlines()


def test_off_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["measuring", "tracing encode", "warning: odd", "error: bad"]
    assert steps(0, capsys) == lines
    assert steps(-1, capsys) == lines[3:]
    assert steps(1, capsys) == [*lines[:2], "detail", *lines[2:]]
    assert (LOGGER.level, LOGGER.handlers) == (logging.NOTSET, [])


def test_a_fault_of_the_program_is_logged_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        try:
            raise KeyError("[odd]")
        except KeyError as error:
            LOGGER.error("a request failed", exc_info=error)
        return 0

    assert run(command) == 0
    said = capsys.readouterr().err.splitlines()
    assert (said[0], said[-1]) == ("error: a request failed", "KeyError: '[odd]'")
    assert __file__ in said[2]


def test_quiet_and_verbose_are_options_of_every_command(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.open(ROOT / "examples" / "chelsea.jpg").save("p.png")
    words = ["encode", "p.png", "--bundle", str(mini_bundle), "--force"]
    assert main(words) == 0
    assert capsys.readouterr() == ("p.png -> p.tfc  30 codes, 119 bytes\n", "")
    assert main([*words, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*words, "-v"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"opening {mini_bundle}\nnot on ")
    assert "runs on onnxruntime, CPU: always works" in said
    assert main(["verify", str(mini_bundle)]) == 0
    assert capsys.readouterr().err == f"opening {mini_bundle}\ncomparing with PyTorch\n"
    for command in (main, export):
        with pytest.raises(SystemExit):
            command(["verify" if command is main else "standin", "-q", "-v"])
        assert "not allowed with" in capsys.readouterr().err
