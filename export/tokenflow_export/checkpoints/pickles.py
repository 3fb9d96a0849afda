"""Reads the files of `torch.save` without executing anything in them, and finds the weights in what they hold."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow_sdk.errors import CheckpointError

__all__ = ["load_pickle", "released_keys", "state_dict_in"]

_NESTED = ("ema", "model", "state_dict", "module")
"""Where training scripts put the state dict, the preferred one first; `module` is DeepSpeed's."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""


class _Unread:
    """Stands for an object beside the weights, as a NumPy scalar. Nothing of that object's class is imported or run."""

    def __new__(cls, *arguments: object) -> _Unread:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def load_pickle(path: Path) -> Any:
    """Read a file of `torch.save`, memory-mapped where its format allows. Of objects, only tensors and containers are read.

    Raises:
        CheckpointError: it is damaged or truncated, or holds what cannot be left unread.
    """
    # The format before PyTorch 1.6, which is no zip archive, can be neither listed nor memory-mapped.
    archive = zipfile.is_zipfile(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
        unread: list[Any] = [(_Unread, name) for name in unknown if name != "argparse.Namespace"]
        # The released training scripts store their arguments beside the weights; loading a Namespace executes no code.
        with torch.serialization.safe_globals([argparse.Namespace, *unread]):
            return torch.load(path, map_location="cpu", mmap=archive, weights_only=True)
    except Exception as error:  # a pickle can make torch raise any kind
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes parts of its messages in bold
    inner = re.search(r"(?<=WeightsUnpickler error: ).+", text)
    why = inner[0] if inner else text.partition("\n")[0]
    # An IndexError or KeyError of the unpickler names a number or a key of its own, which says nothing about the file.
    if not why or isinstance(error, LookupError) or why.startswith("Weights only load failed"):
        why = "it is no file of torch.save"
    unknown = re.search(r"GLOBAL (\S+)", text)
    if unknown is None:
        return CheckpointError(
            f"{path.name} cannot be read as a PyTorch checkpoint: {why.rstrip('.')}.",
            "It may be truncated or damaged: download it again.",
        )
    return CheckpointError(
        f"{path.name} cannot be read as a PyTorch checkpoint without executing code: it holds {unknown[1]}.",
        "Where you trust it, load it with weights_only=False and save the state dict alone, with safetensors.torch.save_file.",
    )


def state_dict_in(content: object, name: str) -> dict[str, Tensor]:
    """Find the state dict in what a file holds: under `ema`, else `model`, `state_dict` or `module`, or the content itself.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        CheckpointError: there is none, or something else than tensors is in it.
    """
    for _ in range(len(_NESTED)):  # a bound, because a dict can hold itself
        inner = next((found for key in _NESTED if (found := _nested(content, key, name))), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(repr, [*content][:5])) if isinstance(content, dict) else "no keys at all"
        raise CheckpointError(
            f"{name} holds no state dict under {', '.join(map(repr, _NESTED))}; it has {keys}.",
            "Give the model's own checkpoint file, e.g. tokenflow_clipb_32k_enhanced.pt.",
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} holds {key!r}, a {type(value).__name__}, among its weights.",
                "Save the weights alone, or under 'model', beside the rest.",
            )
    return content


def _nested(content: object, key: str, name: str) -> object:
    value = content.get(key) if isinstance(content, dict) else None
    if isinstance(value, _Unread):
        raise CheckpointError(
            f"{name} holds an object under {key!r} whose class is not known, so the weights in it cannot be read.",
            f"Save its state dict under {key!r} instead, or leave {key!r} out to take the other weights.",
        )
    return value if isinstance(value, dict) else None


def released_keys(keys: Iterable[str]) -> dict[str, str]:
    """The keys as released, without prefixes that wrappers of modules put before all of them, and as they are stored."""
    found = {key: key for key in keys}
    while prefix := next((p for p in _PREFIXES if found and all(key.startswith(p) for key in found)), None):
        found = {key.removeprefix(prefix): stored for key, stored in found.items()}
    return found
