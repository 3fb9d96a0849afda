"""Every command and snippet that README and examples show is run; everything they link to exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenflow_sdk.cli import main

README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
        *ROOT.glob("models/**/*.md"),
    }
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty directory with the example photo where the README has it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.fixture
def chat_bundle(project: Path, mini_understander: Path) -> None:
    """A small understander with random weights where the README has one."""
    (project / "bundles").mkdir()
    (project / "bundles" / "chat").symlink_to(mini_understander)


def run(command: list[object], directory: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("chat_bundle")
def test_the_api_snippet_runs(project: Path) -> None:
    tokenizing, generating, understanding = blocks("python")
    assert len(tokenizing.splitlines()) <= 20
    assert "817 codes of 12 bits in 9 scales" in run([sys.executable, "-c", tokenizing], project)
    assert (project / "photo.tfc").exists()
    run([sys.executable, "-c", generating], project)
    assert (project / "apple.png").exists()
    run([sys.executable, "-c", understanding], project)


@pytest.mark.usefixtures("chat_bundle")
def test_every_command_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    makes = [words for words in commands if words[0] == "make"]
    assert makes == [["make", "demo"], ["make", "test"]]
    others = [words for words in commands if words[0] != "make"]
    shown = {"encode", "decode", "reconstruct", "generate", "ask", "info", "verify", "bench", "cache"}
    assert {words[1] for words in others} == shown
    assert {words[0] for words in others} == {"tokenflow"}
    # One as it stands, the others without starting Python anew.
    run(others[0], project)
    monkeypatch.chdir(project)
    assert [words for words in others[1:] if main(words[1:]) != 0] == []
    assert (project / "side_by_side.png").exists()
    assert (project / "photo.png").exists()
    assert (project / "drawn" / "scales.png").exists()


def test_the_console_lines_are_tested_elsewhere() -> None:
    """Export at full size in export/test_full_size.py, the install line in test_package.py, builds in engines/test_build.py."""
    starts = [" ".join(block.split()[:3]) for block in blocks("console")]
    assert starts == [
        "pip install 'tokenflow-sdk[cpu,generate]'",
        "tokenflow export tokenizer",
        "tokenflow build bundles/released",
    ]


def test_the_quickstart_runs(project: Path) -> None:
    out = run([sys.executable, ROOT / "examples" / "quickstart.py", "tiny", "examples/chelsea.jpg"], project)
    assert "(2, 817) (2, 256, 256, 3)" in out


def test_the_demo_runs_without_pytorch(project: Path) -> None:
    hidden = "import sys, runpy; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    out = run([sys.executable, "-c", hidden, ROOT / "examples" / "demo.py", "--prompt", "a red apple", "--out", "out"], project)
    assert "817 codes" in out
    found = sorted(path.name for path in (project / "out").iterdir())
    assert found == ["drawn.png", "photo.tfc", "reconstruction.png", "side_by_side.png"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
    for target in re.findall(
        r"`((?:tokenflow_sdk|export|recipes|engines|tests|benchmarks|examples|docs)/[\w/.-]+)`", document.read_text()
    ):
        assert (ROOT / target).exists(), target


def test_the_makefile_has_what_the_readme_names() -> None:
    done = run(["make", "-s", "-C", ROOT, "help"], ROOT)
    assert {line.split()[0] for line in done.splitlines()} == {
        "install",
        "demo",
        "test",
        "test-slow",
        "test-gpu",
        "lint",
        "bench",
        "bench-gpu",
        "tiny-data",
        "tiny",
        "clean",
        "help",
    }
