"""Tracing a small module takes torch.onnx many seconds, and many tests export the same ones: each is traced once.

Modules are the same where their classes, attributes and weights are. A test that changes what a class computes must not patch
it, but make another class.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tokenflow_export.tracing.onnx_export import GraphSpec

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
"""What computes traces."""
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
    """`_capture` of `tracing.onnx_export` with a memory that all test processes share; one traces, the others wait for it."""

    def __init__(self, capture: Callable[[GraphSpec], Any], directory: Path) -> None:
        self.capture, self.directory = capture, directory

    def __call__(self, spec: GraphSpec) -> torch.onnx.ONNXProgram:
        if spec.read is None and sum(value.nbytes for value in spec.module.state_dict().values()) > LARGEST:
            return self.capture(spec)
        path = self.directory / f"{_digest(spec)}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                unfinished = path.with_suffix(".part")
                ir.save(_storable(self.capture(spec).model, spec), unfinished)
                unfinished.replace(path)
        model = ir.load(path)
        for value in list(model.graph.inputs[len(spec.inputs) :]):
            model.graph.inputs.remove(value)
            model.graph.initializers[value.name] = value
        return torch.onnx.ONNXProgram(model, None)


def traces_of(root: Path) -> Path:
    """The directory of the traces that a checkout's code makes, kept from one run of the tests to the next. Other sources, and
    other versions of the packages, have other directories; what was made for them goes after a day.
    """
    digest = hashlib.sha256(repr([(name, version(name)) for name in PACKAGES]).encode())
    for source in sorted(path for name in ("export", "recipes", "tests") for path in (root / name).rglob("*.py")):
        digest.update(source.read_bytes())
    directory = root / ".cache" / "traces" / digest.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    os.utime(directory)
    for other in directory.parent.iterdir():
        with suppress(FileNotFoundError):  # another process deletes it
            if time.time() - other.stat().st_mtime > 24 * 3600:
                shutil.rmtree(other, ignore_errors=True)
    return directory


def keep_registry(patch: pytest.MonkeyPatch) -> None:
    """torch.onnx makes the table of all its operators anew for every graph; here it is made once."""
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))


def _storable(model: ir.Model, spec: GraphSpec) -> ir.Model:
    """Weights without values cannot be written, so they become inputs behind the graph's own."""
    if spec.read is not None:
        for value in list(model.graph.initializers.values()):
            del model.graph.initializers[value.name]
            value.const_value = None
            model.graph.inputs.append(value)
    return model
