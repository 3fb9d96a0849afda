from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import on_cpu
from tests.support.mini import bundled_tokenizer, store_ranges


def test_rows_are_measured_once_and_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--variants", "tiny", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "cpu")]
    on_cpu.main(words)
    (path,) = (tmp_path / "cpu").glob("*-1.json")
    stored = json.loads(path.read_text())
    assert list(stored["rows"]) == ["tiny encode", "tiny decode"]
    for row in stored["rows"].values():
        assert all(side["seconds"] > 0 and side["calls"] >= 5 for side in row.values())
    assert stored["rows"]["tiny encode"]["onnxruntime"]["same"] == 1
    assert stored["rows"]["tiny decode"]["onnxruntime"]["psnr"] > 50

    # A run that was interrupted measures the rest.
    del stored["rows"]["tiny decode"]
    stored["rows"]["tiny encode"]["ours"]["seconds"] = 123.0
    path.write_text(json.dumps(stored))
    (tmp_path / "cpu" / "other.json").write_text(path.read_text())
    capsys.readouterr()
    on_cpu.main(words)
    again = json.loads(path.read_text())
    assert again["rows"]["tiny encode"]["ours"]["seconds"] == 123
    assert list(again["rows"]) == ["tiny encode", "tiny decode"]
    table = (tmp_path / "cpu.md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert table.count("**") == 4
    assert table.count("123,000 ms (100.0%)") == 2


def test_a_calibrated_decoder_is_a_side_and_other_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tokenflow-sdk[openvino]'")
    bundle = bundled_tokenizer(tmp_path)
    store_ranges(bundle, 0.01)
    monkeypatch.setattr(on_cpu, "find_bundle", lambda *_: bundle)
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "cache"))
    words = ["--variants", "tiny", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "cpu")]
    on_cpu.main(words)
    (path,) = (tmp_path / "cpu").glob("*-1.json")
    stored = json.loads(path.read_text())
    assert "ours-int8" not in stored["rows"]["tiny encode"]
    # Ranges that are far too small are refused, and a processor without the products is.
    assert re.search("is refused|is not known to have products", stored["rows"]["tiny decode"]["ours-int8"]["why"])
    stored["rows"] = {"clipb_256 encode": {"ours": {"seconds": 1.0, "same": 1.0}}} | stored["rows"]
    stored["rows"]["tiny encode"]["ours"]["seconds"] = 123.0
    path.write_text(json.dumps(stored))
    on_cpu.main([*words, "--again"])
    again = json.loads(path.read_text())["rows"]
    assert list(again) == ["clipb_256 encode", "tiny encode", "tiny decode"]
    assert again["tiny encode"]["ours"]["seconds"] < 100


def test_a_side_without_a_time_says_why() -> None:
    machine = {"cpu": "A", "cores": 2, "instruction_sets": ["AVX2"], "torch": "2", "onnxruntime": "1"}
    row = {
        "torch": {"seconds": 3.0, "calls": 5, "same": 0.999},
        "compile": {"why": "no compiler"},
        "ours": {"seconds": 2.0, "same": 1.0},
        "ours-bf16": {"seconds": 0.75, "same": 0.61},
    }
    decode = {
        "torch": {"seconds": 9.0, "psnr": 84.0},
        "ours-bf16": {"seconds": 4.5, "psnr": 46.0},
        "ours-int8": {"seconds": 3.0, "psnr": 41.0},
    }
    text = on_cpu.page([{"machine": machine, "rows": {"clipb_256 encode": row, "clipb_256 decode": decode}}])
    assert (
        "| clipb_256 encode | 3,000 ms (99.9%) |  | no compiler |  |  | 2,000 ms (100.0%) | 750 ms (61.0%) |  | 1.50x | 4.00x |"
        in text
    )
    # What is certified is the faster of bfloat16 and int8.
    assert "| clipb_256 decode | 9,000 ms (84 dB) |  |  |  |  |  | 4,500 ms (46 dB) | 3,000 ms (41 dB) |  | 3.00x |" in text
    assert "**A, 2 cores, AVX2, torch 2, onnxruntime 1**" in text
