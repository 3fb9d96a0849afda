"""The main job on a fresh machine, with the model that comes with the SDK and without PyTorch. Run by `make demo`.

A photo to codes and back; four pictures from text, scale by scale; then questions about all of them, answered from their codes.
Any other directory with a tokenizer, a generator and an understander works as well:

    python examples/demo.py --bundle release
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

from PIL import Image

from tokenflow_sdk import Codes, Generator, TokenFlowError, Tokenizer, Understander
from tokenflow_sdk.pictures.contact_sheet import contact_sheet

HERE = Path(__file__).resolve().parent
QUESTIONS = ("What is this?", "Which colours does it have?", "What style is it?")
PROMPTS = ("a red apple", "a cat in 3d style", "a penguin", "a sunflower in flat style")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny", help="a directory with all three models (default: tiny)")
    parser.add_argument("--photo", type=Path, default=HERE / "chelsea.jpg", help="the picture to tokenize")
    parser.add_argument("--prompt", action="append", help=f"what to draw, repeatable (default: {', '.join(PROMPTS)})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where results go (default: demo_out)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = perf_counter()
    with Tokenizer.from_pretrained(arguments.bundle) as tokenizer:
        print(f"opened {tokenizer} in {perf_counter() - began:.2f} s")
        codes = {arguments.photo.name: there_and_back(tokenizer, arguments.photo, arguments.out)}
    began = perf_counter()
    with Generator.from_pretrained(arguments.bundle) as generator:
        print(f"\nopened the generator in {perf_counter() - began:.2f} s")
        codes |= draw(generator, arguments.prompt or PROMPTS, arguments.seed, arguments.out)
    began = perf_counter()
    with Understander.from_pretrained(arguments.bundle) as understander:
        print(f"\nopened the understander in {perf_counter() - began:.2f} s; it sees codes alone")
        ask(understander, codes)
    print(f"\nPictures are in {arguments.out}/")


def there_and_back(tokenizer: Tokenizer, photo: Path, out: Path) -> Codes:
    """Encode, save, decode; the picture after every scale goes into side_by_side.png."""
    tokenizer.load("encode", "decode")
    began = perf_counter()
    codes = tokenizer.encode(photo)
    encoded = perf_counter()
    picture = tokenizer.decode(codes)
    print(f"encoded in {(encoded - began) * 1e3:.0f} ms, decoded in {(perf_counter() - encoded) * 1e3:.0f} ms: {codes}")
    for i in range(3):
        print(f"  scale {i + 1}: {codes.scale(i).tolist()}")
    codes.save(out / "photo.tfc")
    assert Codes.load(out / "photo.tfc") == codes
    print(f"  photo.tfc: {(out / 'photo.tfc').stat().st_size:,} bytes ({photo.name}: {photo.stat().st_size:,} bytes)")
    picture.save(out / "reconstruction.png")
    original = Image.fromarray(tokenizer.preprocess(photo))
    captions = [f"{n} scale{'s' * (n > 1)}, {end:,} bytes" for n, end in enumerate(codes.scale_ends, 1)]
    tiles = [(original, "original")]
    tiles += [(tokenizer.decode(codes.truncate(n)), caption) for n, caption in enumerate(captions, 1)]
    contact_sheet(tiles, 5).save(out / "side_by_side.png")
    return codes


def draw(generator: Generator, prompts: list[str] | tuple[str, ...], seed: int, out: Path) -> dict[str, Codes]:
    """Each prompt with the picture after every scale, a row a prompt, into drawn.png. Gives the codes of each picture."""
    tiles, drawn = [], {}
    for prompt in prompts:
        began = perf_counter()
        steps = list(generator.stream(prompt, seed=seed))
        seconds = perf_counter() - began
        print(f"  {prompt}: {len(steps[-1].codes[0])} codes in {seconds:.2f} s")
        drawn[prompt] = steps[-1].codes[0]
        sides = drawn[prompt].patch_nums
        captions = [prompt, *(f"up to {side} x {side}" for side in sides[1:])]
        tiles += [(step.preview()[0].resize((128, 128)), caption) for step, caption in zip(steps, captions, strict=True)]
    contact_sheet(tiles, len(generator.config.patch_nums)).save(out / "drawn.png")
    return drawn


def ask(understander: Understander, pictures: dict[str, Codes]) -> None:
    """Each picture's questions in one chat; the answers of all pictures are printed."""
    for name, codes in pictures.items():
        chat = understander.chat(codes)
        answers = [chat.ask(question, max_tokens=24).text for question in QUESTIONS]
        print(f"  {name}: {' '.join(answers)}")


if __name__ == "__main__":
    try:
        main()
    except (TokenFlowError, OSError) as error:
        sys.exit(f"error: {error}")
