from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.support.mini_generator import SMALLEST, export_quietly, generator_shapes, tokenizer_bundle, write_checkpoint
from tokenflow_export.cli import main
from tokenflow_export.precision.generator_search import search_generator
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.engines.annotations import pinned_nodes
from tokenflow_sdk.errors import ArgumentError

PATCH_NUMS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator whose layer computes numbers beyond float16's largest and scales them back: in float32 it is as others."""
    directory = tmp_path_factory.mktemp("wide")
    checkpoint = write_checkpoint(directory / "hf", SMALLEST, generator_shapes(SMALLEST, 44, 500, PATCH_NUMS), 40, 500)
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    for name, factor in (("up", 2.0**24), ("down", 2.0**-24)):
        weights[f"model.layers.0.mlp.{name}_proj.weight"] *= factor
    save_file(weights, file)
    return export_quietly(checkpoint, tokenizer_bundle(directory / "tok", PATCH_NUMS, 500), directory / "bundle")


def test_both_precisions_cost_a_generator_little(
    mini_generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(mini_generator, tmp_path / "copy"))
    for precision in ("fp16", "bf16"):
        assert main(["precision-search", str(copy), "--precision", precision]) == 0
        assert "0 of 9 products pinned" in capsys.readouterr().out
    bundle = Bundle.open(copy, GeneratorConfig)
    bundle.verify()
    fp16, bf16 = (bundle.parity[precision] for precision in ("fp16", "bf16"))
    assert 0 < 3 * fp16["hidden_error"] < bf16["hidden_error"] < 0.2
    assert 1 > fp16["hidden_cosine"] > bf16["hidden_cosine"] > 0.999
    assert pinned_nodes(bundle, "fp16") == pinned_nodes(bundle, "bf16") == {}


def test_bfloat16_has_the_range_that_float16_lacks(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float16 overflows until both products of a layer that meet the large numbers are pinned; bfloat16 needs nothing."""
    assert main(["precision-search", str(wide), "--precision", "bf16"]) == 0
    assert "0 of 9 products pinned" in capsys.readouterr().out
    assert main(["precision-search", str(wide), "--precision", "fp16"]) == 0
    out = capsys.readouterr().out
    assert "with nothing pinned: hidden states cosine nan" in out
    bundle = Bundle.open(wide, GeneratorConfig)
    assert pinned_nodes(bundle, "bf16") == {}
    assert len(pinned_nodes(bundle, "fp16")["transformer"]) >= 2


def test_weights_in_8_bits_are_compared_with_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engines have no integer products: float32 with the same weights is what half precision adds to, and what the bundled
    generator's certificate compares with."""
    bundle = Path(shutil.copytree(find_bundle("tiny", "generator"), tmp_path / "bundle"))
    same = {}
    for precision in ("fp16", "bf16"):
        assert main(["precision-search", str(bundle), "--precision", precision]) == 0
        out = capsys.readouterr().out
        certificate = float(re.search(r"certificate: hidden states cosine ([\d.]+)", out)[1])
        report = Bundle.open(bundle, GeneratorConfig).parity[precision]
        assert abs(certificate - report["hidden_cosine"]) < 2e-5
        assert 0.9999 < report["hidden_cosine"] < 1
        same[precision] = report["same_choice"]
    assert same["fp16"] >= same["bf16"] > 0.95


def test_what_cannot_be_measured_is_named(
    mini_generator: Path, mini_understander: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["precision-search", str(mini_generator), "--images", "examples"]) == 2
    assert "Leave --images out" in capsys.readouterr().err
    assert main(["precision-search", str(mini_understander), "--images", "examples"]) == 2
    assert "kind 'understander'" in capsys.readouterr().err
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    entry = bundle.graph("transformer")
    halved = replace(entry, inputs=tuple(replace(spec, dtype="float16") for spec in entry.inputs))
    with pytest.raises(ArgumentError, match=r"exported in float16.*--dtype fp32"):
        search_generator(replace(bundle, graphs={"transformer": halved}), "fp16", ProgressSteps(Console(quiet=True)))
