"""Released size, stand-in weights: `clipb_256` the whole way, and against the released code's outputs."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import engine_builds
from tests.conftest import DATA, ROOT
from tests.support.mini import shorten_reference
from tokenflow_export.checkpoints.tokenizer import load_model, read_state_dict
from tokenflow_export.models.config import VARIANTS
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import pinned_nodes
from tokenflow_sdk.parity.tokenizer import TokenizerReference, scale_cells
from tokenflow_sdk.parity.tokenizer_report import TIE_DISTANCE
from tokenflow_sdk.pictures.images import psnr

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def released() -> dict[str, np.ndarray]:
    """Outputs of the released code on the stand-in weights of `clipb_256`, for one picture."""
    with np.load(DATA / "clipb_256_expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tokenflow_clipb_32k_enhanced.pt"
    command = [sys.executable, "-m", "tokenflow_export", "standin", "--variant", "clipb_256", "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


@pytest.fixture(scope="module")
def readme_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The README's export command, and the peak memory of its process in bytes."""
    directory = tmp_path_factory.mktemp("work")
    (directory / checkpoint.name).symlink_to(checkpoint)
    words = re.search(r"^tokenflow (export tokenizer .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert words
    subprocess.run([sys.executable, "-m", "tokenflow_sdk.cli", *words[1].split()], cwd=directory, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return directory / "bundles" / "released", peak


@pytest.fixture(scope="module")
def full_size(readme_export: tuple[Path, int]) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(readme_export[0]) as tokenizer:
        yield tokenizer


def build_for_tensorrt_rtx(bundle: Path, figure: Callable[[str], None]) -> None:
    """Every graph in float16, without a GPU, by the command."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux and Windows on x86-64")
    found = engine_builds.build(bundle, "fp16", "sm86")
    assert sorted(found.engines) == ["decode", "encode", "features", "semantic"]
    figure(
        f"{Bundle.open(bundle, TokenizerConfig).config.variant}: engines in fp16 for sm86 built in {found.seconds:.0f} s, "
        f"peak memory {found.peak_resident / 1e9:.1f} GB"
    )


def test_every_graph_builds_for_tensorrt_rtx(readme_export: tuple[Path, int], figure: Callable[[str], None]) -> None:
    build_for_tensorrt_rtx(readme_export[0], figure)


def test_half_precision_agrees_on_real_crops(readme_export: tuple[Path, int], tmp_path: Path) -> None:
    """6 crops of a photo, float16 against float32, without anything pinned; one of them and two of the reference decoded."""
    path = Path(shutil.copytree(readme_export[0], tmp_path / "bundle", copy_function=os.link))
    shorten_reference(path, 2)
    words = ["precision-search", path, "--images", ROOT / "examples", "--crops", "6", "--decoded", "1"]
    subprocess.run([sys.executable, "-m", "tokenflow_export", *map(str, words)], cwd=ROOT, check=True)
    bundle = Bundle.open(path, TokenizerConfig)
    figures = bundle.parity["fp16"]
    assert min(figures["agreement"]) >= 0.975
    assert figures["decode_psnr"] >= 45
    assert pinned_nodes(bundle, "fp16") == {}


def test_the_eager_model_is_the_released_code(checkpoint: Path, released: dict[str, np.ndarray]) -> None:
    model = load_model(read_state_dict(checkpoint), VARIANTS["clipb_256"])
    with torch.inference_mode():
        codes, features = model.encode(torch.from_numpy(released["image"])[None])
        assert np.array_equal(codes[0].numpy(), released["code_indices"])
        assert np.abs(features[0].numpy() - released["features"]).max() < 1e-3
        assert psnr(model.decode(codes)[0].numpy(), released["reconstruction"]) >= 55
        assert np.abs(model.semantic(codes)[0].numpy() - released["semantic"].astype(np.float32)).max() < 1e-2


def test_the_bundle_is_the_released_code(full_size: Tokenizer, released: dict[str, np.ndarray]) -> None:
    picture = Image.fromarray(released["image"])
    codes = full_size.encode(picture)
    differing = np.flatnonzero(codes.indices != released["code_indices"])
    if len(differing):
        # Only a tie may differ, in the first scale that does.
        reference = TokenizerReference.load(full_size.bundle)
        latent = full_size.latent(released["image"][None])[0]
        start = 0
        for cells, _ in scale_cells(latent, reference.codebook, full_size.config, released["code_indices"]):
            at = differing[(differing >= start) & (differing < start + len(cells))] - start
            if len(at):
                theirs, ours = released["code_indices"][start + at], codes.indices[start + at]
                margins = 2 * np.einsum("ij,ij->i", cells[at], reference.codebook[theirs] - reference.codebook[ours])
                assert np.abs(margins).max() < TIE_DISTANCE
                break
            start += len(cells)
    expected = full_size.codes(released["code_indices"])
    features = full_size.features(expected).T.reshape(40, 16, 16)
    assert np.abs(features - released["features"]).max() < 1e-3
    assert psnr(np.asarray(full_size.decode(expected)), released["reconstruction"]) >= 55
    assert np.abs(full_size.semantic(expected) - released["semantic"].astype(np.float32)).max() < 1e-2


def test_batches_and_single_pictures_give_the_same_codes(full_size: Tokenizer, released: dict[str, np.ndarray]) -> None:
    images = np.stack([released["image"], released["image"][::-1], released["image"][:, ::-1]])
    with Tokenizer(full_size.bundle, batch_limit=3) as batched:
        codes = batched.encode_array(images)
        assert np.array_equal(codes, full_size.encode_array(images))
        assert np.array_equal(codes, batched.encode_array(images))


def test_exporting_takes_less_than_four_times_the_checkpoints_memory(readme_export: tuple[Path, int], checkpoint: Path) -> None:
    assert readme_export[1] < 4 * checkpoint.stat().st_size
