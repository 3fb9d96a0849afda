"""Every command and snippet that README, documentation and examples show is run; everything they link to exists.

`python` and `bash` blocks run, a page's in order, in a directory with the example photo and small bundles where pages have
released ones. `console` blocks show what cannot run here (released checkpoints, GPUs): the parsers must accept their words.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tokenflow_sdk
from tests.conftest import ROOT
from tokenflow_sdk import errors
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.parser import make_parser
from tokenflow_sdk.server import Settings

README = (ROOT / "README.md").read_text()
PAGES = sorted(ROOT.glob("docs/**/*.md"))
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob(".github/**/*.md"),
        *PAGES,
        *ROOT.glob("deploy/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
        *ROOT.glob("models/**/*.md"),
    }
)
SERVED = ROOT / "docs" / "guides" / "serving.md"
"""Its snippets ask a server: tests/server/test_guide.py runs them."""
RUN = [page for page in PAGES if page != SERVED and re.search(r"^```(python|bash)$", page.read_text(), re.MULTILINE)]
SHOWN = [document for document in DOCUMENTS if re.search(r"^```console$", document.read_text(), re.MULTILINE)]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def console_commands(document: Path) -> list[list[str]]:
    """What is typed: every line, or those after a prompt where there is one."""
    commands = []
    for block in re.findall(r"^```console\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
        commands += [words for line in typed if (words := shlex.split(line, comments=True))]
    return commands


def refusal(words: list[str]) -> str | None:
    """Why a command cannot be typed; None: it can."""
    words = words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]
    if words[0] == "tokenflow":
        own = {"export": "tokenflow_export.cli.parser", "serve": "tokenflow_sdk.cli.serve"}.get(words[1])
        parser = importlib.import_module(own).make_parser() if own else make_parser()
        try:
            parser.parse_args(words[2:] if own else words[1:])
        except SystemExit as error:
            return f"the parser exits with {error.code}"
        return None
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if set(words[1:]) <= set(targets) else "there is no such target"
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        found = re.fullmatch(r"tokenflow-sdk\[([a-z,-]+)\]", words[2])
        return None if found and set(found[1].split(",")) <= set(extras) else "there is no such extra"
    if words[:2] == ["python", "-m"]:
        return None if importlib.util.find_spec(words[2]) else "there is no such module"
    if words[0] == "python":
        return None if (ROOT / words[1]).is_file() else "there is no such script"
    if absent := [word for word in words if re.match(r"(deploy|examples)/", word) and not (ROOT / word).exists()]:
        return f"there is no {absent[0]}"
    others = ("cp", "git", "cd", "hf", "uvicorn", "docker", "kubectl", "openssl", "serve", "systemctl")
    return None if words[0] in others else "it is none of the project's commands"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty directory with the example photo where the README has it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@functools.cache
def once(line: str) -> int:
    """The status of a command in this process. One that only prints what the bundled model is need not run for each page."""
    return main(shlex.split(line, comments=True)[1:])


def status(line: str) -> int:
    return (once if re.match("tokenflow (bench|info|verify) tiny", line) else once.__wrapped__)(line)


def run(command: list[object], directory: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_api_snippet_runs(project: Path) -> None:
    tokenizing, generating, understanding = blocks("python")
    assert len(tokenizing.splitlines()) <= 20
    assert "817 codes of 12 bits in 9 scales" in run([sys.executable, "-c", tokenizing], project)
    assert (project / "photo.tfc").exists()
    # The first question is about what was drawn.
    assert run([sys.executable, "-c", f"{generating}\n{understanding}"], project).startswith("An apple.")
    assert (project / "apple.png").exists()


def test_every_command_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    makes = [words for words in commands if words[0] == "make"]
    assert makes == [["make", "demo"], ["make", "test"]]
    others = [words for words in commands if words[0] != "make"]
    shown = {"encode", "tokenize", "decode", "reconstruct", "generate", "ask", "info", "verify", "bench", "cache"}
    assert {words[1] for words in others} == shown
    assert {words[0] for words in others} == {"tokenflow"}
    # One as it stands, the others without starting Python anew.
    run(others[0], project)
    monkeypatch.chdir(project)
    assert [line for line in lines[len(makes) + 1 :] if status(line) != 0] == []
    assert (project / "side_by_side.png").exists()
    assert (project / "photo.png").exists()
    assert (project / "drawn" / "scales.png").exists()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("page", RUN, ids=name)
def test_a_page_runs(
    page: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    mini_bundles: Callable[[str], Path],
    mini_generator: Path,
    mini_understander: Path,
) -> None:
    """In this process: a new one for each line would take a second. `backend="tensorrt"` runs on the stand-in for a GPU."""
    bundles = {"clipb_256": mini_bundles("clip"), "t2i": mini_generator, "chat": mini_understander}
    (project / "bundles").mkdir()
    for bundle, path in bundles.items():
        (project / "bundles" / bundle).symlink_to(path)
    monkeypatch.chdir(project)
    variables: dict[str, object] = {"__name__": "__main__"}
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, name(page), "exec"), variables)  # noqa: S102
            continue
        for line in block.splitlines():
            assert line.startswith("tokenflow "), line
            assert status(line) == 0, line


@pytest.mark.parametrize("document", SHOWN, ids=name)
def test_what_cannot_run_here_can_be_typed(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As after the commands before it: without its parent, `release/tokenizer` would be a name on the hub.
    (tmp_path / "release").mkdir()
    monkeypatch.chdir(tmp_path)
    refused = {" ".join(words): why for words in console_commands(document) if (why := refusal(words))}
    assert not refused


@pytest.mark.parametrize(
    "line",
    [
        "tokenflow export tokenizer --checkpint x.pt --out y",
        "tokenflow build bundles/clipb_256 --recipe rtx4090",
        "make documentation",
        "pip install 'tokenflow-sdk[tensor]'",
        "python docs/no_such_script.py",
        "apt install tokenflow",
        "docker build -f deploy/Dockerfile.none .",
    ],
)
def test_what_cannot_be_typed_is_noticed(line: str) -> None:
    assert refusal(shlex.split(line))


@pytest.mark.parametrize("script", ["write_cli.py", "write_config_keys.py"])
def test_pages_that_are_written_by_a_script_are_what_it_gives(script: str) -> None:
    written = runpy.run_path(str(ROOT / "docs" / script))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](), f"run `python docs/{script}`"


def test_everything_public_is_in_the_reference() -> None:
    described = set()
    for page in ROOT.glob("docs/reference/api/*.md"):
        described |= set(re.findall(r"^::: tokenflow_sdk\.(\w+)$", page.read_text(), re.MULTILINE))
    # The module of errors brings all of them.
    assert described - {"errors"} == set(tokenflow_sdk.__all__) - set(errors.__all__)


def test_the_site_has_every_page() -> None:
    named = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES}


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="the documentation is built with Python 3.11 or newer")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    # Through a link to it the site would be built in the repository.
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    for part in ("tokenflow_sdk", "export", "ARCHITECTURE.md"):
        (tmp_path / part).symlink_to(ROOT / part)
    run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], tmp_path)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    fetched = re.compile(r"<(?:script|img|iframe)[^>]* src=\"?https?://|<link[^>]* rel=\"?stylesheet\"?[^>]* href=\"?https?://")
    assert [page for page in pages if fetched.search(page.read_text())] == []
    # What `:::` could not find would be left as text.
    assert [page for page in pages if ":::" in page.read_text()] == []


def test_the_console_lines_are_tested_elsewhere() -> None:
    """Export at full size in export/test_full_size.py, the install line in test_package.py, the server in server/test_run.py,
    builds in engines/test_build.py."""
    starts = [" ".join(block.split()[:3]) for block in blocks("console")]
    assert starts == [
        "pip install 'tokenflow-sdk[cpu,generate]'",
        "tokenflow export tokenizer",
        "pip install 'tokenflow-sdk[cpu,generate,serve]'",
        "tokenflow build bundles/released",
    ]


def test_the_demo_runs_without_pytorch(project: Path) -> None:
    hidden = "import sys, runpy; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    out = run([sys.executable, "-c", hidden, ROOT / "examples" / "demo.py", "--prompt", "a red apple", "--out", "out"], project)
    assert "817 codes" in out
    assert re.search(r"^  chelsea.jpg: \w.*\.$", out, re.MULTILINE)
    assert re.search(r"^  a red apple: \w.*\.$", out, re.MULTILINE)
    found = sorted(path.name for path in (project / "out").iterdir())
    assert found == ["drawn.png", "photo.tfc", "reconstruction.png", "side_by_side.png"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
    for target in re.findall(
        r"`((?:tokenflow_sdk|export|recipes|engines|tests|benchmarks|examples|docs|models)/[\w/.-]+)`", document.read_text()
    ):
        assert (ROOT / target).exists(), target


def test_the_makefile_has_what_the_readme_names() -> None:
    done = run(["make", "-s", "-C", ROOT, "help"], ROOT)
    assert {line.split()[0] for line in done.splitlines()} == {
        "install",
        "lock",
        "demo",
        "test",
        "test-one",
        "test-slow",
        "fuzz",
        "soak",
        "soak-server",
        "test-gpu",
        "lint",
        "docs",
        "bench",
        "bench-gpu",
        "tiny-data",
        "tiny",
        "clean",
        "help",
    }


def test_every_environment_variable_is_in_the_table() -> None:
    code = [*ROOT.glob("tokenflow_sdk/**/*.py"), *ROOT.glob("export/**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "Makefile"]
    used = {name for path in code for name in re.findall(r"\bTOKENFLOW_[A-Z_]*[A-Z]\b", path.read_text())}
    read = {
        name
        for path in code[:-1]
        if path.is_relative_to(ROOT / "tokenflow_sdk")
        for name in re.findall(r"""environ(?:\.\w+\(|\[)"(\w+)""", path.read_text())
    }
    assert {"TOKENFLOW_CACHE", "OMP_NUM_THREADS"} <= used | read
    table = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs/reference/environment.md").read_text()))
    # The server's settings are in the table as one line; its flags have the same names.
    settings = {f"TOKENFLOW_SERVE_{name.upper()}" for name in Settings.model_fields}
    assert (used | read) - settings <= table
