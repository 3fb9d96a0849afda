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

COVERED_BY = {
    "backends/test_tensorrt.py": ["tokenflow_sdk/backends/tensorrt_context"],
    "cli/test_cli.py": [
        f"tokenflow_sdk/cli/{name}"
        for name in [
            "bench",
            "decode",
            "exit_status",
            "opening",
            "parser",
            "reconstruct",
            "verify",
        ]
    ],
    "cli/test_info.py": ["tokenflow_sdk/cli/environment"],
    "dataset/test_rows.py": ["tokenflow_sdk/dataset/parquet"],
    "engines/test_build.py": ["tokenflow_sdk/cli/build"],
    "export/checkpoints/test_tokenizer.py": ["tokenflow_export/checkpoints/strict"],
    "export/language_model/test_generator.py": [
        f"tokenflow_export/language_model/{name}" for name in ("bundle_writer", "generator_check", "projector")
    ],
    "export/language_model/test_understanding.py": ["tokenflow_export/language_model/understanding_check"],
    "export/models/test_models.py": [
        f"tokenflow_export/models/{name}"
        for name in ("clip", "config", "layers", "quantizer", "semantic_decoder", "siglip", "tokenizer", "vitamin", "vqgan")
    ],
    "export/tokenizer/test_export.py": [
        f"tokenflow_export/{name}" for name in ("cli/bundles", "cli/parser", "cli/standin", "progress", "tokenizer/graphs")
    ]
    + ["tokenflow_export/tokenizer/reference_images", "tokenflow_export/versions"],
    "export/precision/test_search.py": ["tokenflow_export/cli/precision"],
    "generation/test_generator.py": [
        "tokenflow_export/models/llama",
        "tokenflow_export/language_model/generator_graphs",
    ],
    "parity/test_tokenizer.py": ["tokenflow_sdk/parity/tokenizer_report"],
    "passes/test_cpu_transformer.py": ["tokenflow_sdk/passes/cpu_graph"],
    "server/test_images.py": [f"tokenflow_sdk/server/{name}" for name in ("bodies", "models")],
    "server/test_guard.py": [f"tokenflow_sdk/server/{name}" for name in ("app", "errors")],
    "server/test_operations.py": ["tokenflow_sdk/server/metrics"],
    "understanding/test_understander.py": ["tokenflow_export/language_model/understanding_graphs"],
}
"""Modules without a test file of their own, by the file that tests them."""


def modules() -> set[str]:
    """Every module of both packages, as `tokenflow_sdk/pictures/codes`."""
    return {
        path.relative_to(root).with_suffix("").as_posix()
        for root in (ROOT, ROOT / "export")
        for path in root.glob("tokenflow_*/**/*.py")
        if not path.stem.startswith("__")
    }


def own_test(module: str) -> Path:
    """Where a module's tests are: in the same place under `tests` or `tests/export`."""
    path = Path(module.replace("tokenflow_sdk/", "").replace("tokenflow_export/", "export/"))
    return ROOT / "tests" / path.with_name(f"test_{path.name}.py")


def test_every_module_has_a_test_file_of_its_own_or_a_line_that_says_where() -> None:
    elsewhere = [module for covered in COVERED_BY.values() for module in covered]
    without = {module for module in modules() if not own_test(module).exists()}
    assert "tokenflow_sdk/pictures/codes" in modules() - without
    assert sorted(elsewhere) == sorted(without)
    assert all((ROOT / "tests" / test).exists() for test in COVERED_BY)


def test_importing_the_sdk_imports_nothing_but_itself() -> None:
    """No package that is not Python's own, NumPy included, and none of its own modules."""
    script = "import sys; before = set(sys.modules); import tokenflow_sdk; print(*sorted(set(sys.modules) - before))"
    new = set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    assert {name for name in new if name.partition(".")[0] not in sys.stdlib_module_names} == {"tokenflow_sdk"}
    assert not new & {"argparse", "asyncio", "dataclasses", "inspect", "logging", "pathlib", "subprocess"}


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


def test_only_the_command_line_needs_rich(mini_bundle: Path) -> None:
    without = "import sys; sys.modules['rich'] = None\n"
    library = (
        without
        + "from tokenflow_sdk import Tokenizer; t = Tokenizer.from_pretrained(sys.argv[1]); t.decode(t.encode(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", library, mini_bundle, ROOT / "examples" / "chelsea.jpg"], check=True)
    command = without + "from tokenflow_sdk.cli import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: The command line needs rich, which is not installed. Run `pip install rich`.\n",
    )


def test_a_package_index_gets_no_link_to_what_it_has_not() -> None:
    tomllib = pytest.importorskip("tomllib")
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text()
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert "[TokenFlow](https://arxiv.org/abs/2412.03069)" in text
    assert "The documentation has guides (export, devices," in text
    assert not re.findall(r"\]\((?!https:)", text)


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
        "RequestStream",
        "RuntimeOptions",
        "SamplingParams",
        "Scales",
        "TokenFlowError",
        "Tokenizer",
        "Understander",
        "__version__",
        "read_codes",
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
        *(f"tokenflow_sdk/_data/models/tiny/{kind}/bundle.json" for kind in ("tokenizer", "generator", "understander")),
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
    # The questions of the third snippet are about what the second one draws.
    tokenizing, generating, understanding = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for snippet in (tokenizing, f"{generating}\n{understanding}"):
        subprocess.run([python, "-c", snippet], cwd=tmp_path, check=True, capture_output=True)
    command = [tmp_path / "venv" / "bin" / "tokenflow", "reconstruct", "examples/chelsea.jpg", "-o", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "817 codes" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"photo.tfc", "apple.png", "out.png"}
