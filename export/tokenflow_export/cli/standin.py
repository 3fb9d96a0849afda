"""`tokenflow export standin`: a checkpoint of stand-in weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_export.models.config import VARIANTS
from tokenflow_sdk.errors import OutputError

__all__ = ["standin"]


def standin(arguments: argparse.Namespace) -> None:
    """Write a checkpoint of stand-in weights."""
    import torch

    from tokenflow_export.checkpoints.standin import standin_arrays
    from tokenflow_export.progress import ProgressSteps

    out: Path = arguments.out
    if out.exists():
        raise OutputError(f"{out} exists already.", "Delete it first, or choose another --out.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with ProgressSteps() as steps:
            steps.start(f"generating weights of {arguments.variant}")
            state = {key: torch.from_numpy(array) for key, array in standin_arrays(VARIANTS[arguments.variant])}
            steps.start(f"writing {out}")
            torch.save({"model": state}, partial)
            partial.rename(out)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{out} cannot be written: {error}", "Choose another --out, or free some space.") from error
    finally:
        partial.unlink(missing_ok=True)
