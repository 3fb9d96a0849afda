"""The model card: the understander's section is put in, and replaced, and others stay as they are."""

from __future__ import annotations

from typing import Any

from recipes.tiny.card import with_understander
from recipes.tiny.questions import KINDS

CARD = "# tiny\n\n## Generator\n\nDraws.\n\n## Time\n\nSoon.\n\n## Data\n\nMuch.\n"


def figures(share: float) -> dict[str, Any]:
    asked = {"question": "What is this?", "answer": "A pear.", "right_answer": "Two apples.", "right": False}
    shares = dict.fromkeys(KINDS, share) | {f"{kind}_count": 12 for kind in KINDS}
    counts = {"pictures": 9, "names": 100, "own_drawings": share, "own_drawings_count": 8, "first_token": 0.0314}
    return {**shares, **counts, "answers": [{"shown": (("apple", 2),), "style": "3d"} | asked]}


def test_the_section_is_put_in_and_replaced() -> None:
    first = with_understander(CARD, figures(0.25))
    before, after = CARD.split("## Time")
    assert first.startswith(f"{before}## Understander\n") and first.endswith(f"\n\n## Time{after}")
    assert "| which style | 25% | 12 |" in first and "after 31 ms" in first
    assert "| two apples, 3d | What is this? | A pear. | Two apples. |" in first
    assert with_understander(first, figures(0.75)) == with_understander(CARD, figures(0.75)) != first
