"""Reads a released Hugging Face directory: config.json and the weights, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow_export.checkpoints.pickles import load_pickle, released_keys, state_dict_in
from tokenflow_export.checkpoints.strict import as_float32, key_problems, require_float
from tokenflow_sdk.errors import CheckpointError

__all__ = ["HfDirectory", "read_json"]

_SETS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Sets of weights, in transformers' order: where a directory has several, the first is read and the others are not."""
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
_BUFFER = ".rotary_emb.inv_freq"
"""Buffers that old library versions saved. They are computed from config.json, by transformers too."""
_TOWER = "model.vision_tower."
"""A tokenizer beside the language model, which a language model's bundle does not need."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", "Give the directory of a released checkpoint."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", "Download it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not an object.", "Download it again.")
    return data


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is stored, the file and its key there, and as what."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class HfDirectory:
    """The config and the weights of a released directory. A tensor is read from disk when it is asked for.

    Raises:
        CheckpointError: the directory holds no such checkpoint, or a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self._index: dict[str, str] | None = None
        self._files = self._weight_files()
        self._bins: dict[str, dict[str, Tensor]] = {}

    def _weight_files(self) -> list[str]:
        adapter = next((name for name in _ADAPTERS if (self.path / name).is_file()), None)
        if adapter is not None:
            raise CheckpointError(
                f"{self.path} has an adapter beside its weights ({adapter}), which would not be applied.",
                "Merge it (peft: merge_and_unload, then save_pretrained), or move it away to export the weights without it.",
            )
        name = next((name for name in _SETS if (self.path / name).is_file()), None)
        if name is None:
            raise CheckpointError(f"{self.path} holds no weights ({', '.join(_SETS)}).", "Download them as well.")
        if not name.endswith(".index.json"):
            return [name]
        self._index = self._read_index(name)
        files = sorted(set(self._index.values()))
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing or not files:
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} of {len(files)} shards (first: {missing[0] if missing else name}).",
                "Download the missing files.",
            )
        return files

    def _read_index(self, name: str) -> dict[str, str]:
        index = read_json(self.path / name).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise CheckpointError(f"{self.path / name} has no weight_map from keys to files.", "Download it again.")
        outside = next((file for file in index.values() if not file or set(file) & set("/\\:\0") or file in (".", "..")), None)
        if outside is not None:
            raise CheckpointError(
                f"{self.path / name} names the shard {outside!r}, which is no file name.", "Shards lie beside their index."
            )
        return index

    @cached_property
    def _stored(self) -> dict[str, _Stored]:
        found: dict[str, _Stored] = {}
        for file in self._files:
            for key, (shape, dtype) in self._contents(file).items():
                if key in found:
                    raise CheckpointError(
                        f"{self.path} has {key} twice, in {found[key].file} and in {file}.",
                        "Download the shards of one version into an empty directory.",
                    )
                found[key] = _Stored(file, key, shape, dtype)
        if self._index is not None:
            self._require_index(self._index, found)
        return {key: found[stored] for key, stored in released_keys(found).items()}

    def _require_index(self, index: dict[str, str], found: dict[str, _Stored]) -> None:
        wrong = [f"{key} is not in {file}" for key, file in index.items() if key not in found or found[key].file != file]
        wrong += [f"{key} in {found[key].file} is not in the index" for key in found if key not in index]
        if wrong:
            raise CheckpointError(
                f"The index of the weights in {self.path} is not that of its shards: {wrong[0]} ({len(wrong)} such keys).",
                "Download index and shards of one version into an empty directory.",
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its key, without those that no exporter reads."""
        return {
            key: stored.shape
            for key, stored in self._stored.items()
            if not key.startswith(_TOWER) and not key.endswith(_BUFFER)
        }

    def tower_key(self, suffix: str) -> str | None:
        """The key of the vision tower that ends in `suffix`, if the directory has a tower with one."""
        return next((key for key in self._stored if key.startswith(_TOWER) and key.endswith(f".{suffix}")), None)

    def _contents(self, file: str) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
        """The shape and the dtype of every tensor in a file."""
        if not file.endswith(".safetensors"):
            return {key: (tuple(value.shape), value.dtype) for key, value in self._bin(file).items()}
        with self._open(file) as content:
            slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
            return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / file, "pt") as content:
                yield content
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}.", "Download it again.") from error

    def _bin(self, file: str) -> dict[str, Tensor]:
        if file not in self._bins:
            self._bins[file] = state_dict_in(load_pickle(self.path / file), file)
        return self._bins[file]

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, as float32.

        Raises:
            CheckpointError: it is no float, has a value that is not finite, or its file is damaged.
        """
        stored = self._stored[key]
        return as_float32(self._read(stored), key, str(self.path))

    def _read(self, stored: _Stored) -> Tensor:
        if not stored.file.endswith(".safetensors"):
            return self._bin(stored.file)[stored.key]
        with self._open(stored.file) as content:
            tensor: Tensor = content.get_tensor(stored.key)
        return tensor

    def require(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Check that the keys and shapes are exactly the expected ones, and that all are floats.

        Raises:
            CheckpointError: they are not; the message names the first missing, unexpected and mis-shaped keys, or the code.
        """
        problems = key_problems(self.shapes, expected)
        if problems:
            raise CheckpointError(
                f"{self.path} does not match its config.json: {problems}.",
                "Check that it is the released directory of this kind of model and was downloaded completely.",
            )
        for key in expected:
            require_float(self._stored[key].dtype, key, str(self.path))
