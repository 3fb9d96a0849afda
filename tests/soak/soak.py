"""Threads ask everything at once, cancel, close, feed garbage and collect it; nothing may be left of it: `make soak`."""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.conftest import ROOT
from tests.test_loaded_model import free
from tokenflow_sdk import Codes, Generator, TokenFlowError, Tokenizer, Understander

PHOTO = ROOT / "examples" / "chelsea.jpg"
WARM_UP = 0.4
"""Share of the time after which everything rests, and memory is measured for the first time."""
GROWTH = 64 * 2**20
"""Bytes by which memory may grow afterwards: allocators keep some, and more where threads met by chance."""


@dataclass
class Soak:
    """Models under load.

    Args:
        generator, understander: bundles, or names of some.
        seed: of what each thread does.
    """

    generator: Path | str
    understander: Path | str
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"device": "cpu", "threads": 1}
        self.models = [
            Generator.from_pretrained(self.generator, pages=400, **options),
            Understander.from_pretrained(self.understander, pages=200, page_size=4, **options),
        ]
        self.tokenizer: Tokenizer = self.models[0].tokenizer
        self.codes: Codes = self.tokenizer.encode(PHOTO)
        self.picture = self.tokenizer.decode(self.codes).tobytes()
        self.drawn = self.models[0].generate("w1", seed=1, preset="fast").codes
        self.stop = threading.Event()

    def actions(self, rng: random.Random) -> list[Callable[[], object]]:
        drawing, asking = self.models
        features = np.random.default_rng(rng.randrange(99)).standard_normal((16, 40)).astype(np.float32)
        preset, seed = rng.choice(["fast", "balanced"]), rng.randrange(9)

        def encode() -> None:
            assert self.tokenizer.encode(PHOTO) == self.codes

        def decode() -> None:
            assert self.tokenizer.decode(self.codes).tobytes() == self.picture

        def generate() -> None:
            assert drawing.generate("w1", seed=1, preset="fast").codes == self.drawn

        def cancel() -> None:
            _some(drawing.stream(f"w{rng.randrange(30)} w2", seed=seed, preset=preset, n=rng.randrange(1, 3)), rng.randrange(4))

        def abandon() -> None:
            """An unclosed stream in a cycle, which only the collector finds."""
            cycle: list[Any] = [drawing.stream("w3", seed=seed, preset=preset)]
            next(cycle[0])
            cycle.append(cycle)

        def ask() -> None:
            asking.answer(features, "what is this?", max_tokens=rng.randrange(1, 9), temperature=1.0)

        def cancel_answer() -> None:
            _some(asking.stream(features, "who?" * rng.randrange(1, 20), max_tokens=20), rng.randrange(5))

        def chat() -> None:
            talk = asking.chat(features)
            for question in ("what?", "why?"):
                talk.ask(question, max_tokens=3)

        def garbage() -> None:
            damaged = bytearray(PHOTO.read_bytes()[: rng.randrange(1, 20_000)])
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            for wrong in (
                lambda: self.tokenizer.encode(damaged),
                lambda: Codes.from_bytes(rng.randbytes(rng.randrange(200))),
                lambda: drawing.generate(rng.choice(["", "w1 " * 5000, "\udcff", [10**9]]), strict=True),
                lambda: asking.answer(features * np.nan, "what?"),
                lambda: asking.answer(features, "why?" * 10_000),
            ):
                try:
                    wrong()
                except TokenFlowError:
                    continue

        def close_while_working() -> None:
            model = Generator.from_pretrained(self.generator, tokenizer=self.tokenizer, device="cpu", threads=1, pages=400)
            stream = model.stream("w4", seed=seed, preset=preset)
            next(stream)
            model.close()
            try:
                list(stream)
            except TokenFlowError:
                return

        return [encode, decode, generate, cancel, abandon, ask, cancel_answer, chat, garbage, close_while_working, gc.collect]

    def work(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self.stop.is_set():
            action = rng.choice(self.actions(rng))
            try:
                action()
            except Exception as error:
                self.problems.append(f"{getattr(action, '__name__', action)}: {type(error).__name__}: {error}")
                self.stop.set()
            self.done[getattr(action, "__name__", "")] += 1

    def run(self, seconds: float, workers: int) -> None:
        """Work for so long; `problems` holds what was not as it must be."""
        process, sizes = psutil.Process(), []
        for part in (seconds * WARM_UP, seconds * (1 - WARM_UP)):
            self.stop.clear()
            threads = [threading.Thread(target=self.work, args=(number,), name=f"soak-{number}") for number in range(workers)]
            for thread in threads:
                thread.start()
            self.stop.wait(part)
            self.stop.set()
            for thread in threads:
                thread.join(120)
            gc.collect()
            sizes.append(process.memory_info().rss)
            self.problems += [f"{thread.name} does not end" for thread in threads if thread.is_alive()]
            self.problems += [f"pages of {type(model).__name__} are lost" for model in self.models if not free(model)]
            if self.problems:
                break
        if sizes[-1] - sizes[0] > GROWTH:
            self.problems.append(f"memory grew from {sizes[0] / 2**20:.0f} to {sizes[-1] / 2**20:.0f} MiB")
        self.memory = tuple(size / 2**20 for size in sizes)
        for model in self.models:
            model.close()
            model.tokenizer.close()


def _some(stream: Iterator[object], count: int) -> None:
    for _ in range(count):
        next(stream, None)
    stream.close()  # type: ignore[attr-defined]


def soak(generator: Path | str, understander: Path | str, seconds: float, seed: int, workers: int = 6) -> Soak:
    """Run a soak, and look for threads and processes that it left behind as well."""
    before, children = set(threading.enumerate()), psutil.Process().children()
    found = Soak(generator, understander, seed)
    found.run(seconds, workers)
    deadline = time.monotonic() + 30
    # The thread that steps ends by itself when nobody has waited for it for a while.
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    found.problems += [f"thread {thread.name} is left" for thread in left]
    found.problems += [f"process {child} is left" for child in psutil.Process().children() if child not in children]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    found = soak("tiny", "tiny", arguments.seconds, arguments.seed)
    print(f"seed {arguments.seed}:", ", ".join(f"{count} {name}" for name, count in sorted(found.done.items())))
    print("memory after warm-up and at the end:", " and ".join(f"{size:.0f} MiB" for size in found.memory))
    for problem in found.problems:
        print(f"error: {problem}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
