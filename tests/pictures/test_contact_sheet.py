from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tokenflow_sdk.pictures.contact_sheet import contact_sheet

WIDTH, HEIGHT = 40, 30
MARGIN, LINE = 12, 17


def tiles(count: int, caption: str = "") -> list[tuple[Image.Image, str]]:
    """Pictures of one colour each."""
    return [(Image.new("RGB", (WIDTH, HEIGHT), (10 + i, 200, 0)), caption) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "columns", "grid"),
    [(1, 1, (1, 1)), (1, 4, (1, 1)), (4, 4, (4, 1)), (5, 4, (4, 2)), (8, 4, (4, 2)), (3, 1, (1, 3))],
)
def test_pictures_stand_in_rows(count: int, columns: int, grid: tuple[int, int]) -> None:
    sheet = contact_sheet(tiles(count), columns)
    across, down = grid
    assert sheet.mode == "RGB"
    assert sheet.size == (across * (WIDTH + MARGIN) + MARGIN, down * (HEIGHT + LINE + MARGIN) + MARGIN)
    pixels = np.asarray(sheet).copy()
    for i in range(count):
        x, y = MARGIN + i % across * (WIDTH + MARGIN), MARGIN + i // across * (HEIGHT + LINE + MARGIN)
        tile = pixels[y : y + HEIGHT, x : x + WIDTH]
        assert (tile == (10 + i, 200, 0)).all()
        tile[:] = 255
    # Without captions all else is paper.
    assert (pixels == 255).all()


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_captions_stand_under_their_pictures_with_room_for_the_longest(lines: int) -> None:
    sheet = contact_sheet([*tiles(1, "one"), *tiles(1, "\n".join(["Mq"] * lines))], columns=2)
    assert sheet.height == HEIGHT + lines * LINE + 2 * MARGIN
    ink = (np.asarray(sheet) < 200).all(axis=-1)
    below = ink[MARGIN + HEIGHT :]
    assert below[:, MARGIN : MARGIN + WIDTH].any()
    second = below[:, 2 * MARGIN + WIDTH :].any(axis=1)
    rows = np.flatnonzero(second)
    # The last line begins within its own room, and nothing is drawn below the sheet's margin.
    assert (lines - 1) * LINE - 4 <= rows.max() <= lines * LINE + 4
    assert not ink[:MARGIN].any()
    assert not ink[-4:].any()


def test_the_pictures_are_left_as_they_are() -> None:
    given = tiles(2, "caption")
    contact_sheet(given, 2)
    assert [picture.getpixel((0, HEIGHT - 1)) for picture, _ in given] == [(10, 200, 0), (11, 200, 0)]
