"""A tokenizer checkpoint to a bundle: trace, check against PyTorch, and only then let it appear.

Everything is written to a directory beside the target and renamed at the end. `bundle.json` is written last of all, after
the self-check, so that nothing a killed export leaves behind can be opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from export.graphs import DecodeGraph, EncodeGraph, FeaturesGraph, SemanticGraph
from export.models import TokenFlowTokenizer
from export.models.tokenizer import to_unit_range
from export.onnx_export import GraphSpec, export_graph, file_entry
from export.pictures import reference_pictures
from export.progress import Steps
from tokenflow_sdk import Tokenizer, __version__
from tokenflow_sdk.bundle import MANIFEST, SCHEMA_VERSION, Bundle
from tokenflow_sdk.config import TokenizerConfig
from tokenflow_sdk.errors import OutputError
from tokenflow_sdk.parity import ParityReport, Reference, check_parity

__all__ = ["export_tokenizer"]

REFERENCE_FILE = "reference.npz"


def export_tokenizer(
    model: TokenFlowTokenizer, out: Path, source: dict[str, Any], steps: Steps, force: bool = False
) -> ParityReport:
    """Write the bundle of `model` to the directory `out`.

    Args:
        model: eager and float32, from `export.checkpoints.load_model`.
        out: must not exist, unless `force`.
        source: where the weights came from, stored as provenance.
        steps: shows progress.
        force: replace `out`.

    Raises:
        OutputError: `out` exists or cannot be written.
        ParityError: the exported graphs do not reproduce PyTorch; nothing is left behind.
    """
    with _staging(out, force, needed=sum(p.numel() * 4 for p in model.parameters())) as staging:
        reference = _reference(model, steps)
        graphs = {}
        for spec in _graph_specs(model):
            steps.start(f"tracing {spec.name}")
            graphs[spec.name] = export_graph(spec, staging)
        steps.start("writing the reference vectors")
        np.savez(staging / REFERENCE_FILE, **vars(reference))
        bundle = Bundle(
            path=staging,
            kind="tokenizer",
            config=_runtime_config(model),
            graphs=graphs,
            reference=file_entry(staging / REFERENCE_FILE),
            parity={},
            provenance=source | _versions(),
        )
        steps.start("checking the graphs against PyTorch", total=1.0)
        with Tokenizer(bundle) as tokenizer:
            report = check_parity(tokenizer, reference, steps.fraction)
        report.require(f"The export of {model.config.variant}")
        steps.start("finishing")
        _write_manifest(bundle, report)
    return report


def _graph_specs(model: TokenFlowTokenizer) -> Iterator[GraphSpec]:
    config = model.config
    images = torch.zeros(2, config.image_size, config.image_size, 3, dtype=torch.uint8)
    codes = torch.zeros(2, config.n_codes, dtype=torch.int32)
    yield GraphSpec("encode", EncodeGraph(model), images, "images", ("code_indices", "features", "latent"))
    yield GraphSpec("decode", DecodeGraph(model), codes, "code_indices", ("images",))
    yield GraphSpec("semantic", SemanticGraph(model), codes, "code_indices", ("features",))
    yield GraphSpec("features", FeaturesGraph(model), codes, "code_indices", ("features",))


def _runtime_config(model: TokenFlowTokenizer) -> TokenizerConfig:
    config, quantize = model.config, model.quantize
    digest = hashlib.sha256()
    for table in (quantize.embedding_vqkd, quantize.embedding_vqgan):
        digest.update(table.weight.detach().numpy().astype("<f4").tobytes())
    return TokenizerConfig(
        variant=config.variant,
        image_size=config.image_size,
        patch_nums=config.patch_nums,
        codebook_size=config.codebook_size,
        semantic_dim=config.semantic_dim,
        pixel_dim=config.pixel_dim,
        semantic_width=config.semantic_decoder.out_width,
        codebook_sha256=digest.hexdigest(),
        preprocess=config.preprocess,
    )


@torch.inference_mode()
def _reference(model: TokenFlowTokenizer, steps: Steps) -> Reference:
    pictures = reference_pictures(model.config.image_size)
    steps.start("computing the reference in PyTorch", total=1.0)
    rows: list[dict[str, np.ndarray]] = []
    for i, picture in enumerate(pictures):
        images = torch.from_numpy(picture)[None]
        latent = model.latent(to_unit_range(images))
        codes, features = model.quantize.encode(latent)
        row = {"latent": latent, "code_indices": codes.int(), "features": features}
        row |= {"decoded": model.decode(codes), "semantic": model.semantic(codes)}
        rows.append({name: value[0].numpy() for name, value in row.items()})
        steps.fraction((i + 1) / len(pictures))
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Reference(images=pictures, codebook=torch.cat(model.quantize.codebooks(), dim=1).numpy(), **stacked)


def _versions() -> dict[str, str]:
    return {
        "exporter": f"tokenflow-sdk {__version__}",
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _write_manifest(bundle: Bundle, report: ParityReport) -> None:
    data = {
        "schema_version": SCHEMA_VERSION,
        "kind": bundle.kind,
        "config": asdict(bundle.config),
        "graphs": {name: asdict(entry) for name, entry in bundle.graphs.items()},
        "reference": asdict(bundle.reference),
        "parity": report.to_json(),
        "provenance": dict(bundle.provenance),
    }
    with (bundle.path / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _staging(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block succeeds and disappears when it does not."""
    if out.exists() and not force:
        raise OutputError(f"{out} exists already.", "Choose another --out, or give --force to replace it.")
    if out.exists() and not (out / MANIFEST).is_file():
        raise OutputError(f"{out} is not a bundle, so it is not replaced.", "Choose another --out, or delete it yourself.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed * 1.1:
            raise OutputError(
                f"{out.parent} has {free / 1e9:.1f} GB free; this bundle needs about {needed * 1.1 / 1e9:.1f} GB.",
                "Free some space, or choose an --out on another disk.",
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out.parent} cannot be written: {error.strerror}.", "Choose another --out.") from error
    try:
        yield staging
        staging.chmod(0o755)
        _move_in(staging, out, force)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(f"{out} was made by another process meanwhile.", "Use that one, or give --force.") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise OutputError(
                f"Writing {out} failed: {error.strerror}.", "Free some space, or choose an --out on another disk."
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_in(staging: Path, out: Path, force: bool) -> None:
    if not (force and out.exists()):
        staging.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(old / out.name)
    staging.rename(out)
    shutil.rmtree(old)
