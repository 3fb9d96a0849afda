from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.generator_vs_eager import random_prompts
from benchmarks.gpu.codecs import TorchCodec, engine_plan
from benchmarks.gpu.device import Device
from export.hf_directory import HfDirectory
from tests.generation_oracle import UncachedGenerator
from tests.mini import mini_model
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle import Bundle, load_codebook
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.images import psnr

KINDS = ("clip", "siglip", "vitamin")


def pictures(codec_config, count: int) -> np.ndarray:
    size = codec_config.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_float32_is_the_reference_model(tokenizer: Tokenizer) -> None:
    model = mini_model("clip")
    codec = TorchCodec(model, tokenizer.config, Device())
    images = pictures(tokenizer.config, 2)
    codes = codec.encode_array(images)
    with torch.inference_mode():
        expected = model.encode(torch.from_numpy(images))[0].numpy()
        picture = model.decode(torch.from_numpy(expected)).numpy()
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(codec.decode_array(codes), picture)
    np.testing.assert_allclose(codec.latent(images), tokenizer.latent(images), atol=1e-4)


def test_half_precision_rounds_but_decides_in_float32(tokenizer: Tokenizer) -> None:
    model, images = mini_model("clip"), pictures(tokenizer.config, 1)
    exact, half = TorchCodec(model, tokenizer.config, Device()), TorchCodec(model, tokenizer.config, Device(), half=True)
    latent = half.latent(images)
    assert latent.dtype == np.float32
    assert 0 < np.abs(latent - exact.latent(images)).max() < 0.05
    with torch.inference_mode():
        searched = model.quantize.encode(torch.from_numpy(latent))[0].numpy()
    np.testing.assert_array_equal(half.encode_array(images), searched)
    codes = exact.encode_array(images)
    assert 40 < psnr(half.decode_array(codes), exact.decode_array(codes)) < np.inf


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_tokenizer_stays_on_the_host(kind: str) -> None:
    """The model where no data is: whatever were made on the CPU, and is no plain number, could not be added to it."""
    model = mini_model(kind).to("meta")
    size, codes = model.config.image_size, sum(side * side for side in model.config.patch_nums)
    codec = TorchCodec(model, None, Device())  # type: ignore[arg-type]
    indices, latent = codec.encode_there(torch.empty(2, size, size, 3, dtype=torch.uint8, device="meta"))
    picture = codec.decode_there(torch.empty(2, codes, dtype=torch.int32, device="meta"))
    assert (indices.device.type, tuple(indices.shape), indices.dtype) == ("meta", (2, codes), torch.int32)
    assert (latent.device.type, tuple(latent.shape[:2]), latent.dtype) == ("meta", (2, 40), torch.float32)
    assert (picture.device.type, tuple(picture.shape), picture.dtype) == ("meta", (2, size, size, 3), torch.uint8)


def test_nothing_of_a_generator_stays_on_the_host(mini_generator) -> None:
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    checkpoint = HfDirectory(mini_generator.parent / "hf")
    oracle = UncachedGenerator(checkpoint, bundle.config, load_codebook(bundle), "meta")
    sides = bundle.config.patch_nums
    codes = np.zeros(sides[1] ** 2, np.int32)
    with torch.inference_mode():
        f_hat = oracle._resize(torch.zeros(40, 1, 1, device="meta") + oracle._rows(codes[:1], 1), sides[1])
        block = oracle._embed(f_hat + oracle._rows(codes, sides[1]), 1)
        logits = oracle._guided(*random_prompts(8, bundle.config.image_token_start), [block], sides[1] ** 2, 1.5)
    assert (logits.device.type, tuple(logits.shape)) == ("meta", (sides[1] ** 2, bundle.config.codebook_size))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_takes_it_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing, without the compiler behind it: one piece, the same codes."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: whole(function, backend="eager", **options))
    model = mini_model(kind)
    plain, traced = (TorchCodec(model, None, Device(), half=True, compiled=compiled) for compiled in (False, True))  # type: ignore[arg-type]
    for count in (1, 2):
        images = pictures(model.config, count)
        codes = plain.encode_array(images)
        np.testing.assert_array_equal(traced.encode_array(images), codes)
        np.testing.assert_array_equal(traced.decode_array(codes), plain.decode_array(codes))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("batches", "expected"), [((1, 8, 32), (1, 8, 32)), ((32, 1), (1, 32, 32)), ((4,), (1, 4, 4)), ((2, 3, 4, 5), (1, 4, 5))]
)
def test_engines_are_built_for_the_batches(batches: tuple[int, ...], expected: tuple[int, ...]) -> None:
    plan = engine_plan("tensorrt", batches)
    assert (plan.batch, plan.precision, plan.backend) == (expected, "fp16", "tensorrt")
