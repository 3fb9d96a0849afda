"""The training loop and the arguments that both trainings share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["CHECKPOINT", "CURVE", "Training", "device", "has_bfloat16", "run", "training_parser"]

CHECKPOINT, CURVE = "checkpoint.pt", "curve.jsonl"
SAVE_EVERY = 100
EVALUATE_EVERY = 500


class Training(Protocol):
    """A training that runs step by step and can save and load its state."""

    step: int
    steps: int

    def run_step(self) -> dict[str, float]: ...
    def evaluate(self) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has products in bfloat16. Without them, bfloat16 is several times slower than float32 on a CPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("sve_bf16"))


def training_parser(description: str | None, out: Path, batch: int, rate: float) -> argparse.ArgumentParser:
    """A parser with the arguments of both trainings and the defaults of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/tiny"), help="gathered pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="checkpoint and curve (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20000, help="of the whole training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="pictures in a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=rate, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(training: Training, out: Path) -> None:
    """Train to the end from the checkpoint in `out`, if there is one, with checkpoints and evaluations in between."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / CHECKPOINT).exists():
        training.load(torch.load(out / CHECKPOINT, map_location=device(), weights_only=True))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, began = Console(stderr=True), perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=training.steps, completed=training.step)
        while training.step < training.steps:
            losses = training.run_step()
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            progress.update(task, completed=training.step, description=shown)
            last = training.step == training.steps
            if training.step % SAVE_EVERY == 0 or last:
                _save(out / CHECKPOINT, training.state())
            if training.step % EVALUATE_EVERY == 0 or last:
                figures = {"step": training.step, "seconds": perf_counter() - began} | training.evaluate() | losses
                with (out / CURVE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
                console.print(" ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def _save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint through a temporary file, so that it is never half written."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
