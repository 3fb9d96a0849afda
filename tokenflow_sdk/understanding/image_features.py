"""Images in any form - file, array, codes, features - to the quantized features that an understander reads."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.errors import ArgumentError, ArrayError, PreparationWarning
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Color, Preprocess
from tokenflow_sdk.pictures.sources import ImageSource, to_array
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.understanding.prompt import ImageBlock

__all__ = ["ImageFeatures", "ImageInput"]

ImageInput: TypeAlias = "ImageSource | Codes | NDArray[Any]"
"""An image as `Tokenizer.encode` takes it; its codes; or its features, float [N, C], of NumPy or another library."""

_REMEMBERED = 64
"""Images whose features are kept, so that a second question about one does not encode it again."""


class ImageFeatures:
    """Gives images' features, and encodes each image once. Safe to call from several threads.

    Args:
        tokenizer: the tokenizer that the model reads; its encoder is loaded for the first image that is not codes.
        config: what features must look like.
    """

    def __init__(self, tokenizer: Tokenizer, config: UnderstanderConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._encoded: OrderedDict[bytes, ImageBlock] = OrderedDict()
        self._lock = threading.Lock()

    def of_all(
        self,
        images: ImageInput | Sequence[ImageInput] | None,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
    ) -> list[ImageBlock]:
        """The features of one image, or of each image in a list.

        Args:
            images: one or a list.
            preprocess: how images are made square; None: as the model was trained.
            color: what becomes of colour profiles, as in `Tokenizer.encode`.

        Raises:
            ArgumentError: none was given, or there is no such preprocessing or colour.
            ImageError, ArrayError, CodesError: one cannot be used; see `tokenflow_sdk.errors`.
            BackendError, MissingPackageError: the engine cannot run.
        """
        preprocess = self._tokenizer.preparation(self._wanted(preprocess), color).preprocess
        several = _several(images)
        given = [image for image in several if image is not None]
        if not given or len(given) < len(several):
            raise ArgumentError(
                "No image was given, and this model answers questions about images.",
                "Give a path, a PIL image, Codes or features, or a list of them.",
            )
        return [self._of(image, preprocess, color) for image in given]

    def warn_of_preparation(self, questions: Iterable[object], preprocess: Preprocess | None, stacklevel: int) -> None:
        """Warn once if codes were prepared otherwise than the model was trained, or than `preprocess`, where that is known.

        Args:
            questions: for each the image or images it is about.
            preprocess: chosen by the caller; None: as the model was trained.
            stacklevel: as in `warnings.warn`.
        """
        wanted = self._wanted(preprocess)
        for image in (image for images in questions for image in _several(images)):
            known = image.preparation if isinstance(image, Codes) else None
            if wanted is not None and known is not None and known.preprocess != wanted:
                warnings.warn(
                    f"Codes of a picture prepared by {known.preprocess!r} are given to a model that reads pictures prepared by "
                    f"{wanted!r}, so its answers may be worse. Encode with preprocess={wanted!r}.",
                    PreparationWarning,
                    stacklevel=stacklevel,
                )
                return

    def _wanted(self, preprocess: Preprocess | None) -> Preprocess | None:
        return self._config.preprocess if preprocess is None else preprocess

    def _of(self, image: Any, preprocess: Preprocess, color: Color) -> ImageBlock:
        if isinstance(image, Codes):
            return _own(self._tokenizer.features(image))
        image = to_array(image)
        if isinstance(image, np.ndarray) and image.dtype.kind == "f":
            return self._checked(image)
        # A copy: the digest must be that of the pixels that are encoded, even if the caller fills the array again meanwhile.
        pixels = np.array(self._tokenizer.preprocess(image, preprocess=preprocess, color=color))
        digest = hashlib.sha256(pixels.tobytes()).digest()
        with self._lock:
            if digest in self._encoded:
                self._encoded.move_to_end(digest)
                return self._encoded[digest]
        codes = self._tokenizer.codes(self._tokenizer.encode_array(pixels[None])[0])
        block = _own(self._tokenizer.features(codes))
        with self._lock:
            self._encoded[digest] = block
            if len(self._encoded) > _REMEMBERED:
                self._encoded.popitem(last=False)
        return block

    def _checked(self, features: NDArray[Any]) -> ImageBlock:
        c = self._config
        if features.shape != (c.image_tokens, c.code_dim):
            raise ArrayError(
                f"Features of {c.tokenizer_variant} are [{c.image_tokens}, {c.code_dim}], not {list(features.shape)}.",
                "Take them from Tokenizer.features of the tokenizer that this model was exported with.",
            )
        block = _own(features)
        if not np.isfinite(block.features).all():
            raise ArrayError("The features hold NaN or infinity in float32.", "Take them from Tokenizer.features.")
        return block


def _several(images: Any) -> list[Any]:
    return [*images] if isinstance(images, (list, tuple)) else [images]


def _own(features: NDArray[Any]) -> ImageBlock:
    """A block of a read-only copy: the caller may fill the array again, and requests read it and its digest later."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity
        kept = np.array(features, np.float32, order="C")
    kept.flags.writeable = False
    return ImageBlock(kept)
