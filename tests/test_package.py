from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tokenflow_sdk
from tests.conftest import ROOT

HEAVY = (
    "numpy",
    "PIL",
    "torch",
    "onnx",
    "onnxruntime",
    "rich",
    "tokenflow_export",
    "huggingface_hub",
    "tokenizers",
    "argparse",
)


def test_importing_the_sdk_imports_nothing_heavy() -> None:
    script = f"import sys, tokenflow_sdk; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_using_the_sdk_never_imports_torch(mini_bundle: Path) -> None:
    script = (
        "import sys; from tokenflow_sdk import Tokenizer\n"
        "tok = Tokenizer.from_pretrained(sys.argv[1]); tok.decode(tok.encode(sys.argv[2]))\n"
        "import tokenflow_sdk.cli.parser, tokenflow_sdk.parity.tokenizer\n"
        "print(sorted({'torch', 'onnx', 'tokenflow_export'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, mini_bundle, ROOT / "examples" / "chelsea.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_names_what_is_public() -> None:
    assert sorted(tokenflow_sdk.__all__) == [
        "Answer",
        "AnswerParams",
        "BuildConfig",
        "Bundle",
        "Chat",
        "Codes",
        "GeneratedScale",
        "Generation",
        "Generator",
        "Pass",
        "RuntimeOptions",
        "SamplingParams",
        "Scales",
        "TokenFlowError",
        "Tokenizer",
        "Understander",
        "__version__",
    ]
    assert all(hasattr(tokenflow_sdk, name) for name in tokenflow_sdk.__all__)


def test_imports_run_one_way() -> None:
    """The contracts in pyproject.toml: each package imports only from those below it."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.slow
def test_a_wheel_alone_in_an_empty_environment_runs_the_readme(tmp_path: Path) -> None:
    """What a device gets: the wheel with its bundled model and one engine, no repository and no torch."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "tokenflow_sdk/tokenizer.py",
        "tokenflow_sdk/_data/models/tiny/tokenizer/bundle.json",
        "tokenflow_sdk/py.typed",
        "tokenflow_export/cli/__init__.py",
    } <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tokenflow_export", "tokenflow_sdk"}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        f"{wheel}[cpu,generate]",
    ]
    subprocess.run(install, check=True)
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "chelsea.jpg", tmp_path / "examples")
    # The third snippet needs a model that does not come with the package.
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]:
        subprocess.run([python, "-c", snippet], cwd=tmp_path, check=True, capture_output=True)
    command = [tmp_path / "venv" / "bin" / "tokenflow", "reconstruct", "examples/chelsea.jpg", "-o", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "817 codes" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"photo.tfc", "apple.png", "out.png"}
