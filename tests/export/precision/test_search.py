from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tokenflow_export.cli import main
from tokenflow_export.precision.search import Score, crops, search, store_pinned
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import pinned_nodes
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.errors import CorruptBundleError, ParityError

EXAMPLES = ROOT / "examples"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_pinning_stops_as_soon_as_it_is_good_enough(costs: list[float], share: float) -> None:
    """With costs that add up: what is pinned suffices, and without its last group it would not."""
    nodes = [f"n{i}" for i in range(len(costs))]
    allowed = share * sum(costs)

    def measure(pinned: Collection[str]) -> Score:
        error = sum(cost for node, cost in zip(nodes, costs, strict=True) if node not in pinned)
        return Score(error, () if error <= allowed + 1e-9 else ("too much",))

    pinned = search(nodes, measure, "It")
    assert not measure(pinned).failures
    groups = [list(group) for group in np.array_split(nodes, min(12, len(nodes))) if set(group) <= set(pinned)]
    assert sorted(pinned) == sorted(node for group in groups for node in group)
    if pinned:
        last = next(group for group in groups if group[-1] == pinned[-1])
        assert measure([node for node in pinned if node not in last]).failures


def test_groups_that_leave_no_numbers_are_pinned_last() -> None:
    """Two nodes overflow: neither alone mends it, and a third costs a little."""

    def measure(pinned: Collection[str]) -> Score:
        if not {"b", "c"} <= set(pinned):
            return Score(float("nan") if "e" not in pinned else 9.0, ("overflow",))
        return Score(1.0, ())

    assert search(list("abcde"), measure, "It") == ("e", "a", "b", "c")


def test_groups_may_be_compared_on_less() -> None:
    seen: list[tuple[str, ...]] = []

    def rank(pinned: Collection[str]) -> Score:
        seen.append(tuple(pinned))
        return Score(0.0 if "b" in pinned else 1.0, ("ignored",))

    assert search(["a", "b"], lambda pinned: Score(0.0, () if "b" in pinned else ("low",)), "It", rank) == ("b",)
    assert seen == [("a",), ("b",)]


def test_no_choice_of_nodes_may_be_good_enough() -> None:
    with pytest.raises(ParityError, match="It misses its tolerances.*: 1 dB.*--precision fp32"):
        search(["a", "b"], lambda pinned: Score(1.0, ("1 dB",)), "It")


def test_crops_are_of_the_asked_size_and_always_the_same() -> None:
    found = crops([EXAMPLES / "chelsea.jpg"], 3, 64)
    assert (found.shape, found.dtype) == ((3, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(found, crops([EXAMPLES / "chelsea.jpg"], 3, 64))
    assert not np.array_equal(found[0], found[1])


def test_what_is_found_is_stored_where_engines_are_built(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["precision-search", str(bundle_copy), "--images", str(EXAMPLES), "--crops", "2"]
    assert main([*words, "--decoded", "3"]) == 2
    assert "--decoded 3 is not of the 2 crops" in capsys.readouterr().err
    assert main([*words, "--decoded", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 x 4" in out
    bundle = Bundle.open(bundle_copy, TokenizerConfig)
    bundle.verify()
    assert min(bundle.parity["fp16"]["agreement"]) >= 0.975
    assert bundle.parity["fp16"]["decode_psnr"] > 45
    assert pinned_nodes(bundle, "fp16") == {}
    assert main([*words, "--agreement", "1.1"]) == 2
    assert main(words[:2]) == 2
    assert "Give a directory of them as --images" in capsys.readouterr().err


def test_precisions_are_stored_beside_each_other(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy, TokenizerConfig)
    store_pinned(opened, "bf16", {"encode": ("a", "b"), "decode": ()}, {"pictures": 3})
    store_pinned(opened, "fp16", {"decode": ("c",)}, {"pictures": 4})
    store_pinned(opened, "fp16", {"decode": ("d",)}, {"pictures": 5})
    bundle = Bundle.open(bundle_copy, TokenizerConfig)
    bundle.verify()
    assert pinned_nodes(bundle, "bf16") == {"encode": ("a", "b")}
    assert pinned_nodes(bundle, "fp16") == {"decode": ("d",)}
    assert (bundle.parity["bf16"], bundle.parity["fp16"]) == ({"pictures": 3}, {"pictures": 5})
    assert "agreement" in bundle.parity


def test_pinned_nodes_make_another_engine(bundle_copy: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux and Windows on x86-64")
    assert main(["precision-search", str(bundle_copy), "--images", str(EXAMPLES), "--crops", "1"]) == 0
    bundle = Bundle.open(bundle_copy, TokenizerConfig)
    build_config = BuildConfig(targets=("sm86",))
    plain = {job.key.graph: job.key for job in engine_jobs(bundle, build_config, trt)}
    path = bundle_copy / "pinned.json"
    path.write_text(json.dumps({"fp16": {"decode": ["node_conv2d"]}}))
    manifest = json.loads((bundle_copy / "bundle.json").read_text())
    from tokenflow_export.tracing.onnx_export import file_entry

    entry = file_entry(path)
    manifest["assets"]["pinned"] = {"name": entry.name, "size": entry.size, "sha256": entry.sha256}
    (bundle_copy / "bundle.json").write_text(json.dumps(manifest))
    jobs = {job.key.graph: job for job in engine_jobs(Bundle.open(bundle_copy, TokenizerConfig), build_config, trt)}
    assert jobs["decode"].pinned == ("node_conv2d",)
    assert jobs["decode"].key.precision.startswith("fp16, 1 pinned")
    assert jobs["encode"].key == plain["encode"]
    path.write_bytes(b"x" * entry.size)
    with pytest.raises(CorruptBundleError, match="pinned.json is damaged"):
        list(engine_jobs(Bundle.open(bundle_copy, TokenizerConfig), build_config, trt))
