from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.support.mini import MINI, export_mini, mini_model
from tokenflow_export.cli import main
from tokenflow_export.tokenizer import export as exporter
from tokenflow_export.tokenizer.reference_images import reference_pictures
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import MANIFEST, Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import OutputError, ParityError
from tokenflow_sdk.parity.tokenizer import TokenizerReference


@pytest.mark.parametrize("kind", MINI)
def test_graphs_are_plain_onnx(kind: str, mini_bundles) -> None:
    for name in ("encode", "decode", "semantic", "features"):
        model = onnx.load(mini_bundles(kind) / f"{name}.onnx")
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert not model.functions
        assert not model.metadata_props
        assert all(not node.doc_string and not node.metadata_props for node in model.graph.node)
        assert {node.op_type for node in model.graph.node} & {"Resize"} <= ({"Resize"} if name == "decode" else set())
        assert str(Path.home()).encode() not in (mini_bundles(kind) / f"{name}.onnx").read_bytes()


@pytest.mark.parametrize("kind", MINI)
def test_absent_scales_add_nothing(kind: str, mini_bundles) -> None:
    model = mini_model(kind)
    codes = np.random.default_rng(0).integers(0, 500, (1, 30), np.int32)
    with Tokenizer.from_pretrained(mini_bundles(kind)) as tokenizer, torch.inference_mode():
        for length in (1, 5, 14, 30):
            prefix = torch.from_numpy(codes[:, :length]).long()
            expected = model.quantize.decode(prefix)[0].flatten(1).T.numpy()
            assert np.abs(tokenizer.features(tokenizer.codes(codes[0, :length])) - expected).max() < 1e-5
            difference = tokenizer.decode_array(codes[:, :length]).astype(int) - model.decode(prefix).numpy()
            assert np.abs(difference).max() <= 1
            semantic = tokenizer.semantic(tokenizer.codes(codes[0, :length]))
            assert np.abs(semantic - model.semantic(prefix)[0].numpy()).max() < 1e-4


def test_large_graphs_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow_export.tracing.onnx_export._INLINE_BYTES", 100_000)
    out = export_mini(mini_model("clip"), tmp_path / "b")
    bundle = Bundle.open(out, TokenizerConfig)
    assert [file.name for file in bundle.graph("decode").files] == ["decode.onnx", "decode.onnx.data"]
    content = bytearray((out / "decode.onnx.data").read_bytes())
    content[1000] ^= 1
    (out / "decode.onnx.data").write_bytes(content)
    with pytest.raises(Exception, match=r"decode\.onnx\.data is damaged"):
        bundle.verify()
    (out / "decode.onnx.data").unlink()
    with pytest.raises(Exception, match=r"decode\.onnx\.data is missing from the bundle"):
        Bundle.open(out, TokenizerConfig)


def test_the_manifest_tells_what_was_checked(mini_bundle: Path) -> None:
    data = json.loads((mini_bundle / MANIFEST).read_text())
    assert data["parity"]["pictures"] == 4
    assert len(data["parity"]["agreement"]) == 4
    assert data["provenance"]["checkpoint"] == "mini"
    assert {"torch", "onnx", "onnxruntime", "exporter"} <= set(data["provenance"])


