from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk.cli import console, main

COMMAND = [sys.executable, "-m", "tokenflow_sdk.cli"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # The checkout's packages, whatever the working directory is.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "export")]))
    for name in ("a:cat:.png", "[bold]b[red].png", "猫.png", "z.png"):
        Image.new("RGB", (300, 300), "red").save(name)
    return tmp_path


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tokenflow = " ".join(COMMAND)
    return subprocess.run(  # noqa: S602
        line.format(tokenflow=tokenflow),
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_names_are_printed_as_they_are(mini_bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "[").mkdir()
    (here / "[/x]:smile:").symlink_to(mini_bundle)
    assert main(["encode", "a:cat:.png", "[bold]b[red].png", "--bundle", "[/x]:smile:", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert "a:cat:.png -> out/a:cat:.tfc" in out
    assert "[bold]b[red].png -> out/[bold]b[red].tfc" in out
    assert main(["info", "[/x]:smile:"]) == 0
    assert "[/x]:smile:" in capsys.readouterr().out
    assert main(["encode", "[/y]:cat:.png"]) == 2
    assert "error: No file matches [/y]:cat:.png." in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "width"), [("80", None), ("", 160), ("0", 160), ("wide", 160)])
def test_piped_output_is_as_wide_as_columns_says(columns: str, width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console._width() == width


def test_a_narrow_console_breaks_what_tables_hold_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    table = console.make_table("a", "b")
    table.add_row("tokenflow-sdk[tensorrt-rtx]", "x" * 50)
    console.stdout.print(table, width=20)
    out = capsys.readouterr().out
    assert out.count("x") == 51
    assert "…" not in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, here: Path) -> None:
    done = shell("{tokenflow} encode 猫.png z.png missing猫.png -o out; {tokenflow} info tiny", PYTHONIOENCODING=encoding)
    assert "\\u732b.png -> out/\\u732b.tfc" in done.stdout
    assert "error: missing\\u732b.png cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert sorted(os.listdir("out")) == ["z.tfc", "猫.tfc"]


def test_names_that_are_no_text_are_printed(here: Path) -> None:
    Path("z.png").rename(b"z\xff.png".decode(errors="surrogateescape"))
    done = shell("{tokenflow} encode z*.png -o out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "z\\udcff.png -> out/z\\udcff.tfc" in done.stdout


@pytest.mark.parametrize("words", ["encode z.png -o q.tfc", "info tiny", "--version", "encode --help", "cache list --cache x"])
def test_a_full_output_is_one_line_and_status_2(words: str) -> None:
    done = shell(f"{{tokenflow}} {words} > /dev/full")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "output cannot be written" in done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("words", ["encode z.png -o q.tfc", "info tiny", "cache list --cache x"])
def test_closed_streams_are_no_mistake(words: str, here: Path) -> None:
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = shell(f"{{tokenflow}} {words} {closed}")
        assert (done.returncode, done.stderr) == (0, "")
    if words.startswith("encode"):
        assert main(["info", "q.tfc"]) == 0
        for closed in (">&- 2>&-", "2> /dev/full"):
            assert shell(f"{{tokenflow}} encode missing.png {closed}").returncode == 2


@pytest.mark.parametrize("words", ["info tiny", "--help", "encode z.png"])
def test_a_reader_that_goes_away_ends_the_command_quietly(words: str) -> None:
    done = shell(f"(sleep 0.3; {{tokenflow}} {words}; echo status $? >&2) | true")
    assert done.stderr.splitlines() == ["status 141"]


def test_ctrl_c_at_any_time_is_one_line(here: Path) -> None:
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tokenflow_sdk.cli import main; print('begun', flush=True); sys.exit(main())"
    )
    for delay in (0, 0.02, 0.05, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", script, "encode", "z.png", "-o", "x.tfc"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (130, "interrupted\n")
