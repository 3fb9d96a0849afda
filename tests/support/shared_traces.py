"""Tracing a small module takes torch.onnx many seconds, and many tests export the same ones: each is traced once.

Modules are the same where their classes, attributes and weights are. A test that changes what a class computes must not patch
it, but make another class.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch

from tokenflow_export.tracing.onnx_export import GraphSpec

LARGEST = 64 * 2**20
"""Bytes of weights; modules of released sizes are traced each time."""


class _Description(pickle.Pickler):
    """A pickle that tells modules apart, and holds digests in the place of tensors."""

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, torch.Tensor):
            values = None if _is_fake(obj) else hashlib.sha256(obj.detach().contiguous().numpy().tobytes()).hexdigest()
            return type(obj).__name__, tuple(obj.shape), str(obj.dtype), values
        if isinstance(obj, torch.export.Dim):
            return repr(obj)
        return None


def _is_fake(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor.detach(), torch._subclasses.FakeTensor)


def _digest(spec: GraphSpec) -> str:
    buffer = io.BytesIO()
    _Description(buffer).dump((spec.name, spec.module, dict(spec.inputs), spec.outputs, spec.read is None))
    return hashlib.sha256(buffer.getvalue()).hexdigest()


class SharedTraces:
    """`capture` of `tracing.onnx_export` with a memory, which other test processes share where graphs have their weights."""

    def __init__(self, capture: Callable[[GraphSpec], Any], directory: Path) -> None:
        self.capture, self.directory = capture, directory
        self.without_weights: dict[str, ir.Model] = {}

    def __call__(self, spec: GraphSpec) -> Any:
        if spec.read is None and sum(value.nbytes for value in spec.module.state_dict().values()) > LARGEST:
            return self.capture(spec)
        digest = _digest(spec)
        return self._on_disk(digest, spec) if spec.read is None else self._here(digest, spec)

    def _on_disk(self, digest: str, spec: GraphSpec) -> Any:
        path = self.directory / f"{digest}.onnx"
        if not path.exists():
            own = path.with_suffix(f".{os.getpid()}")
            ir.save(self.capture(spec).model, own)
            own.replace(path)
        return SimpleNamespace(model=ir.load(path))

    def _here(self, digest: str, spec: GraphSpec) -> Any:
        program = self.capture(spec) if digest not in self.without_weights else None
        if program is not None:
            self.without_weights[digest] = program.model.clone()
            return program
        copy = self.without_weights[digest].clone()
        return torch.onnx.ONNXProgram(copy, None)
