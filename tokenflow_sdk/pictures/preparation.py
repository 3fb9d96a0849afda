"""`Preparation`: how a picture was made square and in which colours it was read. Codes remember it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokenflow_sdk.arguments import shown
from tokenflow_sdk.errors import ArgumentError

__all__ = ["COLORS", "PREPROCESS_MODES", "Color", "Preparation", "Preprocess", "check_color"]

Preprocess = Literal["crop", "squash", "pad", "pad-grey"]
PREPROCESS_MODES: tuple[Preprocess, ...] = get_args(Preprocess)
Color = Literal["srgb", "as-stored"]
COLORS: tuple[Color, ...] = get_args(Color)


@dataclass(frozen=True)
class Preparation:
    """What was done to a picture before it was encoded.

    Args:
        preprocess: how it was made square: `crop`, `squash`, `pad` or `pad-grey`.
        color: `srgb`: colours of an embedded ICC profile were converted to sRGB; `as-stored`: they were not.
        fast: whether a JPEG was decoded at a reduced size.
        source: the first 16 hex digits of the SHA-256 of the picture's file, by which `tokenflow encode` knows what it has
            encoded; None: not known.

    Raises:
        ArgumentError: there is no such preprocessing or colour, or the source is no such digits.

    Example:
        >>> str(Preparation("crop", "srgb")), str(Preparation("pad-grey", "as-stored", fast=True))
        ('crop,srgb', 'pad-grey,as-stored,fast')
    """

    preprocess: Preprocess
    color: Color
    fast: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.preprocess, str) and self.preprocess in PREPROCESS_MODES):
            raise ArgumentError(
                f"There is no preprocessing {shown(self.preprocess)}.", f"Choose one of: {', '.join(PREPROCESS_MODES)}."
            )
        check_color(self.color)
        source: Any = self.source
        if source is not None and not (isinstance(source, str) and re.fullmatch("[0-9a-f]{16}", source)):
            raise ArgumentError(
                f"source={shown(source)} is no start of a hash.", "Give the first 16 hex digits of the SHA-256."
            )

    @classmethod
    def parse(cls, text: str) -> Preparation | None:
        """The preparation whose `str` is `text`; None if there is none."""
        found = re.fullmatch(f"({'|'.join(PREPROCESS_MODES)}),({'|'.join(COLORS)})(,fast)?(?:,([0-9a-f]{{16}}))?", text)
        if found is None:
            return None
        preprocess: Any = found[1]
        color: Any = found[2]
        return cls(preprocess, color, found[3] is not None, found[4])

    def __str__(self) -> str:
        parts = (self.preprocess, self.color, "fast" if self.fast else None, self.source)
        return ",".join(part for part in parts if part is not None)


def check_color(color: object) -> None:
    """Raise ArgumentError unless `color` is one of `COLORS`."""
    if not (isinstance(color, str) and color in COLORS):
        raise ArgumentError(f"color={shown(color)} is no way to read colours.", f"Choose one of: {', '.join(COLORS)}.")
