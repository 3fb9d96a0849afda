"""Writes docs/reference/config-keys.md from what the exporter knows of config.json: `python docs/write_config_keys.py`.

A test fails when the file is not what this gives.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenflow_export.checkpoints.architecture import HARMLESS, LIMITED, LLAMA_LIMITED, USED

PAGE = Path(__file__).parent / "reference" / "config-keys.md"

_HEAD = """\
# Keys of config.json

Written by `docs/write_config_keys.py`. What `tokenflow export generator` and `tokenflow export understanding` make of each key
of a language model's `config.json`. A key that stands in none of these tables is refused by name, because it may change what
the model computes; if you know that it does not, add `--ignore-key KEY`. Where such a key is null, it is as good as absent.

Weights are refused too where they are no floats of 16 bits or more, or have values that are NaN or infinite.

"""


def page() -> str:
    """The whole page."""
    limited = [(f"`{key}`", _values(allowed), reason) for key, (allowed, reason) in LIMITED.items()]
    limited += [(f"`{key}` of a Llama", _values(allowed), reason) for key, (allowed, reason) in LLAMA_LIMITED.items()]
    return _HEAD + "\n".join(
        [
            *_table("Used", ("key", "what for"), [(f"`{key}`", use) for key, use in USED.items()]),
            *_table("Used if they have these values, else refused", ("key", "values", "because"), limited),
            *_table("Harmless", ("key", "because"), [(f"`{key}`", reason) for key, reason in HARMLESS.items()]),
        ]
    )


def _values(allowed: tuple[object, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in allowed)


def _table(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return [f"## {title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
