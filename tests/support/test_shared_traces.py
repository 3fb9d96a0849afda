from __future__ import annotations

import os
from pathlib import Path

from tests.support.shared_traces import traces_of


def test_traces_are_kept_as_long_as_sources_are_the_same(tmp_path: Path) -> None:
    source = tmp_path / "export" / "model.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    first = traces_of(tmp_path)
    (first / "a.onnx").write_bytes(b"graph")
    assert traces_of(tmp_path) == first
    source.write_text("x = 2\n")
    second = traces_of(tmp_path)
    assert second != first
    assert first.exists(), "another run may be using them"
    os.utime(first, (0, 0))
    assert traces_of(tmp_path) == second
    assert not first.exists()
