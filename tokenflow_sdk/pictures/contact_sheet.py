"""Contact sheets: a grid of images with captions."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet"]

_MARGIN = 12
_LINE = 17
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)


def contact_sheet(tiles: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """Arrange images in a grid, row by row, each with its caption below.

    Args:
        tiles: at least one pair of an image and its caption; images must have the same size, captions may have several lines.
        columns: most images in a row.

    Returns:
        An RGB image.
    """
    width, height = tiles[0][0].size
    lines = max(caption.count("\n") + 1 for _, caption in tiles)
    step_x, step_y = width + _MARGIN, height + lines * _LINE + _MARGIN
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for i, (picture, caption) in enumerate(tiles):
        x, y = _MARGIN + i % columns * step_x, _MARGIN + i // columns * step_y
        sheet.paste(picture, (x, y))
        draw.multiline_text((x, y + height + 3), caption, fill=_INK, font=font, spacing=2)
    return sheet
