"""Measures `Tokenizer.encode_iter` against a plain loop of `encode`, and against decoding and the engine alone.

Photos of three sizes are JPEG files. Four things take turns in one process, and medians of pictures a second are compared:
the loop; `encode_iter`; decoding alone, on all cores; the engine alone, with as many calls at once as `encode_iter` has. The
lower of the last two is the limit of many pictures. What can be reached is less. An engine on the CPU takes the cores that
decode: the sum of both times. In the last rows the engine is beside the CPU, as a GPU is: a stand-in that takes as long as all
cores decode. There the first batch is decoded while the engine has nothing to do, or the last is encoded when all is decoded,
and that weighs more the fewer pictures there are.

    python benchmarks/encode_iter.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.backends.session import Array, Session, SessionOptions, Tensor
from tokenflow_sdk.bundle.schema import GraphEntry

SIZES = {(640, 480): 4, (2000, 1500): 2, (4000, 3000): 1}
"""Width and height of photos, and of how many times `--pictures` each measurement is."""
BATCH = 4
"""Pictures in a call of the engine beside the CPU."""


class EngineBeside(Session):
    """An engine that takes a time for each picture and no core, as a GPU does. All its codes are 0."""

    def __init__(self, entry: GraphEntry, seconds: float, codes: int) -> None:
        super().__init__(entry.inputs, entry.outputs)
        self.seconds, self.codes, self.lock = seconds, codes, threading.Lock()

    @property
    def device(self) -> str:
        return "beside"

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        batch = len(np.asarray(feeds["images"]))
        with self.lock:
            time.sleep(self.seconds * batch)
        return [np.zeros((batch, self.codes), np.int32)]

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--pictures", type=int, default=48, help="in each measurement of the largest photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "encode_iter_cpu")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory, Tokenizer.from_pretrained(arguments.bundle, device="cpu") as tokenizer:
        for size, times in SIZES.items():
            paths = [photo(Path(directory), size)] * (arguments.pictures * times)
            rows.append(measure(tokenizer, paths, arguments.rounds))
            beside = engine_beside(tokenizer, 1 / rows[-1]["decode"])
            rows.append(measure(beside, paths, arguments.rounds))
    rows.sort(key=lambda row: str(row["engine_is"]), reverse=True)
    report = {name: getattr(arguments, name) for name in ("bundle", "pictures", "rounds")} | {"cores": available_cores()}
    report |= machine() | {"rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def photo(directory: Path, size: tuple[int, int]) -> Path:
    path = directory / f"{size[0]}x{size[1]}.jpg"
    if not path.exists():
        Image.open(ROOT / "examples" / "chelsea.jpg").convert("RGB").resize(size).save(path, quality=90)
    return path


def engine_beside(tokenizer: Tokenizer, seconds: float) -> Tokenizer:
    def open_session(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        return EngineBeside(entry, seconds, tokenizer.config.n_codes)

    return Tokenizer(tokenizer.bundle, batch_limit=BATCH, open_session=open_session)


def measure(tokenizer: Tokenizer, paths: list[Path], rounds: int) -> dict[str, Any]:
    """Pictures a second, medians."""
    batch = np.stack([tokenizer.preprocess(paths[0])] * tokenizer.batch_limit)
    calls: dict[str, Callable[[], object]] = {
        "loop": lambda: [tokenizer.encode(path) for path in paths],
        "encode_iter": lambda: list(tokenizer.encode_iter(paths)),
        "decode": lambda: in_threads(tokenizer.preprocess, paths, available_cores()),
        "engine": lambda: in_threads(tokenizer.encode_array, [batch] * (len(paths) // len(batch)), 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: len(paths) / median(values) for name, values in seconds.items()}
    return {"photo": paths[0].stem, "pictures": len(paths), "engine_is": tokenizer.device} | rates


def in_threads(function: Callable[[Any], object], values: Sequence[Any], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, values))


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# `encode_iter` against a plain loop",
        "",
        f"{report['cpu']}, {report['cores']} cores; Python {report['python']}, onnxruntime {report['onnxruntime']}; "
        f"{report['bundle']}, float32. Pictures a second, medians of {report['rounds']} rounds; "
        "`python benchmarks/encode_iter.py`.",
        "",
        "| engine | JPEG | pictures | loop | `encode_iter` | | decoding alone | engine alone | of lower | of reachable |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        ours, decode, engine = row["encode_iter"], row["decode"], row["engine"]
        lower, higher = sorted((decode, engine))
        where, alone = ("on the CPU", 1) if row["engine_is"] == "cpu" else ("beside it", BATCH / row["pictures"])
        seconds = 1 / lower + alone / higher
        lines.append(
            f"| {where} | {row['photo']} | {row['pictures']} | {row['loop']:.1f} | {ours:.1f} "
            f"| {ours / row['loop']:.2f}x | {decode:.1f} | {engine:.1f} | {ours / lower:.0%} | {ours * seconds:.0%} |"
        )
    lines += [
        "",
        "On the CPU, decoding and the engine take the same cores: reachable is the sum of both times. The engine beside it is",
        f"a stand-in: it takes as long as all cores decode, {BATCH} pictures a call, and no core. There one batch is decoded",
        "before the first call, or encoded after the last picture; with thousands of pictures the lower rate is reachable.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
