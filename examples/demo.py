"""The main job on a fresh machine: checkpoint -> bundle -> codes -> picture. Run by `make demo`.

No trained weights are in the repository, so this draws full-size stand-in weights for the released 256 px tokenizer
(377 M parameters). Every step, shape and timing is the real one; the decoded picture is what random weights make of it.
Give a released checkpoint to see a real reconstruction:

    python examples/demo.py --checkpoint tokenflow_clipb_32k_enhanced.pt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    print("\n$ python -m", *arguments, flush=True)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a released tokenizer checkpoint (default: stand-in weights)")
    parser.add_argument("--bundle", type=Path, help="where the bundle goes (default: bundles/clipb_256, or bundles/released)")
    parser.add_argument("--photo", type=Path, default=ROOT / "examples" / "chelsea.jpg", help="the picture to tokenize")
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out", help="where results go (default: demo_out)")
    arguments = parser.parse_args()
    bundle = arguments.bundle or ROOT / "bundles" / ("released" if arguments.checkpoint else "clipb_256")
    if not (bundle / "bundle.json").exists():
        checkpoint = arguments.checkpoint or ROOT / "checkpoints" / "clipb_256.pt"
        if not arguments.checkpoint and not Path(checkpoint).exists():
            run("export", "standin", "--variant", "clipb_256", "--out", checkpoint)
        run("export", "tokenizer", "--checkpoint", checkpoint, "--out", bundle)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run("tokenflow_sdk.cli", "reconstruct", arguments.photo, "--bundle", bundle, "-o", arguments.out / "side_by_side.png")
    tour(bundle, arguments.photo, arguments.out)
    if not arguments.checkpoint:
        print("\nThese are stand-in weights: the decoded picture is noise by nature. --checkpoint takes a released file.")


def tour(bundle: Path, photo: Path, out: Path) -> None:
    """The same through the Python API, with the time of each call."""
    from tokenflow_sdk import Codes, Tokenizer

    print("\nin Python:")
    began = perf_counter()
    tokenizer = Tokenizer.from_pretrained(bundle).load("encode", "decode")
    print(f"  open and load          {perf_counter() - began:6.2f} s   {tokenizer}")
    with tokenizer:
        for attempt in ("first", "again"):
            began = perf_counter()
            codes = tokenizer.encode(photo)
            encoded = perf_counter()
            picture = tokenizer.decode(codes)
            print(f"  encode, decode ({attempt})  {encoded - began:6.2f} s {perf_counter() - encoded:6.2f} s")
        codes.save(out / "photo.tfc")
        assert Codes.load(out / "photo.tfc") == codes
        picture.save(out / "reconstruction.png")
    print(f"  {codes}")
    for i in range(3):
        print(f"  scale {i + 1}: {codes.scale(i).tolist()}")
    print(f"  {out / 'photo.tfc'}: {(out / 'photo.tfc').stat().st_size:,} bytes ({photo.name}: {photo.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
