"""Writes the graphs of a tokenizer as a model repository of NVIDIA's Triton Inference Server, for onnxruntime or TensorRT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tokenflow_sdk.atomic_directory import DirectoryKind, atomic_directory
from tokenflow_sdk.backends.providers import CUDA, SETTINGS
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec, require
from tokenflow_sdk.engines.build_config import ONNXRUNTIME
from tokenflow_sdk.errors import BackendError
from tokenflow_sdk.files import read_regular

__all__ = ["write_triton_repository"]

_TYPES = {
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}
_CONFIG = "config.pbtxt"
_MOST_CONFIG_BYTES = 2**20
_WRITTEN = "# Written by tokenflow-sdk"


def write_triton_repository(
    bundle: Bundle[TokenizerConfig], out: Path, batch: int, engines: Mapping[str, Path] | None = None, force: bool = False
) -> list[str]:
    """Write a model for each graph, `NAME/config.pbtxt` and `NAME/1/`, with the graph's inputs and outputs.

    Args:
        bundle: whose files are compared with their hashes.
        out: directory of the repository; appears whole or not at all.
        batch: most pictures in a call; Triton joins requests that wait up to this many.
        engines: serialized TensorRT engines by graph, for Triton's TensorRT backend; None: the ONNX files, for its onnxruntime.
        force: replace `out`, if nothing but a repository that this function wrote is there.

    Returns:
        Names of the models.

    Raises:
        CorruptBundleError: a file is damaged or missing.
        BackendError: an engine is gone.
        OutputError: `out` exists or cannot be written.
        MissingPackageError: filelock is not installed.
    """
    bundle.verify(*(file for entry in bundle.graphs.values() for file in entry.files))
    sources = {
        name: _graph_files(bundle.path, entry) if engines is None else {"model.plan": engines[name]}
        for name, entry in bundle.graphs.items()
    }
    backend = ONNXRUNTIME if engines is None else "tensorrt"
    said = f"{_WRITTEN} from a bundle whose bundle.json has the SHA-256 {bundle.sha256}.\n"
    configs = {name: said + _config(name, entry, backend, batch) for name, entry in bundle.graphs.items()}
    try:
        needed = sum(path.stat().st_size for files in sources.values() for path in files.values())
        with atomic_directory(out, force, needed, _REPOSITORY) as staging:
            for name, config in configs.items():
                version = staging / name / "1"
                version.mkdir(parents=True)
                for file, source in sources[name].items():
                    shutil.copyfile(source, version / file)
                (staging / name / _CONFIG).write_text(config, encoding="utf-8")
    except FileNotFoundError as error:
        # The cache of engines may be cleared at any time.
        raise BackendError(f"{error.filename} is gone.", "Run the command again.") from error
    return list(configs)


def _graph_files(directory: Path, entry: GraphEntry) -> dict[str, Path]:
    """The files of a graph by the names that they get; the graph finds its weights by the names that they have."""
    graph, *weights = entry.files
    return {file.name: directory / file.name for file in weights} | {"model.onnx": directory / graph.name}


def _config(name: str, entry: GraphEntry, backend: str, batch: int) -> str:
    """A model's config.pbtxt. Triton adds the batch to all shapes itself, so they are given without it."""
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {batch}"]
    for field, specs in (("input", entry.inputs), ("output", entry.outputs)):
        for spec in specs:
            # Triton joins requests along the first dimension, and takes them apart again: it must be that of the pictures.
            require(spec.shape[:1] == entry.inputs[0].shape[:1], f"graphs.{name}: {spec}", "does not begin with the pictures")
        lines += [f"{field} [", ",\n".join(map(_tensor, specs)), "]"]
    if batch > 1:
        lines.append("dynamic_batching { }")
    if backend == ONNXRUNTIME:
        # On a GPU Triton leaves onnxruntime's defaults, among them TF32, which changes codes.
        settings = (f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in SETTINGS[CUDA].items())
        accelerator = f'{{ name: "cuda" {" ".join(settings)} }}'
        lines.append(f"optimization {{ execution_accelerators {{ gpu_execution_accelerator [ {accelerator} ] }} }}")
    return "\n".join(lines) + "\n"


def _tensor(spec: TensorSpec) -> str:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in spec.shape[1:])
    return f"  {{ name: {json.dumps(spec.name)}, data_type: {_TYPES[spec.dtype]}, dims: [ {dims} ] }}"


def _was_written_here(directory: Path) -> bool:
    """Whether a directory holds nothing but models that `write_triton_repository` wrote."""
    return all(map(_is_written, directory.iterdir()))


def _is_written(model: Path) -> bool:
    try:
        return read_regular(model / _CONFIG, _MOST_CONFIG_BYTES).startswith(_WRITTEN.encode())
    except OSError:
        return False


_REPOSITORY = DirectoryKind("Triton repository", _was_written_here, "--triton")