def test_a_bundle_that_fails_its_check_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is computed from other weights than the graphs: the export must notice and leave nothing."""
    other = mini_model("clip", seed=1)
    true_reference = exporter._reference
    monkeypatch.setattr(exporter, "_reference", lambda model, pictures, steps: true_reference(other, pictures, steps))
    with pytest.raises(ParityError, match="The export of mini_clip does not reproduce PyTorch: a code flipped"):
        export_mini(mini_model("clip"), tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_an_existing_bundle_is_kept_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("x")
    with pytest.raises(OutputError, match="b exists already.*--force"):
        export_mini(mini_model("clip"), tmp_path / "b")
    assert (tmp_path / "b" / "precious").exists()
    with pytest.raises(OutputError, match="b is not a bundle, so it is not replaced"):
        export_mini(mini_model("clip"), tmp_path / "b", force=True)
    assert (tmp_path / "b" / "precious").exists()
    (tmp_path / "b" / MANIFEST).write_text("an old one")
    export_mini(mini_model("clip"), tmp_path / "b", force=True)
    assert os.listdir(tmp_path) == ["b"]
    assert not (tmp_path / "b" / "precious").exists()
    Bundle.open(tmp_path / "b", TokenizerConfig).verify()


def test_of_two_exports_at_once_one_wins_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(bundle: Bundle) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / MANIFEST).write_text("the other's")

    monkeypatch.setattr(Bundle, "write_manifest", meanwhile)
    with pytest.raises(OutputError, match="b was made by another process meanwhile"):
        export_mini(mini_model("clip"), tmp_path / "b")
    assert (tmp_path / "b" / MANIFEST).read_text() == "the other's"
    assert os.listdir(tmp_path) == ["b"]


def test_too_little_room_is_said_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("tokenflow_sdk.atomic_directory.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="0.0 GB free; this bundle needs about"):
        export_mini(mini_model("clip"), tmp_path / "b")


@pytest.mark.parametrize(
    ("problem", "error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "Writing .*b failed: No space left on device"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full", "interrupted"],
)
def test_what_ends_an_export_before_its_time_leaves_nothing(
    problem: BaseException, error: type[BaseException], words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        assert list(tmp_path.glob(".b.export-*/new/decode.onnx"))
        raise problem

    monkeypatch.setattr(exporter.np, "savez", fail)
    with pytest.raises(error, match=words):
        export_mini(mini_model("clip"), tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_a_killed_export_leaves_nothing_that_opens(tmp_path: Path, shared_traces: Path, mini_bundle: Path) -> None:
    """Its graphs were traced for `mini_bundle`, so that it comes to writing them sooner."""
    script = (
        "import sys; from pathlib import Path; from tests.support.mini import export_mini, mini_model\n"
        "from tests.support.shared_traces import SharedTraces; from tokenflow_export.tracing import onnx_export\n"
        "onnx_export._capture = SharedTraces(onnx_export._capture, Path(sys.argv[2]))\n"
        "export_mini(mini_model('clip'), Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "b", shared_traces], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".b.export-*/new/decode.onnx")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.rglob(MANIFEST))


def test_mistakes_on_the_command_line_get_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--checkpoint", "missing.pt", "--out", str(tmp_path / "b")]) == 2
    assert "error: Checkpoint 'missing.pt' does not exist." in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("hello")
    assert main(["tokenizer", "--checkpoint", str(tmp_path / "text.pt"), "--out", str(tmp_path / "b")]) == 2
    assert "text.pt cannot be read as a PyTorch checkpoint" in capsys.readouterr().err
    assert main(["standin", "--out", str(tmp_path / "text.pt")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["tokenizer", "--checkpoint", "missing.pt", "--out", str(tmp_path / "text.pt")]) == 2
    assert "text.pt exists already" in capsys.readouterr().err  # before the checkpoint is read
    assert os.listdir(tmp_path) == ["text.pt"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny", "tiny is a name, and a directory is needed here; copy .*tokenizer and give the copy"),
        ("org/name", "there is no directory org/name; .* `hf download org/name --local-dir DIR` and give DIR"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["understanding", "--checkpoint", "x", "--out", "y", "--tokenizer"],
        ["generator", "--checkpoint", "x", "--out", "y", "--tokenizer"],
        ["calibrate", "--images", "x"],
        ["precision-search"],
    ],
)
def test_names_that_are_no_directories_are_told_from_bundles(
    words: list[str], name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, name])
    assert re.search(says, " ".join(capsys.readouterr().err.split()))


def test_without_torch_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "tokenflow_export.checkpoints.tokenizer")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["tokenizer", "--checkpoint", "c.pt", "--out", "b"]) == 2
    assert "error: torch is not installed. Run `pip install 'tokenflow-sdk[cpu,export]'`" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["tokenizer"], ["standin"]])
def test_help_teaches(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    assert left.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_a_small_checkpoint_goes_all_the_way_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`recognise` knows released sizes only, so it is pointed at the small one."""
    from tests.support.mini import mini_state

    torch.save({"ema": mini_state("vitamin"), "steps": 1}, tmp_path / "c.pt")
    monkeypatch.setattr("tokenflow_export.checkpoints.tokenizer.recognise", lambda shapes, variant, name: MINI["vitamin"])
    words = ["tokenizer", "--checkpoint", str(tmp_path / "c.pt"), "--out", str(tmp_path / "deep" / "b")]
    (tmp_path / "photos").mkdir()
    assert main([*words, "--images", str(tmp_path / "photos")]) == 2
    assert "photos holds no pictures" in capsys.readouterr().err
    Image.fromarray(reference_pictures(80, 5)[4, :70]).save(tmp_path / "photos" / "a.png")
    assert main([*words, "--images", str(tmp_path / "photos"), "--license", "apache-2.0"]) == 0
    out = capsys.readouterr().out
    assert "checked on 5 pictures" in out
    assert "teacher-forced code agreement" in out
    bundle = Bundle.open(tmp_path / "deep" / "b", TokenizerConfig)
    assert len(TokenizerReference.load(bundle).images) == 4
    assert bundle.parity["pictures"] == 5
    assert (bundle.provenance["checkpoint"], bundle.provenance["license"]) == ("c.pt", "apache-2.0")
