"""Every snippet of the guide to serving runs, in its order, against a server."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.server.conftest import Serve

GUIDE = (ROOT / "docs" / "guides" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8080"


@pytest.mark.filterwarnings("ignore::tokenflow_sdk.errors.PreparationWarning")
def test_every_snippet_runs(serve: Serve, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    if missing := [program for program in ("curl", "node") if shutil.which(program) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    variables: dict[str, object] = {"__name__": "__main__"}
    languages = []
    with serve(aliases=("tiny",)) as url:
        for language, block in re.findall(r"^```(sh|python|js)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE):
            languages.append(language)
            text = block.replace(ADDRESS, url).replace(ADDRESS[7:], url[7:])
            if "tritonclient" in text and find_spec("tritonclient") is None:
                continue  # it wants other versions of packages; test_inference.py runs it in an environment of its own
            if language == "python":
                # The small tokenizer has another size than the bundled one.
                text = text.replace('from_pretrained("tiny")', f"from_pretrained({str(mini_bundle)!r})")
                exec(compile(text, "serving.md", "exec"), variables)  # noqa: S102
                continue
            command = (
                ["sh", "-ec", text.replace("curl -s", "curl -sf")]
                if language == "sh"
                else ["node", "-e", f"(async()=>{{{text}}})()"]
            )
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{block}{done.stderr}"
    assert set(languages) == {"sh", "python", "js"}
    assert {"chelsea.tfc", "preview.webp", "semantic.npy"} <= {path.name for path in tmp_path.iterdir()}
