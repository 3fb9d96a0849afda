"""Run a tokenizer's graphs on arrays: images to codes and latents, codes to images and features."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Array, OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.forking import no_fork

__all__ = ["TokenizerGraphs"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class TokenizerGraphs:
    """The graphs of a tokenizer's bundle, each loaded on first use. Safe to call from several threads.

    Values of inputs are not checked; `Tokenizer` does that. `code_indices` are int32 [B, L], -1 in absent scales.

    Args:
        bundle: a tokenizer's bundle.
        open_session: loads a graph.
        options: how graphs are run.
        batch_limit: largest batch in one call of a session; larger batches are split.
    """

    def __init__(
        self, bundle: Bundle[TokenizerConfig], open_session: OpenSession, options: SessionOptions, batch_limit: int = 1
    ) -> None:
        self.bundle = bundle
        self.batch_limit = batch_limit
        self._open_session, self._options = open_session, options
        self._sessions: dict[str, Session] = {}
        # A signal handler may close this, or use it, while the thread that it interrupted loads a graph.
        self._lock = threading.RLock()
        self._closed = False

    @property
    def devices(self) -> list[str]:
        """Devices of the graphs loaded so far, sorted, e.g. `["cuda:0"]`."""
        with no_fork(), self._lock:
            return sorted({session.device for session in self._sessions.values()})

    def load(self, name: str) -> Session:
        """The session of a graph, loaded if it is not yet.

        Args:
            name: `encode`, `decode`, `features` or `semantic`.

        Raises:
            ArgumentError: `close` was called.
            CorruptBundleError, BackendError, MissingPackageError: the graph is missing or cannot be loaded.
        """
        with no_fork(), self._lock:
            if self._closed:
                raise ArgumentError("This Tokenizer is closed.", "Make a new one with Tokenizer.from_pretrained.")
            if name not in self._sessions:
                path, entry = self.bundle.graph_path(name), self.bundle.graph(name)
                self._sessions[name] = self._open_session(path, entry, self._options)
            return self._sessions[name]

    def encode(self, images: NDArray[np.uint8]) -> Int32:
        """Images u8 [B, H, W, 3] -> code indices int32 [B, L]."""
        return self._run("encode", "images", images, "code_indices").astype(np.int32, copy=False)

    def latent(self, images: NDArray[np.uint8]) -> Float32:
        """Images u8 [B, H, W, 3] -> the encoders' output before the codebook search, float32 [B, C, g, g]."""
        return self._run("encode", "images", images, "latent").astype(np.float32, copy=False)

    def encode_with_latent(self, images: NDArray[np.uint8]) -> tuple[Int32, Float32]:
        """What `encode` and `latent` give, in one run of the graph."""
        codes, latent = self._run_for("encode", "images", images, ("code_indices", "latent"))
        return codes.astype(np.int32, copy=False), latent.astype(np.float32, copy=False)

    def decode(self, code_indices: Int32) -> NDArray[np.uint8]:
        """Code indices -> images u8 [B, H, W, 3]."""
        return self._run("decode", "code_indices", code_indices, "images").astype(np.uint8, copy=False)

    def features(self, code_indices: Int32) -> Float32:
        """Code indices -> quantized features, float32 [B, g * g, C]."""
        return self._run("features", "code_indices", code_indices, "features").astype(np.float32, copy=False)

    def semantic(self, code_indices: Int32) -> Float32:
        """Code indices -> features of the semantic decoder, float32 [B, g * g, W]."""
        return self._run("semantic", "code_indices", code_indices, "features").astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the sessions. May be called more than once; other calls then raise ArgumentError."""
        with no_fork(), self._lock:
            self._closed = True
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def _run(self, graph: str, feed: str, array: Array, output: str) -> NDArray[Any]:
        """One output of `_run_for`."""
        [found] = self._run_for(graph, feed, array, (output,))
        return found

    def _run_for(self, graph: str, feed: str, array: Array, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Run a graph on all rows, at most `batch_limit` in a call.

        Raises:
            ArgumentError: this is closed, also meanwhile.
        """
        # Asked for at every call, because another thread may close this between two.
        parts = [
            self.load(graph).run({feed: array[start : start + self.batch_limit]}, outputs)
            for start in range(0, len(array), self.batch_limit)
        ]
        return [parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts]) for name in outputs]
