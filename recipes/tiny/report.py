"""Measure the bundled model and write its model card.

python -m recipes.tiny.report --data data/tiny --out models/tiny
python -m recipes.tiny.report --data data/tiny --out models/tiny --language-models
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from recipes.tiny.card import card, with_language_models
from recipes.tiny.concepts import drawn
from recipes.tiny.data import Pictures
from recipes.tiny.export import KINDS
from recipes.tiny.loop import CURVE, read_curve
from recipes.tiny.measure import first_token, generation, labels_from_codes, recognised, reconstruction, seconds, understanding
from recipes.tiny.scenes import names_of
from recipes.tiny.subjects import Names
from recipes.tiny.train_tokenizer import load_tokenizer
from tokenflow_sdk import Generator, Tokenizer, Understander
from tokenflow_sdk.pictures.contact_sheet import contact_sheet

__all__ = ["main"]

matplotlib.use("Agg")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/tiny"))
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="packages as fetched (default: %(default)s)")
    parser.add_argument(
        "--training", type=Path, default=Path("data/tiny"), help="where the models were trained, each in a folder of its name"
    )
    parser.add_argument("--out", type=Path, default=Path("models/tiny"), help="the bundles, and where the card goes")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="where the card's pictures go")
    parser.add_argument("--history", type=Path, help="how these weights were trained, where the curves do not tell all of it")
    parser.add_argument(
        "--language-models",
        action="store_true",
        help="measure only these, and leave data, history and the tokenizer's figures in the card as they are",
    )
    arguments = parser.parse_args(argv)
    pictures = Pictures(arguments.data)
    trained = drawn(pictures.icon_entries)
    out: Path = arguments.out
    names = names_of(pictures, arguments.cache)
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8")) if arguments.language_models else {"curves": {}}
    if not arguments.language_models:
        model = load_tokenizer(arguments.training / "tokenizer")
        with Tokenizer.from_pretrained(out) as tokenizer:
            figures["reconstruction"] = reconstruction(tokenizer, pictures)
            figures["labels"] = labels_from_codes(tokenizer, pictures)
            figures["seconds"] = seconds(tokenizer, model, pictures.test_photos[0])
            _reconstruction_grid(tokenizer, pictures).save(arguments.images / "tiny_reconstructions.jpg", quality=88)
    with Generator.from_pretrained(out) as generator, Understander.from_pretrained(out) as understander:
        figures["generation"], tiles = generation(generator, pictures, trained)
        figures["understanding"] = _understanding(understander, generator, pictures, names)
    _generated_sheet(tiles[:48]).save(arguments.images / "tiny_generated.jpg", quality=88)
    curves = {name: arguments.training / name for name in (KINDS[1:] if arguments.language_models else KINDS)}
    figures["curves"] |= {name: read_curve(path) for name, path in curves.items() if (path / CURVE).exists()}
    _plot(figures["curves"], figures["reconstruction"]["by_scale"], arguments.images / "tiny_curves.png")
    _write_figures(figures, out)
    if arguments.language_models:
        path = out / "README.md"
        path.write_text(with_language_models(path.read_text(encoding="utf-8"), figures), encoding="utf-8")
        return 0
    shutil.copyfile(arguments.data / "ATTRIBUTION.md", out / "ATTRIBUTION.md")
    history = arguments.history.read_text(encoding="utf-8") if arguments.history else _history(arguments.training)
    (out / "README.md").write_text(card(figures, pictures, trained, history.strip()), encoding="utf-8")
    return 0


def _understanding(understander: Understander, generator: Generator, pictures: Pictures, names: Names) -> dict[str, Any]:
    figures = understanding(understander, pictures, names) | recognised(understander, generator, names)
    return figures | {"first_token": first_token(understander, pictures.test_photos[0])}


def _write_figures(figures: dict[str, Any], out: Path) -> None:
    figures["bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    text = json.dumps(figures, indent=2)
    (out / "figures.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def _reconstruction_grid(tokenizer: Tokenizer, pictures: Pictures) -> Image.Image:
    """Show 24 held-out pictures, 14 photographs and 10 drawings, each above its reconstruction."""
    photos = pictures.test_photos[:: max(1, len(pictures.test_photos) // 14)][:14]
    chosen = photos + [np.asarray(pictures.icons[row]) for row in pictures.test_icons[::35]][: 24 - len(photos)]
    rows: list[tuple[Image.Image, str]] = []
    for start in range(0, len(chosen), 8):
        group = chosen[start : start + 8]
        rows += [(Image.fromarray(picture).resize((160, 160)), "original") for picture in group]
        decoded = [tokenizer.decode_array(tokenizer.encode_array(picture[None]))[0] for picture in group]
        rows += [(Image.fromarray(picture).resize((160, 160)), "decoded") for picture in decoded]
    return contact_sheet(rows, 8)


def _generated_sheet(tiles: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    def wrapped(prompt: str) -> str:
        words, lines = prompt.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 20:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        return "\n".join(lines[:4])

    return contact_sheet([(image.resize((144, 144)), wrapped(prompt)) for image, prompt in tiles], 8)


def _plot(curves: Mapping[str, Sequence[Mapping[str, float]]], by_scale: Sequence[float], path: Path) -> None:
    """Plot the training curves, and the PSNR by number of scales."""
    from matplotlib import pyplot

    kept = [
        (curves[name], title, wanted)
        for name, title, wanted in (
            ("tokenizer", "tokenizer, held-out PSNR (dB)", ("photos", "icons")),
            ("generator", "generator, cross entropy", ("loss_5_scales", "loss_9_scales")),
            ("understander", "understander, right answers", ("right_what", "right_colour", "right_style", "right_present")),
        )
        if name in curves
    ]
    count = len(kept) + 1
    figure, axes = pyplot.subplots(1, count, figsize=(4 * count, 3.2), layout="constrained", squeeze=False)
    for axis, (curve, title, wanted) in zip(axes[0], kept, strict=False):
        for name in wanted:
            axis.plot([row["step"] for row in curve], [row[name] for row in curve], label=name.replace("_", " "))
        axis.set(title=title, xlabel="step")
        axis.legend()
    axes[0][-1].plot(range(1, len(by_scale) + 1), by_scale, marker="o")
    axes[0][-1].set(title="held-out photos by scales", xlabel="scales decoded", ylabel="dB")
    figure.savefig(path, dpi=110)


def _history(training: Path) -> str:
    steps = {name: int(read_curve(training / name)[-1]["step"]) for name in KINDS}
    return "Steps of training: " + ", ".join(f"the {name} {count:,}" for name, count in steps.items()) + "."


if __name__ == "__main__":
    raise SystemExit(main())
