"""Finds the pictures in and below a folder that are most like one picture in what they show.

    python examples/search.py FOLDER PHOTO --out found.jpg

Each picture becomes one vector, the mean of its semantic features. NumPy compares all of them, or faiss where it is installed.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tokenflow_sdk import Codes, TokenFlowError, Tokenizer
from tokenflow_sdk.pictures.contact_sheet import contact_sheet
from tokenflow_sdk.pictures.images import pictures_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("found.jpg"))
    arguments = parser.parse_args()
    if arguments.out.suffix.lower() not in (".jpg", ".png") or not arguments.out.parent.is_dir():
        parser.error(f"--out {arguments.out} is no .jpg or .png in a folder that exists")
    pictures = pictures_in(arguments.folder, below=True)
    with Tokenizer.from_pretrained(arguments.bundle) as tokenizer:
        codes = {arguments.photo: tokenizer.encode(arguments.photo)}
        codes |= zip(pictures, tokenizer.encode_iter(pictures, errors="yield"), strict=True)
        for path in [path for path, found in codes.items() if not isinstance(found, Codes)]:
            print(f"left out: {codes.pop(path)}")
        vectors = tokenizer.semantic(list(codes.values()), pool="mean")
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        paths, tiles = list(codes), []
        for cosine, i in zip(*nearest(vectors, vectors[:1], min(max(arguments.count, 1) + 1, len(paths))), strict=True):
            print(f"{cosine:.3f}  {paths[i]}")
            tiles.append((Image.fromarray(tokenizer.preprocess(paths[i])), f"{cosine:.3f} {paths[i].name}"))
    contact_sheet(tiles, 3).save(arguments.out)


def nearest(vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the vectors that are nearest to a query [1, W], and their rows."""
    if importlib.util.find_spec("faiss"):
        faiss = importlib.import_module("faiss")
        return tuple(found[0] for found in faiss.knn(query, vectors, count, metric=faiss.METRIC_INNER_PRODUCT))
    cosines = vectors @ query[0]
    return np.sort(cosines)[::-1][:count], np.argsort(-cosines, kind="stable")[:count]


if __name__ == "__main__":
    try:
        main()
    except (TokenFlowError, OSError) as error:
        sys.exit(f"error: {error}")
