"""Opens graphs in OpenVINO, and keeps what was compiled in the engine cache: compiling takes seconds, loading fewer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tokenflow_sdk.backends.cores import processor
from tokenflow_sdk.backends.openvino import (
    OPENVINO,
    Compiled,
    OpenVinoSession,
    compile_graph,
    import_openvino,
    load_compiled,
    properties,
)
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.cache import EngineCache, EngineKey, graph_digest
from tokenflow_sdk.errors import OutputError

__all__ = ["REVISION", "open_openvino"]

REVISION = "1"
"""Changes with what `compile_graph` makes of a graph."""


def open_openvino(
    path: Path, entry: GraphEntry, options: SessionOptions, open_in_child: Callable[[], Session] | None = None
) -> Session:
    """Open a graph in OpenVINO, from the engine cache where it was compiled before. An `OpenSession`.

    `open_in_child` is that of `OpenVinoSession`. Where the cache cannot be written, a warning says so, and the graph is
    compiled each time.

    Raises:
        BackendError, CorruptBundleError, MissingPackageError, ArgumentError: see `compile_graph`.
    """
    key, cache = _key(path, entry, options), EngineCache()
    compiled = _load(cache, key, options)
    if compiled is None:
        compiled = compile_graph(path, entry, options)
        try:
            cache.make_directory()
            cache.put(key, _exported(compiled), {"backend": OPENVINO})
            # Weights that are mapped from a file take half of the memory.
            compiled = _load(cache, key, options) or compiled
        except OutputError as error:
            logging.getLogger("tokenflow_sdk").warning("%s is compiled again at the next start: %s", path.name, error)
    return OpenVinoSession(compiled, entry, options.device, open_in_child)


def _key(path: Path, entry: GraphEntry, options: SessionOptions) -> EngineKey:
    """The key of a compiled model in the engine cache."""
    return EngineKey(
        graph=path.stem,
        graph_sha256=graph_digest(entry),
        revision=REVISION,
        flavour=OPENVINO,
        version=import_openvino().__version__,
        target="cpu" if options.device == "auto" else options.device,
        precision="fp16" if options.device == "npu" else "fp32",
        profile=hashlib.sha256(json.dumps(properties(options), sort_keys=True).encode()).hexdigest()[:16],
        gpu=processor(),
    )


def _load(cache: EngineCache, key: EngineKey, options: SessionOptions) -> Compiled | None:
    """The compiled model of a key; None if it is not in the cache, or damaged."""
    try:
        found = cache.find(key)
        if found is None:
            return None
        data = np.memmap(found.path, np.uint8, mode="c")
    except (OSError, ValueError):  # there is no directory for a cache; the file is gone meanwhile, or empty
        return None
    return load_compiled(data, options) if hashlib.sha256(data.data).hexdigest() == found.sha256 else None


def _exported(compiled: Compiled) -> bytes:
    data = compiled.model.export_model()
    return data if isinstance(data, bytes) else bytes(data.getvalue())
