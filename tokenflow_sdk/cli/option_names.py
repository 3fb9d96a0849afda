"""Says what the library says as the command line does: its arguments are options here."""

from __future__ import annotations

import ast
import re
import shlex

__all__ = ["as_options"]

_SAME = (
    *("backend", "batch_limit", "batch_usual", "cfg_scale", "color", "device", "max_pixels", "max_tokens", "memory_gb"),
    *("image_column", "key_column", "pages", "preprocess", "preset", "repetition_penalty", "revision", "seed", "sha256"),
    *("shard_size", "temperature", "threads"),
    *("tokenizer", "top_k", "top_p", "workspace_gb"),
)
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _SAME} | {
    "build_config": "--config",
    "n": "-n",
    "n_scales": "--scales",
}
_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_NUMBER = r"-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|inf)"
_ARGUMENT = re.compile(rf"(?<![^\s(])({'|'.join(_OPTIONS)})=({_STRING}|{_NUMBER})?(?=[,;:.)]*(?:\s|$))")
"""An argument in a sentence, with its value or without, as `n_scales=40` or `tokenizer=`. What is part of a path is none."""


def as_options(text: object) -> str:
    """An error, a warning or a line of the log, with the library's arguments written as options.

    Example:
        >>> as_options("n_scales=40 is too much. Use device='cpu', or leave build_config= out.")
        '--scales 40 is too much. Use --device cpu, or leave --config out.'
    """
    return _ARGUMENT.sub(_option, str(text))


def _option(found: re.Match[str]) -> str:
    option, value = _OPTIONS[found[1]], found[2]
    if value is None:
        return option
    return f"{option} {shlex.quote(ast.literal_eval(value)) if value.startswith((chr(39), chr(34))) else value}"
