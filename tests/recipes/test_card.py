"""The model card: the sections of the language models are replaced, and others stay as they are."""

from __future__ import annotations

from typing import Any

from recipes.tiny.card import with_language_models
from recipes.tiny.questions import KINDS

CARD = "# tiny\n\n## Generator\n\nDraws.\n\n## Understander\n\nAnswers.\n\n## Time\n\nSoon.\n\n## Data\n\nMuch.\n"


def figures(share: float) -> dict[str, Any]:
    asked = {"question": "What is this?", "answer": "A pear.", "right_answer": "Two apples.", "right": False}
    shares = dict.fromkeys(KINDS, share) | {f"{kind}_count": 12 for kind in KINDS}
    counts = {"pictures": 9, "names": 100, "own_drawings": share, "own_drawings_count": 8, "first_token": 0.0314}
    answers = [{"shown": (("apple", 2),), "style": "3d"} | asked]
    distances = {"distance": 0.2, "training_distance": 0.3, "seeds_differ": 40.0, "cfg_scale": 1.5}
    drawing = {"labels": 64, "preset": "fast", "presets": {"fast": share}, "seconds": {"fast": 0.255}} | distances
    return {"generation": drawing, "understanding": {**shares, **counts, "answers": answers}, "bytes": 29_812_345}


def test_the_sections_are_replaced() -> None:
    first = with_language_models(CARD, figures(0.25))
    assert "in `recipes/tiny/config.py`. 29.8 MB." in first
    assert "\n\n## Generator\n\nDraws 64 things in five styles" in first
    assert "| `fast` | 25% | 0.26 s |" in first
    assert first.count("## Understander\n") == 1 and first.endswith("\n\n## Time\n\nSoon.\n\n## Data\n\nMuch.\n")
    assert "| which style | 25% | 12 |" in first and "after 31 ms" in first
    assert "| two apples, 3d | What is this? | A pear. | Two apples. |" in first
    assert with_language_models(first, figures(0.75)) == with_language_models(CARD, figures(0.75)) != first
