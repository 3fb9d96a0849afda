"""A conversation as the language model reads it: blocks of token ids and of image features, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "ImageBlock", "TokenPrompt", "split_blocks"]


@dataclass(frozen=True, eq=False)
class ImageBlock:
    """One image: its quantized features float32 [N, C], which take the places of N tokens."""

    features: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the features."""
        return hashlib.sha256(self.features.tobytes()).digest()


Block: TypeAlias = "tuple[int, ...] | ImageBlock"


@dataclass(frozen=True, eq=False)
class TokenPrompt:
    """The blocks of a conversation.

    `shared` are numbers of blocks, ascending: other prompts may begin with the same first blocks, so the pages of these
    prefixes are worth keeping.
    """

    blocks: tuple[Block, ...]
    shared: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens, those of images included."""
        return sum(map(len, self.blocks))

    @cached_property
    def prefix_boundaries(self) -> tuple[tuple[int, bytes], ...]:
        """Length in tokens and SHA-256 of each prefix in `shared`, ascending.

        The digest is of the content alone: how a prefix is divided into blocks of text does not matter.
        """
        state, length, found = hashlib.sha256(), 0, []
        for number, block in enumerate(self.blocks, start=1):
            # Token ids are never negative, so no text has the digest of an image.
            marked = (-1, len(block)) if isinstance(block, ImageBlock) else block
            state.update(np.asarray(marked, np.int64).tobytes())
            if isinstance(block, ImageBlock):
                state.update(block.digest)
            length += len(block)
            if number in self.shared:
                found.append((length, state.copy().digest()))
        return tuple(found)

    def followed_by(self, ids: Sequence[int], shared: bool) -> TokenPrompt:
        """This prompt and then some tokens; `shared`: whether the whole may be the prefix of another prompt."""
        blocks = (*self.blocks, tuple(ids))
        return TokenPrompt(blocks, (*self.shared, len(blocks)) if shared else self.shared)


def split_blocks(blocks: Sequence[Block], count: int) -> tuple[list[Block], list[Block]]:
    """Split blocks after `count` tokens. Neither part has empty blocks."""
    first: list[Block] = []
    rest: list[Block] = []
    for block in blocks:
        taken = min(len(block), count)
        count -= taken
        if taken:
            first.append(_part(block, slice(0, taken)))
        if taken < len(block):
            rest.append(_part(block, slice(taken, None)))
    return first, rest


def _part(block: Block, tokens: slice) -> Block:
    return ImageBlock(block.features[tokens]) if isinstance(block, ImageBlock) else block[tokens]
