"""Measures how the preset `turbo` differs from `fast`: in codes, in pictures and in time.

Prompts are drawn with the same seeds. For comparison, the same prompts are drawn with other seeds.

    python benchmarks/turbo.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenflow_sdk import Generator
from tokenflow_sdk.pictures.images import psnr

PROMPTS = ("a red apple", "a cat", "a rocket", "a rose", "a fox", "an octopus", "a sunflower", "a pizza", "an owl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt (default: %(default)s)")
    arguments = parser.parse_args()
    taken: dict[str, list[float]] = {"fast": [], "turbo": []}
    agreement, distances, other_seeds = [], [], []
    with Generator.from_pretrained(arguments.bundle) as generator:
        generator.generate(PROMPTS[0], preset="turbo", seed=0)
        for prompt in PROMPTS:
            before = None
            for seed in range(arguments.seeds):
                drawn = {}
                for preset, seconds in taken.items():
                    began = time.perf_counter()
                    drawn[preset] = generator.generate(prompt, preset=preset, seed=seed)
                    seconds.append(time.perf_counter() - began)
                fast, turbo = drawn["fast"], drawn["turbo"]
                agreement.append(float(np.mean(fast.codes[0].indices == turbo.codes[0].indices)))
                distances.append(psnr(np.asarray(turbo.images[0]), np.asarray(fast.images[0])))
                if before is not None:
                    other_seeds.append(psnr(np.asarray(before), np.asarray(fast.images[0])))
                before = fast.images[0]
    ratio = median(a / b for a, b in zip(taken["fast"], taken["turbo"], strict=True))
    print(f"{len(agreement)} pictures: turbo is {ratio:.2f}x as fast as fast ({median(taken['turbo']):.2f} s)")
    print(f"the same code at {mean(agreement):.0%} of places")
    print(f"{mean(distances):.1f} dB between the pictures, {min(distances):.1f} at least")
    print(f"for comparison, two seeds of a prompt with fast: {mean(other_seeds):.1f} dB")


if __name__ == "__main__":
    main()
