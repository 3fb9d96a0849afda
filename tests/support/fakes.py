"""A Session without an engine: codes of a picture are sums of its corners, the picture of codes is one grey level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tokenflow_sdk.backends.session import Array, Session, SessionOptions, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry, TensorSpec

CONFIG = TokenizerConfig(
    variant="fake",
    image_size=8,
    patch_nums=(1, 2),
    codebook_size=256,
    semantic_dim=32,
    pixel_dim=8,
    pixel_weight=1.0,
    semantic_width=4,
    codebook_sha256="ab" * 32,
    preprocess="crop",
)
_IMAGES = TensorSpec("images", "uint8", ("batch", 8, 8, 3))
_CODES = TensorSpec("code_indices", "int32", ("batch", 5))
_FILES = (FileEntry("none.onnx", 0, "0" * 64),)
GRAPHS = {
    "encode": GraphEntry(_FILES, (_IMAGES,), (_CODES, TensorSpec("latent", "float32", ("batch", 40, 2, 2)))),
    "decode": GraphEntry(_FILES, (_CODES,), (_IMAGES,)),
    "features": GraphEntry(_FILES, (_CODES,), (TensorSpec("features", "float32", ("batch", 4, 40)),)),
}


class FakeSession(Session):
    """Remembers the batch sizes and outputs it was asked for."""

    made: list[FakeSession]

    def __init__(self, path: Path, entry: GraphEntry, options: SessionOptions) -> None:
        super().__init__(entry.inputs, entry.outputs)
        self.options = options
        self.calls: list[tuple[int, tuple[str, ...]]] = []
        self.closed = 0

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        (array,) = feeds.values()
        self.calls.append((len(array), outputs))
        made: dict[str, Array] = {
            "code_indices": array.reshape(len(array), -1)[:, :5].astype(np.int32),
            "latent": np.zeros((len(array), 40, 2, 2), np.float32),
            "images": np.repeat(np.maximum(array[:, :1], 0), 192, axis=1).reshape(-1, 8, 8, 3).astype(np.uint8),
            "features": np.repeat(array[:, :4, None], 40, axis=2).astype(np.float32),
        }
        return [made[name] for name in outputs]

    def close(self) -> None:
        self.closed += 1


def fake_bundle() -> Bundle[TokenizerConfig]:
    return Bundle(Path("nowhere"), CONFIG, GRAPHS, {}, {}, {})
