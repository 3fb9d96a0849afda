from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from rich.console import Console

from tests.conftest import ROOT
from tests.support.mini import bundled_tokenizer
from tokenflow_export.cli import main
from tokenflow_export.precision.calibrate import MORE, _Judge, calibrate, magnitudes
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tokenizer.reference_images import reference_pictures
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import decoder_ranges
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR
from tokenflow_sdk.passes.quantize import ActivationRanges, inner_convolutions, unscaled_convolutions

STEPS = ProgressSteps(Console(quiet=True))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the bundled tokenizer: with random weights, 8 bits would be too few for most convolutions."""
    return bundled_tokenizer(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    directory = tmp_path / "photos"
    directory.mkdir()
    for number, pixels in enumerate(reference_pictures(96, 5)):
        Image.fromarray(pixels).save(directory / f"{number}.png")
    return directory


def test_magnitudes_are_those_of_the_largest_picture(tiny: Path) -> None:
    bundle = Bundle.open(tiny, TokenizerConfig)
    codes = np.random.default_rng(0).integers(0, 4096, (3, 817)).astype(np.int32)
    found = magnitudes(bundle, codes, (0.5, 0.9, 1.0), STEPS)
    assert list(found) == inner_convolutions(ir.load(tiny / "decode.onnx"))
    each = [magnitudes(bundle, codes[i : i + 1], (0.5, 0.9, 1.0), STEPS) for i in range(3)]
    for name, row in found.items():
        np.testing.assert_array_equal(row, np.max([one[name] for one in each], axis=0))
        assert 0 < row[0] < row[1] < row[2]


def test_what_is_found_is_stored_where_engines_are_built(
    tiny: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(tiny), "--images", str(photos), "--crops", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 crops of 3 photos, measured on 1 crops of 2 others" in out
    bundle = Bundle.open(tiny, TokenizerConfig)
    bundle.verify()
    for dtype in ("int8", "fp8"):
        ranges = decoder_ranges(bundle, dtype)
        figures = bundle.parity[dtype]
        assert len(ranges.magnitudes) == figures["convolutions"]
        assert figures["decode_psnr"] > EIGHT_BIT_PSNR
        assert f"{dtype:>4}  {figures['decode_psnr_mean']:.1f} dB" in out
        assert figures["pictures"] == 1
    monkeypatch.setattr("tokenflow_export.precision.calibrate.QUANTILES", (1.0,))
    held_out = ["--held-out", str(ROOT / "examples")]
    assert main(["calibrate", str(tiny), "--images", str(photos), *held_out, "--crops", "1"]) == 0
    assert "1 crops of 5 photos" in capsys.readouterr().out


def test_where_all_would_cost_too_much_some_are_left_in_half(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny, TokenizerConfig)
    images = reference_pictures(256, 2)
    monkeypatch.setattr("tokenflow_export.precision.calibrate.EightBit", Literal["int8"])
    monkeypatch.setattr("tokenflow_export.precision.calibrate.QUANTILES", (1.0,))
    plain = calibrate(bundle, images[:1], images[1:], STEPS)
    assert plain["int8"].kept == 0
    least = plain["int8"].least_psnr + 2
    monkeypatch.setattr("tokenflow_export.precision.calibrate.MIN_PSNR", least)
    careful = calibrate(bundle, images[:1], images[1:], STEPS)["int8"]
    assert 0 < careful.kept < plain["int8"].convolutions
    assert careful.convolutions + careful.kept == plain["int8"].convolutions
    assert careful.least_psnr >= least
    # What is left in half is first what no norm has scaled, then the beginning of the graph.
    graph = ir.load(tiny / "decode.onnx")
    every, unscaled = inner_convolutions(graph), unscaled_convolutions(graph)
    order = unscaled + [name for name in every if name not in unscaled]
    kept = json.loads((tiny / "ranges.json").read_text())["int8"]["decode"]
    assert set(order[careful.kept :]) == set(kept)


def judged(monkeypatch: pytest.MonkeyPatch, decibels: Callable[[ActivationRanges, int], float], few: int) -> _Judge:
    """A judge of 6 pictures and 20 convolutions, whose pictures have these decibels."""
    judge = _Judge(SimpleNamespace(path=Path("given")), (), np.zeros((6, 1)), np.zeros(6), [f"c{i}" for i in range(20)], STEPS)  # type: ignore[arg-type]
    monkeypatch.setattr("tokenflow_export.precision.calibrate.FEW", few)

    def decode(self: _Judge, ranges: ActivationRanges, rows: Any = slice(None)) -> tuple[Any, Any]:
        numbers = np.arange(6)[rows]
        return numbers, np.array([decibels(ranges, int(number)) for number in numbers])

    monkeypatch.setattr(_Judge, "_decode", decode)
    return judge


def ranges_of(magnitude: float) -> ActivationRanges:
    return ActivationRanges("int8", {f"c{i}": magnitude for i in range(20)})


def test_the_ranges_whose_worst_picture_is_best_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all pictures: the third candidate is better on the first's worst ones alone."""
    table = {1.0: [43.0, 50, 50, 50, 50, 50], 2.0: [60.0, 60, 44, 60, 60, 60], 3.0: [60.0, 60, 60, 60, 60, 42.5]}
    judge = judged(monkeypatch, lambda ranges, picture: table[ranges.magnitudes["c0"]][picture], 1)
    best, ranges, pictures = judge.choose([ranges_of(magnitude) for magnitude in table])
    assert best == 1
    assert len(ranges.magnitudes) == 20
    assert len(pictures) == 6


