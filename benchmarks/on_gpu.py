"""Compares tokenflow-sdk with PyTorch on an NVIDIA GPU in one run: results, time, memory, and the roofline.

    make bench-gpu                                          # installs everything, runs the next three
    python benchmarks/on_gpu.py                             # clipb_256 and a generator, random weights
    python benchmarks/on_gpu.py --variant siglip_384 --graphs encode --parts tokenizer
    python benchmarks/on_gpu.py --sides torch,tensorrt-rtx
    python benchmarks/on_gpu.py --checkpoint tokenflow_clipb_32k_enhanced.pt --bundle bundles/released
    python benchmarks/on_gpu.py --sides torch,tensorrt-rtx --batches 1 --no-compile
    python benchmarks/on_gpu.py --device cpu --batches 1    # without a GPU, to try it out; prints only

Checkpoints and bundles that do not exist are made with random weights, since the time does not depend on the values. The first
run takes long: exporting, building TensorRT engines (which are kept in the user's cache) and torch.compile take minutes each.

Results are checked first. Each side (a way to run the model) encodes and decodes crops of a photo in batches of every size, and
is compared with onnxruntime on the CPU. A side that misses the tolerances of its precision, is not installed or fails is not
timed; its row says why. Then the sides take turns, call by call. Figures are written to benchmarks/results/gpu_CARD.json and
.md; the names of variants other than clipb_256, and of tensorrt-rtx, are added to the file names. The two TensorRTs never share
a process, in which one could change the other's results: tensorrt-rtx is measured where it is named. Everything that can be
measured is written. The exit status is 1 if results are wrong or a part failed.

Do not use the GPU for anything else during a run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console

from benchmarks.gpu.request import CPU_SIDES, GRAPHS, PARTS, RTX, SIDES, VARIANT, GeneratorSizes, Request
from tokenflow_sdk.cli import exit_status
from tokenflow_sdk.errors import ArgumentError, MissingPackageError


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 wrong results or not everything measured, 2 nothing can be measured, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return exit_status.run(lambda: _measure(_parser().parse_args(words), words), interrupted="interrupted; nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try it out (default: %(default)s)")
    what.add_argument("--parts", default=",".join(PARTS), help="tokenizer, generator, or both (default: %(default)s)")
    what.add_argument("--sides", help=f"some of {','.join(SIDES)}; on a CPU of {','.join(CPU_SIDES)} (default: all but {RTX})")
    what.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    what.add_argument("--rounds", type=int, default=50, help="most timed calls of a side (default: %(default)s)")
    what.add_argument("--seconds", type=float, default=30, help="of one comparison, from when on five calls do (default: 30)")
    what.add_argument(
        "--matmul", type=int, default=8192, help="rows of the matrices that show the device's peaks (default: 8192)"
    )
    what.add_argument("--threads", type=int, help="of whatever runs on the CPU (default: every core)")
    what.add_argument("--out", type=Path, help="OUT.json and OUT.md (default: benchmarks/results/gpu_CARD; on a CPU: none)")
    tokenizer = parser.add_argument_group("tokenizers")
    tokenizer.add_argument("--variant", default=VARIANT, help="one or more, with commas (default: %(default)s)")
    tokenizer.add_argument("--checkpoint", type=Path, help="default: checkpoints/VARIANT.pt, random weights if it is not there")
    tokenizer.add_argument("--bundle", type=Path, help="default: bundles/VARIANT, exported if it is not there")
    tokenizer.add_argument("--graphs", default=",".join(GRAPHS), help="default: %(default)s")
    tokenizer.add_argument("--batches", default="1,8,32", help="pictures in a call (default: %(default)s)")
    sizes = GeneratorSizes()
    generator = parser.add_argument_group("text to image")
    generator.add_argument("--generator", type=Path, help="a bundle (default: random weights of the sizes below)")
    generator.add_argument("--generator-checkpoint", type=Path, help="what it was exported from, for PyTorch's side")
    generator.add_argument("--hidden", type=int, default=sizes.hidden, help="width (default: %(default)s)")
    generator.add_argument("--layers", type=int, default=sizes.layers, help="default: %(default)s")
    generator.add_argument("--heads", type=int, default=sizes.heads, help="default: %(default)s")
    generator.add_argument("--mlp", type=int, default=sizes.mlp, help="width of the MLP (default: %(default)s)")
    generator.add_argument("--prompt", type=int, default=64, help="ids in the prompt, BOS included (default: %(default)s)")
    generator.add_argument("--pictures", default="1,8", help="of a request (default: %(default)s)")
    return parser


def _measure(arguments: argparse.Namespace, words: list[str]) -> int:
    request = _request(arguments, shlex.join(["python", "benchmarks/on_gpu.py", *words]))
    try:
        from benchmarks.gpu.run import run
    except ImportError as error:
        raise MissingPackageError(
            f"This benchmark needs a package that is not installed ({error}).",
            "Run `make bench-gpu`, which installs everything into .venv-gpu.",
        ) from error
    problems = run(request)
    for sentence in problems:
        Console(stderr=True, highlight=False).print(f"error: {sentence}", style="bold red", soft_wrap=True, markup=False)
    return 1 if problems else 0


def _request(arguments: argparse.Namespace, command: str) -> Request:
    """Check the options.

    Raises:
        ArgumentError: a value that cannot work.
    """
    a = arguments
    variants, parts = _names("--variant", a.variant), _names("--parts", a.parts, PARTS)
    if len(variants) > 1 and (a.checkpoint or a.bundle):
        raise ArgumentError("--checkpoint and --bundle are of one variant.", f"Give --variant {variants[0]} alone.")
    for option in ("rounds", "seconds", "matmul", "hidden", "layers", "heads", "mlp"):
        if getattr(a, option) <= 0:
            raise ArgumentError(f"--{option} {getattr(a, option)} measures nothing.", "Give more than 0.")
    if a.prompt < 2:
        raise ArgumentError(f"--prompt {a.prompt} leaves no id beside BOS.", "Give at least 2.")
    if a.generator_checkpoint and not a.generator:
        raise ArgumentError("--generator-checkpoint is of a bundle.", "Give that with --generator.")
    known = SIDES if a.device != "cpu" else CPU_SIDES
    sides = tuple(side for side in known if side != RTX) if a.sides is None else _names("--sides", a.sides, known)
    if {"tensorrt", RTX} <= set(sides):
        raise ArgumentError(
            f"--sides {a.sides!r} names both TensorRTs, which may not share a process.", f"Measure {RTX} in a run of its own."
        )
    return Request(
        command=command,
        device=a.device,
        parts=parts,
        sides=tuple(side for side in sides if not (a.no_compile and side == "compile")),
        rounds=a.rounds,
        seconds=a.seconds,
        product_size=a.matmul,
        threads=a.threads,
        out=a.out,
        variants=variants,
        checkpoint=a.checkpoint,
        bundle=a.bundle,
        graphs=_names("--graphs", a.graphs, GRAPHS),
        batches=_numbers("--batches", a.batches),
        generator=a.generator,
        generator_checkpoint=a.generator_checkpoint,
        sizes=GeneratorSizes(a.hidden, a.layers, a.heads, a.mlp),
        prompt=a.prompt,
        pictures=_numbers("--pictures", a.pictures),
    )


def _names(option: str, text: str, known: Sequence[str] | None = None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    wrong = [name for name in names if not name or (known is not None and name not in known)]
    if wrong:
        raise ArgumentError(
            f"{option} {text!r} names {wrong[0]!r}, which is not there to measure.",
            f"Choose from: {','.join(known)}." if known else "Write names with commas and without spaces.",
        )
    return names


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse a list of sizes; ascending, each once."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ArgumentError(f"{option} {text!r} is no list of sizes.", f"Write it as {option} 1,8.")
    return tuple(numbers)


if __name__ == "__main__":
    sys.exit(main())
