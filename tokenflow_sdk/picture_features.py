"""Whatever names a picture - a file, codes, features - to the features that a language model reads."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.codes import Codes
from tokenflow_sdk.config import UnderstanderConfig
from tokenflow_sdk.errors import ArgumentError, ArrayError
from tokenflow_sdk.images import ImageSource
from tokenflow_sdk.token_prompt import ImageBlock
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["Picture", "PictureFeatures"]

Picture: TypeAlias = "ImageSource | Codes | NDArray[Any]"
"""A picture as `Tokenizer.encode` takes it; its codes; or its features, float [N, C]."""

_REMEMBERED = 64
"""Pictures whose features are kept, so that a second question about one does not encode it again."""


class PictureFeatures:
    """Encodes pictures once. Safe to call from several threads.

    Args:
        tokenizer: the tokenizer that the model reads; its encoder is loaded for the first picture that is not codes.
        config: what features must look like.
    """

    def __init__(self, tokenizer: Tokenizer, config: UnderstanderConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._encoded: OrderedDict[bytes, ImageBlock] = OrderedDict()
        self._lock = threading.Lock()

    def of_all(self, pictures: Picture | Sequence[Picture] | None) -> list[ImageBlock]:
        """One picture, or a list of several.

        Raises:
            ArgumentError: none was given.
            ImageError, ArrayError, CodesError: one cannot be used; see `tokenflow_sdk.errors`.
            BackendError, MissingPackageError: the engine cannot run.
        """
        several: list[Picture | None] = [*pictures] if isinstance(pictures, (list, tuple)) else [pictures]  # type: ignore[list-item]
        given = [picture for picture in several if picture is not None]
        if not given or len(given) < len(several):
            raise ArgumentError(
                "No picture was given, and this model answers questions about pictures.",
                "Give a path, a PIL image, Codes or features, or a list of them.",
            )
        return [self._of(picture) for picture in given]

    def _of(self, picture: Picture) -> ImageBlock:
        if isinstance(picture, Codes):
            return ImageBlock(self._tokenizer.features(picture))
        if isinstance(picture, np.ndarray) and picture.dtype.kind == "f":
            return ImageBlock(self._checked(picture))
        pixels = self._tokenizer.preprocess(picture)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        with self._lock:
            if digest in self._encoded:
                self._encoded.move_to_end(digest)
                return self._encoded[digest]
        codes = self._tokenizer.codes(self._tokenizer.encode_array(pixels[None])[0])
        block = ImageBlock(self._tokenizer.features(codes))
        with self._lock:
            self._encoded[digest] = block
            if len(self._encoded) > _REMEMBERED:
                self._encoded.popitem(last=False)
        return block

    def _checked(self, features: NDArray[Any]) -> NDArray[np.float32]:
        c = self._config
        if features.shape != (c.image_tokens, c.code_dim):
            raise ArrayError(
                f"Features of {c.tokenizer_variant} are [{c.image_tokens}, {c.code_dim}], not {list(features.shape)}.",
                "Take them from Tokenizer.features of the tokenizer that this model was exported with.",
            )
        if not np.isfinite(features).all():
            raise ArrayError("The features hold NaN or infinity.", "Take them from Tokenizer.features.")
        return np.ascontiguousarray(features, np.float32)
