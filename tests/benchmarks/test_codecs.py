from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.generator_vs_eager import random_prompts
from benchmarks.gpu.codecs import TorchCodec, build_config_for, half_copy, lacks_memory, torch_sides, with_largest
from benchmarks.gpu.comparison import batch_failures, compare, reference_of
from benchmarks.gpu.device import Device
from benchmarks.gpu.generators import HalfGenerator
from tests.support.generation_oracle import UncachedGenerator
from tests.support.mini import mini_model
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.errors import BackendError
from tokenflow_sdk.model.sampling import SamplingParams
from tokenflow_sdk.pictures.images import psnr

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
    exact, half = (TorchCodec(made, tokenizer.config, Device()) for made in (model, half_copy(model)))
    latent = half.latent(images)
    assert latent.dtype == np.float32
    assert 0 < np.abs(latent - exact.latent(images)).max() < 0.05
    with torch.inference_mode():
        searched = model.quantize.encode(torch.from_numpy(latent))[0].numpy()
    np.testing.assert_array_equal(half.encode_array(images), searched)
    codes = exact.encode_array(images)
    assert 40 < psnr(half.decode_array(codes), exact.decode_array(codes)) < np.inf


def test_half_precision_passes_the_bars_of_half_precision(tokenizer: Tokenizer) -> None:
    reference = reference_of(tokenizer.bundle, 1)
    model = mini_model("clip")
    for side in torch_sides(lambda: model, tokenizer.config, Device())[:2]:
        codec = side.open(1)
        assert compare(side, codec, reference)["failures"] == []
        for graph in ("encode", "decode"):
            assert batch_failures(side, codec, graph, 3, reference) == []


class Watch(TorchDispatchMode):
    """What convolutions read, and how many tensors are converted or copied to another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.converted = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.convolution.default:
            self.read.append(arguments[:2])
        self.converted += function is torch.ops.aten._to_copy.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_has_its_weights_ready(kind: str) -> None:
    """In float16, channels last, converted once: a call converts what goes in and comes out."""
    half = half_copy(mini_model(kind))
    codec = TorchCodec(half, None, Device())  # type: ignore[arg-type]
    with torch.no_grad(), Watch() as watch:
        codes, _ = codec.encode_on_device(torch.from_numpy(pictures(half.config, 1)))
        codec.decode_on_device(codes)
    assert {tensor.dtype for tensors in watch.read for tensor in tensors} == {torch.float16}
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for _, weight in watch.read)
    assert len(watch.read) > 20 > watch.converted


def test_a_half_copy_shares_what_stays_float32() -> None:
    model = mini_model("clip")
    half = half_copy(model)
    assert half.quantize is model.quantize
    assert model.decoder.conv_in.weight.dtype == torch.float32
    weights = sum(weight.nbytes for weight in model.quantize.state_dict().values())
    exact, rounded = (TorchCodec(made, None, Device()).weight_bytes for made in (model, half))  # type: ignore[arg-type]
    assert exact - weights == 2 * (rounded - weights) > 0


def test_half_precision_of_a_generator(mini_generator: Path) -> None:
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    parts = HfDirectory(mini_generator.parent / "hf"), bundle.config, load_codebook(bundle)
    half, exact = HalfGenerator(*parts, "cpu"), UncachedGenerator(*parts)
    assert {weight.dtype for weight in half.transformer.parameters()} == {torch.float16}
    prompts, params = random_prompts(8, bundle.config.image_token_start), SamplingParams.preset("fast", seed=5)
    assert (half.generate(*prompts, params) == exact.generate(*prompts, params)).mean() > 0.5


def test_the_next_smaller_batch_where_memory_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def attempt(largest: int) -> str:
        tried.append(largest)
        if largest > 1:
            raise BackendError("GPU 0 has no 4,321 MB left that encode works in.", "Free some.")
        return "done"

    assert with_largest((1, 8, 32), attempt, Device()) == "done"
    assert tried == [32, 8, 1]
    with pytest.raises(BackendError, match="4,321 MB"):
        with_largest((8, 32), attempt, Device())
    assert "no memory for 32 pictures at once; trying 8" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        with_largest((1, 8), lambda largest: largest // 0, Device())


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (MemoryError(), True),
        (BackendError("GPU 0 has no 4,321 MB left (1 of 8,000 MB are free).", ""), True),
        (BackendError("onnxruntime failed: Failed to allocate memory for requested buffer of size 5", ""), True),
        (BackendError("onnxruntime failed: CUBLAS_STATUS_ALLOC_FAILED", ""), True),
        (BackendError("GPU 0: cudaMalloc failed (cudaErrorMemoryAllocation).", ""), True),
        (BackendError("TensorRT failed to run encode: Error Code 2: OutOfMemory", ""), True),
        (BackendError("TensorRT failed to run encode: it does not say why.", "If memory ran out, use smaller batches."), False),
        (ValueError("no"), False),
    ],
)
def test_what_lacks_memory(error: Exception, lacks: bool) -> None:
    assert lacks_memory(error) is lacks


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_tokenizer_stays_on_the_host(kind: str) -> None:
    """The model where no data is: whatever were made on the CPU, and is no plain number, could not be added to it."""
    model = mini_model(kind).to("meta")
    size, codes = model.config.image_size, sum(side * side for side in model.config.patch_nums)
    codec = TorchCodec(model, None, Device())  # type: ignore[arg-type]
    indices, latent = codec.encode_on_device(torch.empty(2, size, size, 3, dtype=torch.uint8, device="meta"))
    picture = codec.decode_on_device(torch.empty(2, codes, dtype=torch.int32, device="meta"))
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
    half = half_copy(model)
    plain, traced = (TorchCodec(half, None, Device(), compiled=compiled) for compiled in (False, True))  # type: ignore[arg-type]
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
    build_config = build_config_for("tensorrt", batches)
    assert (build_config.batch, build_config.precision, build_config.backend) == (expected, "fp16", "tensorrt")
