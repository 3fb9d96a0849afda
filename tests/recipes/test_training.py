"""The recipe's training on a handful of made-up pictures: a few steps, an interruption, and the way into bundles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.tiny import train_decoder, train_tokenizer
from recipes.tiny.config import TINY
from recipes.tiny.data import Pictures, to_tensor
from recipes.tiny.export import write_released_layout
from recipes.tiny.generator_model import SIZES, GeneratorModel
from recipes.tiny.initial import LATENT_NORM, initialise
from recipes.tiny.prompts import BOS, train_prompt_tokenizer
from recipes.tiny.quantizer import TrainingQuantizer
from recipes.tiny.train_decoder import DecoderTraining
from recipes.tiny.train_tokenizer import SAMPLES, TokenizerTraining
from tests.support.generation_oracle import UncachedGenerator
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.models.tokenizer import TokenFlowTokenizer
from tokenflow_sdk.bundle.model_config import GeneratorConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawings of two labels and three photographs, as `recipes.tiny.gather` writes them."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "photos").mkdir()
    rng = np.random.default_rng(0)
    icons = np.repeat(np.repeat(rng.integers(0, 256, (6, 16, 16, 3), np.uint8), 16, axis=1), 16, axis=2)
    np.save(directory / "icons.npy", icons)
    entries = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(directory / "photos" / f"{i}.jpg")
        entries.append(
            {
                "kind": "photo",
                "split": ["train", "heldout", "others"][i],
                "file": f"photos/{i}.jpg",
                "label": None,
                "style": None,
            }
        )
    for row in range(6):
        entry = {"kind": "icon", "split": "heldout" if row == 5 else "train", "row": row}
        entries.append(entry | {"label": ["red apple", "fox"][row % 2], "style": ["noto", "3d", "flat"][row // 2]})
    (directory / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return directory


def test_batches_depend_on_seed_and_step_alone(data: Path) -> None:
    first, again = Pictures(data), Pictures(data)
    for step in (0, 7):
        a, b = first.batch(6, 3, step), again.batch(6, 3, step)
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(x.shape == (256, 256, 3) and x.dtype == np.uint8 for x in a)
    assert not all(np.array_equal(x, y) for x, y in zip(first.batch(6, 3, 0), first.batch(6, 3, 7), strict=True))


def test_the_first_weights_are_a_linear_autoencoder(data: Path) -> None:
    """Before any training, without quantization, decoding is the projection on the principal components."""
    torch.manual_seed(0)
    model = TokenFlowTokenizer(TINY)
    x = to_tensor(Pictures(data).batch(8, 0, 0), CPU)
    initialise(model, x)
    with torch.inference_mode():
        latent = model.pixel_branch(x)
        y = model.decoder(model.post_quant_conv(latent))
    assert float(latent.norm(dim=1).mean()) == pytest.approx(LATENT_NORM, rel=0.2)
    assert float((y - x).square().mean()) < float((x - x.mean((2, 3), keepdim=True)).square().mean())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_training_searches_as_the_released_quantizer_does(data: Path) -> None:
    torch.manual_seed(0)
    model = TokenFlowTokenizer(TINY)
    latent = torch.randn(2, TINY.grid**2, TINY.code_dim, requires_grad=True)
    found = TrainingQuantizer(TINY, CPU)(model, latent)
    with torch.no_grad():
        maps = latent.transpose(1, 2).unflatten(2, (TINY.grid, TINY.grid))
        indices, features = model.quantize.encode(maps)
    assert (found.indices == indices).float().mean() > 0.999
    if torch.equal(found.indices, indices):
        torch.testing.assert_close(found.features.detach(), features.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    found.features.sum().backward()
    torch.testing.assert_close(latent.grad, torch.ones_like(latent))  # straight through


class Patches(torch.nn.Module):
    """Stands in for the teacher, whose package is only installed for training: 112 pixels of each cell."""

    mean, std = torch.zeros(1), torch.ones(1)

    def calibrate(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(x, 16, stride=16).transpose(1, 2)[:, :, :112]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, and a training that initialises its codes after one step and replaces them at every step."""
    narrow = replace(TINY.pixel_encoder, multipliers=(1, 1), patch=8)
    semantic = replace(TINY.semantic_encoder, width=32, layers=1, heads=1, mlp_width=32)
    decoder = replace(TINY.semantic_decoder, width=32, layers=1, heads=1, mlp_width=32)
    small = replace(
        TINY, patch_nums=(1, 4, 16), codebook_size=64, pixel_encoder=narrow, pixel_decoder=narrow,
        semantic_encoder=semantic, semantic_decoder=decoder,
    )  # fmt: skip
    for name, value in {"TINY": small, "Teacher": Patches, "FIRST": 4, "WARM_UP": 1, "RESTART_EVERY": 1}.items():
        monkeypatch.setattr(train_tokenizer, name, value)


