"""Fills what was measured into the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.tiny.concepts import THINGS
from recipes.tiny.data import Pictures
from recipes.tiny.subjects import amount

__all__ = ["card", "with_language_models"]

_TEMPLATE = Path(__file__).parent / "card.md"


def card(figures: dict[str, Any], pictures: Pictures, trained: Sequence[dict[str, Any]], history: str) -> str:
    """Fill the figures into the model card `card.md`."""
    times = figures["seconds"]
    return _TEMPLATE.read_text(encoding="utf-8").format(
        r=figures["reconstruction"],
        l=figures["labels"],
        **_about_generation(figures["generation"]),
        **_about_understanding(figures["understanding"]),
        megabytes=figures["bytes"] / 1e6,
        chance=1 / figures["labels"]["labels"],
        encode_ms=times["encode"] * 1e3,
        encode_ratio=times["encode_eager"] / times["encode"],
        decode_ms=times["decode"] * 1e3,
        decode_ratio=times["decode_eager"] / times["decode"],
        photos=len(pictures.photos) + len(pictures.test_photos) + len(pictures.other_photos),
        drawings=len(pictures.icon_entries),
        captioned=len(trained),
        history=history,
        licences=", ".join(pictures.licences),
    )


def with_language_models(card: str, figures: dict[str, Any]) -> str:
    """Replace what a card says about the generator and the understander, and its beginning, by these figures.

    Data, history and the tokenizer's figures stay as they are.
    """
    values = _about_generation(figures["generation"]) | _about_understanding(figures["understanding"])
    values |= {"megabytes": figures["bytes"] / 1e6}
    template = _sections(_TEMPLATE.read_text(encoding="utf-8"))
    sections = _sections(card)
    for title in ("", "Generator", "Understander"):
        sections[title] = template[title].format(**values)
    return "\n## ".join(sections.values())


def _sections(card: str) -> dict[str, str]:
    """A card cut before each `## `, by titles; what is before the first has none."""
    first, *others = card.split("\n## ")
    return {"": first} | {text.partition("\n")[0]: text for text in others}


def _about_generation(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        f"| `{preset}` | {share:.0%} | {figures['seconds'][preset]:.2f} s |" for preset, share in figures["presets"].items()
    ]
    return {"g": figures, "things": ", ".join(sorted(THINGS.values())), "presets": "\n".join(rows)}


def _about_understanding(figures: dict[str, Any]) -> dict[str, Any]:
    return {"u": figures, "answers": _answers(figures["answers"]), "answer_ms": figures["first_token"] * 1e3}


def _answers(rows: Sequence[dict[str, Any]]) -> str:
    """A table of questions and answers."""
    table = ["| shown | question | answer | right answer | counts as right |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        things = " and ".join(amount(name, count) for name, count in row["shown"]) or "no name known"
        cells = (
            f"{things}, {row['style']}",
            row["question"],
            row["answer"],
            row["right_answer"],
            "yes" if row["right"] else "no",
        )
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)
