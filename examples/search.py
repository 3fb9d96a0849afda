"""Finds the pictures of a folder that are most like one picture in what they show.

    python examples/search.py FOLDER PHOTO --out found.jpg

Each picture becomes one vector, the mean of its semantic features. NumPy compares them exactly, which is quick up to about a
million; where faiss is (`pip install faiss-cpu`), its exact index does, and others of its indexes take more.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.pictures.contact_sheet import contact_sheet
from tokenflow_sdk.pictures.images import pictures_in

try:
    import faiss
except ImportError:
    faiss = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("found.jpg"))
    arguments = parser.parse_args()
    with Tokenizer.from_pretrained(arguments.bundle) as tokenizer:
        pictures = pictures_in(arguments.folder)
        found = list(zip(pictures, tokenizer.encode_iter(pictures, errors="yield"), strict=True))
        print(*(f"left out: {error}\n" for _, error in found if not isinstance(error, Codes)), sep="", end="")
        good = [(arguments.photo, tokenizer.encode(arguments.photo)), *(pair for pair in found if isinstance(pair[1], Codes))]
        paths, codes = zip(*good, strict=True)
        vectors = tokenizer.semantic(codes, pool="mean")
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        tiles = []
        for cosine, i in zip(*nearest(vectors, vectors[:1], min(arguments.count + 1, len(paths))), strict=True):
            print(f"{cosine:.3f}  {paths[i]}")
            tiles.append((Image.fromarray(tokenizer.preprocess(paths[i])), f"{cosine:.3f} {paths[i].name}"))
    contact_sheet(tiles, 3).save(arguments.out)


def nearest(vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the vectors that are nearest to a query [1, W], and their rows."""
    if faiss is not None:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return tuple(found[0] for found in index.search(query, count))
    cosines = vectors @ query[0]
    return np.sort(cosines)[::-1][:count], np.argsort(-cosines, kind="stable")[:count]


if __name__ == "__main__":
    main()
