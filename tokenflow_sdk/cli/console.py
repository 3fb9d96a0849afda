"""The two rich consoles that all commands print to: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["stderr", "stdout"]

# Piped output has no width of its own: 160 columns keep the lines of tables from wrapping.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
stderr = Console(stderr=True, highlight=False)