def test_as_few_convolutions_are_left_as_the_worst_pictures_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def decibels(ranges: ActivationRanges, picture: int) -> float:
        left = 20 - len(ranges.magnitudes)
        assert list(ranges.magnitudes) == [f"c{i}" for i in range(left, 20)]
        # Picture 3 is the worst at first; picture 5 needs three more of them than it.
        return [60.0, 60, 60, 35 + left, 60, 36 + 0.6 * left][picture]

    best, ranges, pictures = judged(monkeypatch, decibels, 6).choose([ranges_of(1.0)])
    assert (best, len(ranges.magnitudes), len(pictures)) == (0, 10, 6)
    # By the worst picture alone 7 are found, and of the two pictures that 8 bits cost most 10.
    assert len(judged(monkeypatch, decibels, 1).choose([ranges_of(1.0)])[1].magnitudes) == 20 - (7 + MORE)
    assert len(judged(monkeypatch, decibels, 2).choose([ranges_of(1.0)])[1].magnitudes) == 10


def test_all_convolutions_are_left_before_a_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def decibels(ranges: ActivationRanges, picture: int) -> float:
        return 43.0 if not ranges.magnitudes or picture < 5 else 30.0 + picture

    assert not judged(monkeypatch, decibels, 6).choose([ranges_of(1.0)])[1].magnitudes
    with pytest.raises(ParityError, match=r"given misses the 42\.0 dB that int8 needs .* half: 41\.0 dB"):
        judged(monkeypatch, lambda ranges, picture: 41.0, 6).choose([ranges_of(1.0)])


def test_a_decoder_that_half_itself_costs_too_much_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = reference_pictures(256, 2)
    monkeypatch.setattr("tokenflow_export.precision.calibrate.EightBit", Literal["int8"])
    monkeypatch.setattr("tokenflow_export.precision.calibrate.QUANTILES", (1.0,))
    monkeypatch.setattr("tokenflow_export.precision.calibrate.MIN_PSNR", 99.0)
    monkeypatch.setattr("tokenflow_export.precision.calibrate.FEW", 1)
    with pytest.raises(ParityError, match=r"misses the 99\.0 dB that int8 needs even with all of its convolutions in half"):
        calibrate(Bundle.open(tiny, TokenizerConfig), images[:1], images[1:], STEPS)
    assert not (tiny / "ranges.json").exists()


def test_pinned_nodes_are_not_rounded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenflow_export.precision.search import store

    name = inner_convolutions(ir.load(tiny / "decode.onnx"))[0]
    store(Bundle.open(tiny, TokenizerConfig), "pinned", {"fp16": {"decode": [name]}}, {})
    bundle = Bundle.open(tiny, TokenizerConfig)
    images = reference_pictures(256, 2)
    monkeypatch.setattr("tokenflow_export.precision.calibrate.EightBit", Literal["int8"])
    monkeypatch.setattr("tokenflow_export.precision.calibrate.QUANTILES", (1.0,))
    calibrate(bundle, images[:1], images[1:], STEPS)
    assert name not in json.loads((tiny / "ranges.json").read_text())["int8"]["decode"]


def test_mistakes_are_named(tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(tiny), "--images", str(photos), "--crops", "0"]) == 2
    assert "--crops 0 measures nothing" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "one")
    assert main(["calibrate", str(tiny), "--images", str(tmp_path / "one")]) == 2
    assert "holds one picture only" in capsys.readouterr().err
