"""Reads a released Hugging Face directory: config.json and the weights, one tensor at a time."""

from __future__ import annotations

import json
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow_export.checkpoints.strict import key_problems
from tokenflow_sdk.errors import CheckpointError

__all__ = ["HfDirectory"]

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
# Buffers that old library versions saved, and a vision tower, which a language model's bundle does not need.
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What weights are stored in, by its name in safetensors. Other types hold codes, which need scales to become weights."""
_IGNORED = (".rotary_emb.inv_freq", "vision_tower.", "vision_model.")


class HfDirectory:
    """The config and the weights of a released directory. A tensor is read from disk when it is asked for.

    Raises:
        CheckpointError: the directory holds no such checkpoint, or a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._json("config.json")
        self._files = self._weight_files()
        self._bins: dict[str, dict[str, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype | str] = {}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads((self.path / name).read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name} cannot be read: {error.strerror}.",
                "Give the directory of a released checkpoint.",
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.path / name} is not valid JSON: {error}.", "Download it again.") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{self.path / name} is not an object.", "Download it again.")
        return data

    def _weight_files(self) -> list[str]:
        for name in _INDEXES:
            if (self.path / name).is_file():
                files = sorted(set(self._json(name).get("weight_map", {}).values()))
                missing = [file for file in files if not (self.path / file).is_file()]
                if missing or not files:
                    raise CheckpointError(
                        f"{self.path} lacks {len(missing)} of {len(files)} shards (first: {missing[0] if missing else name}).",
                        "Download the missing files.",
                    )
                return files
        for name in _SINGLE:
            if (self.path / name).is_file():
                return [name]
        raise CheckpointError(f"{self.path} holds no weights ({', '.join((*_INDEXES, *_SINGLE))}).", "Download them as well.")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its key, without those that no exporter reads."""
        found: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, str] = {}
        for file in self._files:
            for key, shape in self._shapes_in(file).items():
                if not any(part in key for part in _IGNORED):
                    found[key], self._where[key] = shape, file
        return found

    def _shapes_in(self, file: str) -> dict[str, tuple[int, ...]]:
        if not file.endswith(".safetensors"):
            self._dtypes |= {key: value.dtype for key, value in self._bin(file).items()}
            return {key: tuple(value.shape) for key, value in self._bin(file).items()}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / file, "pt") as content:
                slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
                self._dtypes |= {key: _FLOATS.get(part.get_dtype(), part.get_dtype()) for key, part in slices.items()}
                return {key: tuple(part.get_shape()) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}.", "Download it again.") from error

    def _bin(self, file: str) -> dict[str, Tensor]:
        if file not in self._bins:
            try:
                self._bins[file] = torch.load(self.path / file, map_location="cpu", mmap=True, weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
                why = str(error).splitlines()[0]
                raise CheckpointError(f"{self.path / file} cannot be read: {why}.", "Download it again.") from error
        return self._bins[file]

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, as float32.

        Raises:
            CheckpointError: it has a value that is not finite.
        """
        file = self._where[key] if key in self.shapes else ""
        if not file.endswith(".safetensors"):
            tensor = self._bin(file)[key].float()
        else:
            from safetensors import safe_open

            with safe_open(self.path / file, "pt") as content:
                tensor = content.get_tensor(key).float()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{key} in {self.path} has values that are NaN or infinite.", "Download it again.")
        return tensor

    def require(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Check that the keys and shapes are exactly the expected ones, and that the tensors hold floats.

        Raises:
            CheckpointError: they are not; the message names the first missing, unexpected and mis-shaped keys, or the tensor.
        """
        problems = key_problems(self.shapes, expected)
        if problems:
            raise CheckpointError(
                f"{self.path} does not match its config.json: {problems}.",
                "Check that it is the released directory of this kind of model and was downloaded completely.",
            )
        codes = {key: dtype for key in expected if (dtype := self._dtypes[key]) not in _FLOATS.values()}
        if codes:
            key, dtype = next(iter(codes.items()))
            raise CheckpointError(
                f"{len(codes)} tensors in {self.path} are no floats of 16 bits or more (first: {key}, {dtype}).",
                "Give an unquantized checkpoint.",
            )
