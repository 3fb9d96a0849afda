"""Groups the pictures in and below a folder that are copies of one another: compressed again, resized, cut a little.

    python examples/near_duplicates.py FOLDER

Copies share most codes of the coarsest scales, and other pictures hardly any. Only `.tfc` files are needed once they are made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from tokenflow_sdk import Codes, TokenFlowError, Tokenizer
from tokenflow_sdk.pictures.images import pictures_in

SCALES = 3  # 1 + 4 + 16 codes
ALIKE = 0.5  # of them must be equal; unlike pictures share about 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bundle", default="tiny")
    arguments = parser.parse_args()
    paths, rows = list[Path](), list[np.ndarray]()
    pictures = pictures_in(arguments.folder, below=True)
    with Tokenizer.from_pretrained(arguments.bundle) as tokenizer:
        for path, codes in zip(pictures, tokenizer.encode_iter(pictures, errors="yield"), strict=True):
            if isinstance(codes, Codes):
                paths.append(path)
                rows.append(codes.truncate(SCALES).indices)
            else:
                print(f"left out: {codes}")
    found = groups(np.array(rows))
    for group in found:
        print("  ".join(str(paths[i]) for i in group))
    print(f"pictures: {len(paths)}, groups of copies: {len(found)}")


def groups(rows: np.ndarray) -> list[list[int]]:
    """Rows of codes [B, l] -> for each first picture, itself and the copies of it that come later."""
    found, taken = [], np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        alike = np.flatnonzero(((rows[i:] == row).mean(axis=1) >= ALIKE) & ~taken[i:]) + i
        if not taken[i] and len(alike) > 1:
            found.append(alike.tolist())
            taken[alike] = True
    return found


if __name__ == "__main__":
    try:
        main()
    except TokenFlowError as error:
        sys.exit(f"error: {error}")
