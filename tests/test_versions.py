"""What pyproject.toml allows and constraints.txt pins: installed and run, or at least resolved, with every Python."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import DATA, ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEMS = ("x86_64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
RUNTIME = ("--extra", "cpu", "--extra", "generate", "--extra", "hub")
UV = Path(sys.executable).parent / "uv"
DRAW = """
import sys
import numpy as np
from tokenflow_sdk import Generator, Tokenizer
with Tokenizer.from_pretrained("tiny", device="cpu") as tok, Generator.from_pretrained("tiny", device="cpu") as gen:
    codes = tok.encode("examples/chelsea.jpg")
    drawn = gen.generate("a red apple", seed=7, preset="fast")
    np.savez(sys.argv[1], codes=codes, picture=tok.decode(codes), drawn=drawn.codes[0])
"""


def uv(*words: str | Path) -> None:
    env = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run([UV, *words, "--quiet"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_lock_names_versions_and_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [\w.<>=!' ()*]+)?", line)] == []


def test_all_places_name_the_same_pythons() -> None:
    classifiers = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert tested is not None
    assert tuple(classifiers) == tuple(re.findall(r"3\.\d+", tested[1])) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("python", "system"), list(zip(PYTHONS, itertools.cycle(SYSTEMS), strict=False)))
def test_the_lock_can_be_installed(tmp_path: Path, python: str, system: str) -> None:
    """There is a wheel for every pin. That PyTorch is for CPUs or not makes no difference here."""
    target = ("--python-version", python, "--python-platform", system, "--only-binary", ":all:")
    uv(
        *(
            "pip",
            "compile",
            *target,
            *RUNTIME,
            "--extra",
            "export",
            "-c",
            "constraints.txt",
            "-o",
            tmp_path / "out",
            "pyproject.toml",
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS[::2])
def test_there_is_a_wheel_for_arm_of_everything_that_runs_there(tmp_path: Path, python: str) -> None:
    """Raspberry Pi, Jetson, Graviton: nothing has to be compiled, whatever the newest versions are."""
    target = ("--python-version", python, "--python-platform", "aarch64-manylinux_2_28", "--only-binary", ":all:")
    extras = (*RUNTIME, "--extra", "serve", "--extra", "dataset")
    uv("pip", "compile", *target, *extras, "-o", tmp_path / "out", "pyproject.toml")
    assert {"numpy", "onnxruntime", "pyarrow"} <= set(re.findall(r"^([a-z-]+)==", (tmp_path / "out").read_text(), re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("versions", ["lowest", "onnxruntime<1.30"])
def test_allowed_versions_give_the_same_codes(tmp_path: Path, python: str, versions: str) -> None:
    """The lowest of all direct requirements, and the last onnxruntime that aborts at products without zero points on x86."""
    here = f"3.{sys.version_info.minor}"
    interpreter = sys.executable if python == here else shutil.which(f"python{python}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"no python{python} on the path")
    uv("venv", "--python", interpreter, tmp_path / "venv")
    runs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    chosen = ("--resolution", "lowest-direct") if versions == "lowest" else (versions,)
    uv("pip", "install", "--python", runs, "--only-binary", ":all:", "-r", "pyproject.toml", *RUNTIME, *chosen)
    subprocess.run(
        [runs, "-W", "error", "-c", DRAW, tmp_path / "found.npz"], cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, check=True
    )
    found, expected = np.load(tmp_path / "found.npz"), np.load(DATA / "tiny_expected.npz")
    np.testing.assert_array_equal(found["codes"], expected["chelsea"])
    # Other processors round differently, and what differs once is drawn on: see tests/test_tiny.py.
    np.testing.assert_array_equal(found["drawn"][:57], expected["red_apple_fast_7"][:57])
    assert found["picture"].shape == (256, 256, 3)