@pytest.mark.usefixtures("_small")
def test_a_resumed_tokenizer_training_repeats_the_steps(data: Path, tmp_path: Path) -> None:
    """From the saved state, in another process's place, the next losses and figures are the same to the last bit."""

    def training() -> TokenizerTraining:
        return TokenizerTraining(Pictures(data), 20, 1, 1e-3, seed=3, perceptual=0.1, device=CPU)

    first = training()
    for _ in range(3):
        first.run_step()
    torch.save(first.state() | {"rng": torch.get_rng_state()}, tmp_path / "state")
    expected = [first.run_step() for _ in range(2)]
    state = torch.load(tmp_path / "state", weights_only=True)
    again = training()
    again.load(state)
    torch.set_rng_state(state["rng"])
    assert [again.run_step() for _ in range(2)] == expected
    assert set(expected[0]) == {"codes", "pixels", "semantic", "perceptual"}
    figures = again.evaluate(tmp_path)
    assert figures == first.evaluate(tmp_path)
    assert again.score(figures) == figures["photos"] != figures["others"]
    with Image.open(tmp_path / SAMPLES) as sheet:
        assert sheet.width > 300


@pytest.mark.usefixtures("_small")
def test_a_training_that_begins_with_weights_keeps_their_codes(data: Path) -> None:
    """It quantizes from the first step on, and does not fill the codebooks anew; it trains them."""
    pictures = Pictures(data)
    start = TokenizerTraining(pictures, 20, 1, 1e-3, seed=3, perceptual=0.0, device=CPU).model.state_dict()
    again = TokenizerTraining(pictures, 20, 1, 1e-3, seed=4, perceptual=0.0, device=CPU)
    again.begin(start)
    again.run_step()
    assert again.used.sum() == len(again.pictures.batch(1, 4, 0)) * sum(side * side for side in (1, 4, 16))
    for name, value in again.model.state_dict().items():
        assert torch.allclose(value, start[name], atol=0.02), name
        assert not name.startswith("quantize") or not torch.equal(value, start[name])


@pytest.mark.usefixtures("_small")
def test_training_the_decoder_alone_changes_no_code(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the decoder's own weights, all of which are trained; and from the saved state the steps are the same."""
    monkeypatch.setattr(train_decoder, "TINY", train_tokenizer.TINY)
    monkeypatch.setattr(train_tokenizer, "FEWER_SCALES", 0.5)
    pictures = Pictures(data)
    whole = TokenizerTraining(pictures, 20, 1, 1e-3, seed=3, perceptual=0.0, device=CPU)
    for _ in range(2):
        whole.run_step()
    start = whole.average.state_dict()

    def training() -> DecoderTraining:
        return DecoderTraining(pictures, 20, 2, 1e-3, seed=3, device=CPU)

    first = training()
    first.begin(start)
    losses = [first.run_step()["pixels"]]
    torch.save(first.state(), tmp_path / "state")
    losses += [first.run_step()["pixels"] for _ in range(2)]
    again = training()
    again.load(torch.load(tmp_path / "state", weights_only=True))
    assert [again.run_step()["pixels"] for _ in range(2)] == losses[1:]
    for name, value in first.average.state_dict().items():
        assert torch.equal(value, start[name]) == (name.partition(".")[0] not in ("decoder", "post_quant_conv")), name


def test_the_generator_in_training_is_the_released_model(tmp_path: Path) -> None:
    """Logits equal those of the plain, padded loop over the released layout that it is written to, fed the same codes."""
    torch.manual_seed(0)
    prompts = train_prompt_tokenizer(["red apple", "fox"], TINY.codebook_size)
    start = prompts.token_to_id("<vq_token_0>")
    codebook = torch.nn.functional.normalize(torch.randn(TINY.codebook_size, TINY.code_dim), dim=1)
    model = GeneratorModel(start + 1, codebook).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    write_released_layout(model, prompts, tmp_path)
    config = GeneratorConfig(
        width=256, layers=SIZES.layers, kv_heads=4, head_dim=64, text_size=start + 1, image_token_start=start, bos_id=BOS,
        image_start_ids=(start + TINY.codebook_size,), max_prompt=128, negative_prompt="anything", preset="fast", cfg_scale=7.5,
        patch_nums=TINY.patch_nums, codebook_size=TINY.codebook_size, codebook_sha256="ab" * 32, tokenizer_variant="tiny",
        tokenizer="../tokenizer",
    )  # fmt: skip
    oracle = UncachedGenerator(HfDirectory(tmp_path), config, codebook.numpy())
    ids = [prompts.encode(text, add_special_tokens=False).ids for text in ("a red apple", "fox")]
    codes = torch.randint(TINY.codebook_size, (2, TINY.n_codes))
    redrawn = torch.randint(TINY.codebook_size, (2, TINY.patch_nums[3] ** 2))
    with torch.inference_mode():
        logits = model([[BOS, *row] for row in ids], codes, 4, redrawn)
        for row in range(2):
            f_hat, blocks, place = torch.zeros(TINY.code_dim, 1, 1), [], 0
            for scale, side in enumerate(TINY.patch_nums[:4]):
                if scale:
                    f_hat = oracle._resize(f_hat, side)
                    drawn = oracle._rows(redrawn[row].numpy(), side) if scale == 3 else 0
                    blocks.append(oracle._embed(f_hat + drawn, scale))
                expected = oracle._guided(ids[row], ids[row], blocks, side * side, 0.0)
                torch.testing.assert_close(logits[row, place : place + side * side], expected, atol=2e-4, rtol=2e-4)
                f_hat = f_hat + oracle._rows(codes[row, place : place + side * side].numpy(), side)
                place += side * side
