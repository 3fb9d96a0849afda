"""What trainings let a model guess of a picture, beside their own task, so that it learns to see what pictures show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.tiny.captions import STYLES
from recipes.tiny.colours import COLOURS
from recipes.tiny.subjects import COUNTS, PHOTO, Subject

__all__ = ["groups", "guess_loss", "labels"]

_STYLES = [*STYLES, PHOTO]
_UNKNOWN = -100
"""What the cross entropy ignores."""


def groups(names: Sequence[str]) -> list[int]:
    """How many labels there are of each kind: names, first colours, styles, and numbers of things."""
    return [len(names), len(COLOURS), len(_STYLES), len(COUNTS)]


def labels(known: Subject, names: Sequence[str]) -> tuple[int, int, int, int]:
    """The labels of a picture: the indices of name, first colour, style and number. Of two things the first is named."""
    name, count = known.things[0] if known.things else (None, 0)
    index = names.index(name) if name in names else _UNKNOWN
    return index, COLOURS.index(known.colours[0]), _STYLES.index(known.style), count if name else _UNKNOWN


def guess_loss(guesses: Tensor, known: Tensor, sizes: Sequence[int]) -> Tensor:
    """The cross entropy of guesses [B, N, labels] at N places of what is known [B, 4] about pictures; `sizes` of `groups`."""
    loss = guesses.new_zeros(())
    for group, right in zip(torch.split(guesses, list(sizes), dim=-1), known.T, strict=True):
        every = F.cross_entropy(group.flatten(0, 1), right.repeat_interleave(group.shape[1]), reduction="none")
        loss = loss + every.sum() / max(1, int((right != _UNKNOWN).sum()) * group.shape[1])
    return loss
