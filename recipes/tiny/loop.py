"""The training loop and the arguments that all trainings share. A training can be killed at any time and goes on later."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn

from recipes.tiny.optimizers import Optimizers

__all__ = [
    "BEST",
    "CHECKPOINT",
    "CURVE",
    "AveragedTraining",
    "Training",
    "best_average",
    "cooled",
    "cools",
    "device",
    "has_bfloat16",
    "kept_text_tokenizer",
    "plot",
    "read_curve",
    "run",
    "training_parser",
    "transformer_parser",
]

M = TypeVar("M", bound=nn.Module)
CHECKPOINT, BEST, CURVE, PLOT = "checkpoint.pt", "best.pt", "curve.jsonl", "curve.png"
SAVE_EVERY, EVALUATE_EVERY = 300.0, 250
"""Seconds from one checkpoint to the next, and steps from one evaluation, with a checkpoint too, to the next."""

COOL_DOWN = 0.3
"""The last share of a training, in which the learning rate falls. Before, it is constant, so that a training can be made longer
or shorter while it runs.
"""


class Training(Protocol):
    """A training that runs step by step and can save and load its state."""

    step: int
    steps: int

    def run_step(self) -> dict[str, float]: ...
    def evaluate(self, out: Path) -> dict[str, float]:
        """Measure on held-out pictures; no random number is drawn. A training of pictures also writes some of them to `out`."""
        ...

    def score(self, figures: dict[str, float]) -> float:
        """How good a checkpoint with these figures is. The best checkpoint is kept."""
        ...

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the weights of another training."""
        ...

    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class AveragedTraining(Generic[M]):
    """What the trainings have in common: a model, its moving average, its optimizer and the step, which a checkpoint keeps.

    Args:
        model: on its device; the average begins as a copy.
        optimizer: of the model's weights.
        decay: of the average in each step at most.
    """

    def __init__(self, model: M, optimizer: torch.optim.Optimizer | Optimizers, decay: float) -> None:
        self.model, self.optimizer, self.decay = model, optimizer, decay
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.step = 0

    def descend(self, loss: Tensor, rate: float) -> None:
        """Take one optimizer step down the gradient of a loss, with a learning rate, and bring the average forward."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the weights of another training."""
        self.model.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def best_average(*directories: Path) -> dict[str, Tensor]:
    """The averaged weights of a training's best checkpoint; the mean of several trainings that began with the same weights."""
    averages = [torch.load(each / BEST, map_location="cpu", weights_only=True)["average"] for each in directories]
    mean: dict[str, Tensor] = averages[0]
    for name, weights in mean.items():
        if weights.is_floating_point():
            mean[name] = torch.stack([average[name] for average in averages]).mean(dim=0)
    return mean


def kept_text_tokenizer(path: Path, make: Callable[[], TextTokenizer], start: Path | None) -> TextTokenizer:
    """The text tokenizer in a file beside the checkpoint. If there is none yet, that of the training in `start`, or a new one.

    A training goes on with the one that it began with: made again, ids could mean other texts than the model has learned.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        (TextTokenizer.from_file(str(start / path.name)) if start else make()).save(str(partial))
        partial.replace(path)
    return TextTokenizer.from_file(str(path))


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has products in bfloat16. Without them, bfloat16 is several times slower than float32 on a CPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("sve_bf16"))


def cools(step: int, steps: int) -> bool:
    """Whether the learning rate falls already."""
    return step >= (1 - COOL_DOWN) * steps


def cooled(step: int, steps: int) -> float:
    """The learning rate as a share of the largest: it rises for 100 steps, is constant, then falls to 3 % by `1 - sqrt`."""
    done = max(0.0, 1 - (1 - step / steps) / COOL_DOWN)
    return min(1.0, (step + 1) / 100) * (1 - 0.97 * math.sqrt(done))


def training_parser(description: str | None, out: Path, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """A parser with the arguments of all trainings and the defaults of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/tiny"), help="gathered pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="checkpoints, curve and plots (default: %(default)s)")
    parser.add_argument("--start", type=_trained, help="where another training wrote the weights to begin with")
    parser.add_argument("--steps", type=int, default=steps, help="of the whole training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="pictures in a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=rate, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores (default: %(default)s)")
    return parser


def _trained(text: str) -> Path:
    if not (Path(text) / BEST).exists():
        raise argparse.ArgumentTypeError(f"{text} has no {BEST}; give the --out of a training that has been evaluated")
    return Path(text)


def transformer_parser(description: str | None, out: Path, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """The parser of trainings whose transformer is compiled."""
    parser = training_parser(description, out, steps, batch, rate)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="slower, but needs no C++ compiler")
    return parser


def run(training: Training, out: Path, start: Path | None = None) -> None:
    """Train to the end, at times evaluate and plot, and keep the best checkpoint.

    It goes on from the checkpoint in `out`. If there is none, it begins with the best weights of another training in `start`.
    """
    out.mkdir(parents=True, exist_ok=True)
    best, before = -float("inf"), 0.0
    if (out / CHECKPOINT).exists():
        state = torch.load(out / CHECKPOINT, map_location=device(), weights_only=True)
        training.load(state)
        torch.set_rng_state(state["rng"].cpu())
        best, before = state["best"], state["seconds"]
    elif start:
        training.begin(best_average(start))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, began = Console(stderr=True), perf_counter()
    saved = began
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=training.steps, completed=training.step)
        while training.step < training.steps:
            losses = training.run_step()
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            progress.update(task, completed=training.step, description=shown)
            evaluated = training.step % EVALUATE_EVERY == 0 or training.step == training.steps
            if not evaluated and perf_counter() - saved < SAVE_EVERY:
                continue
            seconds, improved = before + perf_counter() - began, False
            if evaluated:
                figures = {"step": training.step, "seconds": seconds} | training.evaluate(out) | losses
                console.print(" ".join(f"{key} {value:.4g}" for key, value in figures.items()))
                with (out / CURVE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
                plot(out)
                improved = training.score(figures) > best
                best = max(best, training.score(figures))
            _save(out, training.state() | {"rng": torch.get_rng_state(), "best": best, "seconds": seconds}, improved)
            saved = perf_counter()


def _save(out: Path, state: dict[str, Any], improved: bool) -> None:
    """Write a checkpoint through temporary files, so that it is never half written; the best is kept as a link."""
    partial, link = out / f"{CHECKPOINT}.partial", out / f"{BEST}.partial"
    torch.save(state, partial)
    if improved:
        link.unlink(missing_ok=True)
        os.link(partial, link)
        link.replace(out / BEST)
    partial.replace(out / CHECKPOINT)


def read_curve(out: Path) -> list[dict[str, float]]:
    """The figures of all evaluations by step. A line that a kill cut short is left out."""
    rows: dict[float, dict[str, float]] = {}
    for line in (out / CURVE).read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def plot(out: Path) -> None:
    """Plot every figure of the curve over the steps."""
    from matplotlib.figure import Figure

    curve = read_curve(out)
    names = [name for name in curve[-1] if name != "step"]
    figure = Figure(figsize=(16, 3 * -(-len(names) // 4)), layout="constrained")
    for number, name in enumerate(names, 1):
        axis = figure.add_subplot(-(-len(names) // 4), 4, number)
        rows = [row for row in curve if name in row]
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".")
        axis.set_title(name.replace("_", " "))
    partial = out / f"partial-{PLOT}"
    figure.savefig(partial, dpi=80)
    partial.replace(out / PLOT)
