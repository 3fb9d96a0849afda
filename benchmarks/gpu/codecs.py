"""The sides that encode and decode: PyTorch in three ways, and tokenflow-sdk on its backends. Arrays are in host memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.device import Device
from benchmarks.gpu.request import DTYPES, TITLES, TORCH, Dtype
from benchmarks.gpu.timing import console, say_why
from tokenflow_export.checkpoints.tokenizer import load_model, read_state_dict, recognise
from tokenflow_export.models.tokenizer import TokenFlowTokenizer, to_pixels, to_unit_range
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.errors import TokenFlowError

__all__ = [
    "Codec",
    "Side",
    "TorchCodec",
    "build_config_for",
    "half_copy",
    "lacks_memory",
    "load_eager",
    "note_of",
    "sdk_sides",
    "torch_sides",
    "with_largest",
]

T = TypeVar("T")

_ROUNDED_PARTS = (
    *("scaling_layer", "encoder_vqkd", "encode_task_layer", "encoder", "quant_conv"),
    *("post_quant_conv", "decoder"),
)
"""The parts of a model that run in half precision on a side that has it."""
_NO_MEMORY = re.compile(
    r"out of (device )?memory|has no [\d,]+ MB left|(fail|unable)\w* to allocate|OutOfMemory|MemoryAllocation|ALLOC_FAILED|"
    "bad_alloc",
    re.IGNORECASE,
)


class Codec(Protocol):
    """Encodes and decodes, as the methods of `Tokenizer` do, which is one."""

    @property
    def config(self) -> TokenizerConfig: ...
    def encode_array(self, images: NDArray[np.uint8]) -> NDArray[np.int32]: ...
    def decode_array(self, code_indices: NDArray[np.int32]) -> NDArray[np.uint8]: ...
    def latent(self, images: NDArray[np.uint8]) -> NDArray[np.float32]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Side:
    """A way to encode and decode. `key` is its name in `TITLES`; `open` opens it for batches of at most so many pictures."""

    key: str
    open: Callable[[int], Codec]

    @property
    def title(self) -> str:
        return TITLES[self.key]

    @property
    def dtype(self) -> Dtype:
        """The dtype of its products."""
        return DTYPES[self.key]

    @property
    def ours(self) -> bool:
        """Whether it is tokenflow-sdk."""
        return self.key not in TORCH

    @property
    def builds(self) -> bool:
        """Whether it builds engines when it is opened, which may take minutes."""
        return self.key in FLAVOURS


class TorchCodec:
    """The PyTorch model, with pictures as u8 and codes as int32 copied to the device and back, as for an engine.

    Args:
        model: on the device already; codecs may share it. Encoders and decoder of a `half_copy` run in its dtype; the codebook
            search and the conversion to pixels stay in float32, as in engines.
        config: of the bundle it is compared with.
        device: where the model is.
        compiled: use torch.compile, for each function as one graph and for each batch by itself.
    """

    def __init__(self, model: TokenFlowTokenizer, config: TokenizerConfig, device: Device, compiled: bool = False) -> None:
        self.config = config
        self._model, self._device = model, device
        self._dtype = model.quant_conv.weight.dtype
        wrap = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else (lambda function: function)
        self._encode, self._decode = wrap(self.encode_on_device), wrap(self.decode_on_device)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that encode and decode."""
        modules = [getattr(self._model, name) for name in (*_ROUNDED_PARTS, "quantize")]
        return sum(weight.nbytes for module in modules for weight in module.state_dict().values())

    def encode_on_device(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures u8 [B, H, W, 3] -> code indices int32 [B, L] and latent float32 [B, C, g, g], all on the device."""
        latent = self._model.latent(self._rounded(to_unit_range(images))).float()
        return self._model.quantize.encode(latent)[0].to(torch.int32), latent

    def decode_on_device(self, code_indices: torch.Tensor) -> torch.Tensor:
        """Code indices int32 [B, L] -> pictures u8 [B, H, W, 3], all on the device."""
        model = self._model
        pixel = model.quantize.decode(code_indices)[:, model.config.semantic_dim :]
        picture = model.decoder(model.post_quant_conv(self._rounded(pixel)))
        return to_pixels(model._resized(picture.float(), model.config.image_size))

    def encode_array(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        with torch.inference_mode():
            codes: NDArray[np.int32] = self._encode(self._sent(images))[0].cpu().numpy()
        return codes

    def latent(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            latent: NDArray[np.float32] = self._encode(self._sent(images))[1].cpu().numpy()
        return latent

    def decode_array(self, code_indices: NDArray[np.int32]) -> NDArray[np.uint8]:
        with torch.inference_mode():
            pictures: NDArray[np.uint8] = self._decode(self._sent(code_indices)).cpu().numpy()
        return pictures

    def close(self) -> None:
        """Free the working memory. The model stays, because other sides use it."""
        self._device.release()

    def _sent(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device.torch)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._dtype == torch.float32 else x.to(self._dtype, memory_format=torch.channels_last)


def load_eager(checkpoint: Path, variant: str, device: Device) -> TokenFlowTokenizer:
    """Load the PyTorch model of a checkpoint onto a device.

    Raises:
        CheckpointError: the checkpoint cannot be read, or holds another variant.
    """
    state = read_state_dict(checkpoint)
    config = recognise({key: tuple(value.shape) for key, value in state.items()}, variant)
    return load_model(state, config).to(device.torch)


def half_copy(model: TokenFlowTokenizer, dtype: torch.dtype = torch.float16) -> TokenFlowTokenizer:
    """Copy a model with its encoders and decoder in half precision and channels last; share the rest."""
    shared = {id(module): module for module in (model.quantize, model.decoder_vqkd, model.decode_task_layer)}
    copied = deepcopy(model, shared)
    for name in _ROUNDED_PARTS:
        getattr(copied, name).to(dtype, memory_format=torch.channels_last)
    return copied


def torch_sides(load: Callable[[], TokenFlowTokenizer], config: TokenizerConfig, device: Device) -> list[Side]:
    """The sides of PyTorch. The model is loaded when the first is opened; each codec is made once, because it compiles once."""
    exact = cache(load)
    half = cache(lambda: half_copy(exact()))
    made = {
        "torch": cache(lambda: TorchCodec(exact(), config, device)),
        "torch-fp16": cache(lambda: TorchCodec(half(), config, device)),
        "compile": cache(lambda: TorchCodec(half(), config, device, compiled=True)),
    }
    return [Side(key, partial(_same, codec)) for key, codec in made.items()]


def _same(codec: Callable[[], TorchCodec], _: int) -> TorchCodec:
    return codec()


def sdk_sides(bundle: Bundle[TokenizerConfig], device: Device, batches: Sequence[int], threads: int | None) -> list[Side]:
    """The sides of tokenflow-sdk. Engines that are not in the cache are built, for those batches that fit."""

    def onnxruntime(largest: int) -> Tokenizer:
        # On a CPU one picture at a time is the fastest.
        limit = largest if device.on_gpu else 1
        return Tokenizer.from_pretrained(
            bundle.path, device=device.sdk, threads=threads, batch_limit=limit, backend="onnxruntime"
        )

    def engines(flavour: str, largest: int) -> Tokenizer:
        build_config = build_config_for(flavour, [batch for batch in batches if batch <= largest])
        return Tokenizer.from_pretrained(
            bundle.path, device=device.sdk, backend=flavour, build_config=build_config, batch_limit=largest
        )

    return [Side("onnxruntime", onnxruntime), *(Side(flavour, partial(engines, flavour)) for flavour in FLAVOURS)]


def with_largest(sizes: Sequence[int], attempt: Callable[[int], T], device: Device) -> T:
    """Call `attempt` with the largest of ascending sizes, and with smaller ones while memory is lacking.

    Returns:
        What the attempt that succeeds returns.

    Raises:
        Exception: what the last attempt raised.
    """
    *smaller, largest = sizes
    try:
        return attempt(largest)
    except Exception as error:
        if not smaller or not lacks_memory(error):
            raise
        console.print(f"no memory for {largest} pictures at once; trying {smaller[-1]}: {say_why(error)}", markup=False)
    device.clear()
    return with_largest(smaller, attempt, device)


def note_of(size: int, largest: int, sizes: Sequence[int], warm_up: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a row says besides times: the result of `warm_up`, or that `largest` is too small for this size."""
    if size > largest:
        return {"why": f"no memory for {size} pictures at once"}
    return warm_up() | ({"largest_batch": largest} if largest < sizes[-1] else {})


def lacks_memory(error: Exception) -> bool:
    """Whether an error means that memory is lacking, as far as its message tells."""
    text = error.message if isinstance(error, TokenFlowError) else str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _NO_MEMORY.search(text) is not None


def build_config_for(flavour: str, batches: Sequence[int]) -> BuildConfig:
    """A build config for float16 engines for batches up to the largest of these, optimised for the middle one."""
    ascending = sorted(batches)
    return BuildConfig(backend=flavour, batch=(1, ascending[len(ascending) // 2], ascending[-1]))
