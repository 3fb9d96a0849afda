"""Contact sheets: pictures in rows with captions under them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet"]

_MARGIN = 12
_LINE = 17
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)


def contact_sheet(tiles: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """An RGB picture of `tiles`, row by row; each is a picture and its caption of one or more lines.

    All pictures must have one size.
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
