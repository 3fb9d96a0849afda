"""The sides that encode and decode: PyTorch in three ways, tokenflow-sdk on its engines. Host arrays in, host arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.device import Device
from benchmarks.gpu.request import DTYPES, TITLES, TORCH, Dtype
from export.checkpoints import load_model, read_state_dict, recognise
from export.models import TokenFlowTokenizer
from export.models.tokenizer import to_pixels, to_unit_range
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import TokenizerConfig
from tokenflow_sdk.engine_recipe import EnginePlan
from tokenflow_sdk.tensorrt_module import FLAVOURS

__all__ = ["Codec", "Side", "TorchCodec", "engine_plan", "load_eager", "sdk_sides", "torch_sides"]


class Codec(Protocol):
    """What is timed and compared; `Tokenizer` is one. Shapes and types are those of its methods."""

    config: TokenizerConfig

    def encode_array(self, images: NDArray[np.uint8]) -> NDArray[np.int32]: ...
    def decode_array(self, code_indices: NDArray[np.int32]) -> NDArray[np.uint8]: ...
    def latent(self, images: NDArray[np.uint8]) -> NDArray[np.float32]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Side:
    """One way to do it, by its name in `TITLES`; `open` gives what does it."""

    key: str
    open: Callable[[], Codec]

    @property
    def title(self) -> str:
        return TITLES[self.key]

    @property
    def dtype(self) -> Dtype:
        """Of its products."""
        return DTYPES[self.key]

    @property
    def ours(self) -> bool:
        """It is tokenflow-sdk."""
        return self.key not in TORCH

    @property
    def builds(self) -> bool:
        """Opening it may take minutes."""
        return self.key in FLAVOURS


class TorchCodec:
    """`export.models`, with pictures as u8 and codes as int32 crossing to the device and back, as in an engine.

    In half precision the encoders and the decoder run under autocast; the codebook search and the last step to pixels stay
    float32, as they do in engines.

    Args:
        model: on the device already; several may share one.
        config: of the bundle it is compared with.
        device: where.
        half: autocast to float16.
        compiled: through torch.compile, which must take each function whole, for every batch by itself.
    """

    def __init__(
        self, model: TokenFlowTokenizer, config: TokenizerConfig, device: Device, half: bool = False, compiled: bool = False
    ) -> None:
        self.config = config
        self._model, self._device, self._half = model, device, half
        wrap = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else (lambda function: function)
        self._encode, self._decode = wrap(self.encode_there), wrap(self.decode_there)

    def encode_there(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u8 [B, H, W, 3] -> code indices int32 [B, L] and latent float32 [B, 40, g, g], on the device."""
        with self._autocast():
            latent = self._model.latent(to_unit_range(images))
        latent = latent.float()
        return self._model.quantize.encode(latent)[0].to(torch.int32), latent

    def decode_there(self, code_indices: torch.Tensor) -> torch.Tensor:
        """Code indices int32 [B, L] -> u8 [B, H, W, 3], on the device."""
        model = self._model
        pixel = model.quantize.decode(code_indices)[:, model.config.semantic_dim :]
        with self._autocast():
            picture = model.decoder(model.post_quant_conv(pixel))
        return to_pixels(model._resized(picture.float(), model.config.image_size))

    def encode_array(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        with torch.inference_mode():
            return self._encode(self._sent(images))[0].cpu().numpy()

    def latent(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self._encode(self._sent(images))[1].cpu().numpy()

    def decode_array(self, code_indices: NDArray[np.int32]) -> NDArray[np.uint8]:
        with torch.inference_mode():
            return self._decode(self._sent(code_indices)).cpu().numpy()

    def close(self) -> None:
        """The model stays for the other sides; its working memory is given back."""
        self._device.release()

    def _sent(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device.torch)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.torch.type, torch.float16, enabled=self._half)


def load_eager(checkpoint: Path, variant: str, device: Device) -> TokenFlowTokenizer:
    """The reference model on a device.

    Raises:
        CheckpointError: it cannot be read, or is none of `variant`.
    """
    state = read_state_dict(checkpoint)
    config = recognise({key: tuple(value.shape) for key, value in state.items()}, variant)
    return load_model(state, config).to(device.torch)


def torch_sides(model: TokenFlowTokenizer, config: TokenizerConfig, device: Device) -> list[Side]:
    """PyTorch's. Each codec is made once, because it compiles once."""
    made = {
        "torch": TorchCodec(model, config, device),
        "torch-fp16": TorchCodec(model, config, device, half=True),
        "compile": TorchCodec(model, config, device, half=True, compiled=True),
    }
    return [Side(key, partial(_same, codec)) for key, codec in made.items()]


def _same(codec: TorchCodec) -> TorchCodec:
    return codec


def sdk_sides(bundle: Bundle[TokenizerConfig], device: Device, batches: Sequence[int], threads: int | None) -> list[Side]:
    """tokenflow-sdk's. Engines are built where the cache has none, for these batches."""

    def onnxruntime() -> Tokenizer:
        # On a CPU one picture at a time is the fastest.
        limit = max(batches) if device.on_gpu else 1
        return Tokenizer.from_pretrained(
            bundle.path, device=device.sdk, threads=threads, batch_limit=limit, backend="onnxruntime"
        )

    def engines(flavour: str) -> Tokenizer:
        plan, limit = engine_plan(flavour, batches), max(batches)
        return Tokenizer.from_pretrained(bundle.path, device=device.sdk, backend=flavour, plan=plan, batch_limit=limit)

    return [Side("onnxruntime", onnxruntime), *(Side(flavour, partial(engines, flavour)) for flavour in FLAVOURS)]


def engine_plan(flavour: str, batches: Sequence[int]) -> EnginePlan:
    """Float16 engines for up to the largest of these batches, tuned for the middle one."""
    ascending = sorted(batches)
    return EnginePlan(backend=flavour, batch=(1, ascending[len(ascending) // 2], ascending[-1]))
