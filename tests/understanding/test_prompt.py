from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_sdk.understanding.prompt import Block, ImageBlock, TokenPrompt, split_blocks

PICTURE, OTHER = (ImageBlock(np.full((3, 2), value, np.float32)) for value in (1, 2))


def test_points_are_lengths_and_digests_of_what_comes_before() -> None:
    prompt = TokenPrompt(((5, 6), PICTURE, (7,), OTHER, (8, 9)), (2, 4))
    assert len(prompt) == 11
    assert [length for length, _ in prompt.prefix_boundaries] == [5, 9]
    again = TokenPrompt(((5, 6), ImageBlock(PICTURE.features.copy()), (1, 2, 3)), (2,))
    assert again.prefix_boundaries[0] == prompt.prefix_boundaries[0]


def test_every_difference_before_a_point_changes_it() -> None:
    prompts = [
        ((5, 6), PICTURE),
        ((5, 7), PICTURE),
        ((5, 6), OTHER),
        ((5,), PICTURE, (6,)),
        (PICTURE, (5, 6)),
        ((5, 6), ImageBlock(PICTURE.features[:2])),
        ((5, 6, 3),),
    ]
    assert len({TokenPrompt((*blocks, (1,)), (len(blocks),)).prefix_boundaries[0][1] for blocks in prompts}) == len(prompts)


def test_where_blocks_end_does_not_matter() -> None:
    parts = [(((5, 6), (7,), PICTURE), 3), (((5,), (6, 7), PICTURE), 3), (((5, 6, 7), PICTURE), 2)]
    assert len({TokenPrompt((*blocks, (1,)), (count,)).prefix_boundaries for blocks, count in parts}) == 1


def test_what_follows_may_be_shared_too() -> None:
    prompt = TokenPrompt(((5,), PICTURE, (6,)), (2,))
    history = prompt.followed_by([7, 8], shared=True)
    assert history.shared == (2, 4)
    assert history.prefix_boundaries[0] == prompt.prefix_boundaries[0]
    following = history.followed_by([9], shared=False)
    assert following.prefix_boundaries == history.prefix_boundaries
    assert len(following) == 8


BLOCKS = st.lists(
    st.lists(st.integers(0, 9), max_size=6).map(tuple)
    | st.integers(0, 5).map(lambda count: ImageBlock(np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)))
)


def rows(blocks: list[Block]) -> list[object]:
    """Every token and every row of features."""
    return [
        row for block in blocks for row in (map(tuple, block.features) if isinstance(block, ImageBlock) else map(int, block))
    ]


@given(BLOCKS, st.integers(0, 40))
def test_blocks_are_split_anywhere(blocks: list[Block], count: int) -> None:
    first, rest = split_blocks(blocks, count)
    assert rows(first) == rows(blocks)[:count]
    assert rows(rest) == rows(blocks)[count:]
    assert all(len(block) for block in (*first, *rest))
