"""Measures the bundled model in the runtime, on pictures and wordings that training never used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch.nn import functional as F

from recipes.tiny.captions import held_out_caption, with_article
from recipes.tiny.concepts import THINGS
from recipes.tiny.data import Pictures, Pixels, to_tensor
from recipes.tiny.questions import KINDS, question
from recipes.tiny.scenes import scenes
from recipes.tiny.subjects import Names
from recipes.tiny.teacher import Teacher
from recipes.tiny.train_tokenizer import thumbnail_psnr
from tokenflow_export.models.tokenizer import TokenFlowTokenizer
from tokenflow_sdk import Generator, Tokenizer, Understander
from tokenflow_sdk.model.sampling import PRESETS
from tokenflow_sdk.pictures.images import psnr

__all__ = ["first_token", "generation", "labels_from_codes", "recognised", "reconstruction", "seconds", "understanding"]

Floats = NDArray[np.float32]
Entry = dict[str, Any]
CPU = torch.device("cpu")
ASKED_TOGETHER = 8


def reconstruction(tokenizer: Tokenizer, pictures: Pictures, icons: int = 120) -> dict[str, Any]:
    """Measure the mean PSNR in dB of held-out pictures, of photographs by number of scales too, and the share of codes used.

    For comparison it gives the PSNR of thumbnails (`thumbnail_psnr`).
    """
    figures: dict[str, Any] = {}
    used: set[int] = set()
    for name, group in pictures.held_out(icons).items():
        by_scale = []
        for picture in track(group, f"reconstructing {name}"):
            codes = tokenizer.codes(tokenizer.encode_array(picture[None])[0])
            used |= set(np.asarray(codes).tolist())
            parts = [codes.truncate(n) for n in range(1, codes.n_scales + 1)] if name == "photos" else [codes]
            by_scale.append([psnr(np.asarray(tokenizer.decode(part)), picture) for part in parts])
        figures[name] = float(np.mean([row[-1] for row in by_scale]))
        figures[f"{name}_count"] = len(group)
        figures[f"{name}_thumbnail"] = float(np.mean([thumbnail_psnr(picture) for picture in group]))
        if name == "photos":
            figures["by_scale"] = np.mean(by_scale, axis=0).tolist()
    return figures | {"codes_used": len(used) / tokenizer.config.codebook_size}


def labels_from_codes(tokenizer: Tokenizer, pictures: Pictures, labels: int = 150) -> dict[str, float]:
    """Measure the share of held-out drawings whose nearest training drawing has the same label.

    Drawings are compared by the cosine similarity of a mean feature: the semantic half of the quantized feature, its pixel
    half, or the semantic features. Chance is `1 / labels`.
    """
    held_out = [entry for entry in pictures.icon_entries if entry["split"] == "heldout" and entry["label"]]
    known = {entry["label"] for entry in pictures.icon_entries if entry["split"] == "train"}
    wanted = sorted({entry["label"] for entry in held_out} & known)[:labels]
    gallery = [entry for entry in pictures.icon_entries if entry["split"] == "train" and entry["label"] in wanted]
    queries = [entry for entry in held_out if entry["label"] in wanted]
    split = tokenizer.config.semantic_dim
    parts: dict[str, list[list[Floats]]] = {"semantic": [[], []], "pixel": [[], []], "decoded": [[], []]}
    for side, entries in enumerate((gallery, queries)):
        for entry in track(entries, "encoding labelled drawings"):
            codes = tokenizer.codes(tokenizer.encode_array(pictures.icons[entry["row"]][None])[0])
            feature = tokenizer.features(codes)
            parts["semantic"][side].append(feature[:, :split].mean(axis=0))
            parts["pixel"][side].append(feature[:, split:].mean(axis=0))
            parts["decoded"][side].append(tokenizer.semantic(codes).mean(axis=0))
    truth = [entry["label"] for entry in queries]
    names = [entry["label"] for entry in gallery]
    figures = {}
    for name, (base, asked) in parts.items():
        nearest = (_unit(np.stack(asked)) @ _unit(np.stack(base)).T).argmax(axis=1)
        figures[name] = float(np.mean([names[i] == label for i, label in zip(nearest, truth, strict=True)]))
    return figures | {"labels": len(wanted), "queries": len(queries)}


def generation(
    generator: Generator, pictures: Pictures, trained: Sequence[Entry], prompts: int = 100
) -> tuple[dict[str, Any], list[tuple[Image.Image, str]]]:
    """Generate pictures, and measure the share whose nearest training picture has the label that was asked for.

    Pictures are compared by the cosine distance of the teacher's mean features. `distance` is the mean distance to the nearest
    training picture, and `training_distance` that of a training picture to the nearest one with another label. `seeds_differ`
    is the mean RMS difference (of 255) between pictures of one prompt and four seeds. `presets` has the share of each preset,
    and `seconds` the median time of a picture with it.

    Returns:
        The figures, and the pictures with their prompts.
    """
    teacher = _calibrated(pictures)
    rng = np.random.default_rng(0)
    gallery = np.stack(
        [_embed(teacher, np.asarray(pictures.icons[entry["row"]])) for entry in track(trained, "training pictures")]
    )
    labels = sorted({entry["label"] for entry in trained})
    asked = [trained[i] for i in rng.permutation(len(trained))[:prompts]]
    texts = [held_out_caption(entry["label"], entry["style"], rng) for entry in asked]
    presets: dict[str, float] = {}
    times: dict[str, float] = {}
    for preset in PRESETS:
        made, taken = [], []
        for number, text in enumerate(track(texts, f"generating with {preset}")):
            began = perf_counter()
            made += generator.generate(text, seed=number, preset=preset).images
            taken.append(perf_counter() - began)
        similarity = np.stack([_embed(teacher, np.asarray(image)) for image in made]) @ gallery.T
        best = similarity.argmax(axis=1)
        presets[preset] = float(np.mean([trained[i]["label"] == entry["label"] for i, entry in zip(best, asked, strict=True)]))
        times[preset] = median(taken)
        if preset == generator.config.preset:
            distance, tiles = 1 - float(similarity.max(axis=1).mean()), list(zip(made, texts, strict=True))
    differences = []
    for label in labels[:: max(1, len(labels) // 10)][:10]:
        images = [np.asarray(image).astype(float) for image in generator.generate(label, n=4, seed=0).images]
        differences += [float(np.sqrt(((a - b) ** 2).mean())) for k, a in enumerate(images) for b in images[k + 1 :]]
    others = gallery @ gallery.T
    others[[[a["label"] == b["label"] for b in trained] for a in trained]] = -1
    figures: dict[str, Any] = {
        "presets": presets,
        "seconds": times,
        "distance": distance,
        "training_distance": float(1 - others.max(axis=1).mean()),
        "seeds_differ": float(np.mean(differences)),
        "labels": len(labels),
        "preset": generator.config.preset,
        "cfg_scale": generator.config.cfg_scale,
    }
    return figures, tiles


def understanding(understander: Understander, pictures: Pictures, names: Names, most: int = 200) -> dict[str, Any]:
    """Ask about held-out pictures, at most `most` questions of each kind, and measure the share of right answers.

    Questions with yes or no are right by their first word, colours by the first one named, others by the whole answer.
    `answers` are 24 of all, with the right ones beside them.
    """
    shown = list(scenes(pictures, names, "heldout", 1, 0.5, 0))
    codes = [understander.tokenizer.encode(scene.picture) for scene in track(shown, "encoding")]
    figures: dict[str, Any] = {"pictures": len(shown), "names": len(names.known)}
    rows: list[dict[str, Any]] = []
    for number, (kind, (_, _, needs_name)) in enumerate(track(KINDS.items(), "asking", total=len(KINDS))):
        rng = np.random.default_rng([11, number])
        able = [i for i, scene in enumerate(shown) if scene.subject.things or not needs_name]
        picks = rng.permutation(able)[:most]
        turns = [question(kind, shown[i].subject, names.known, rng) for i in picks]
        right = []
        for start in range(0, len(turns), ASKED_TOGETHER):
            group = list(zip(picks, turns, strict=True))[start : start + ASKED_TOGETHER]
            answers = understander.answer_batch([(codes[i], turn.question) for i, turn in group], max_tokens=48)
            for (i, turn), answer in zip(group, answers, strict=True):
                right.append(_is_right(kind, answer.text, turn.answer))
                row = {"shown": shown[i].subject.things, "style": shown[i].subject.style, "question": turn.question}
                rows.append(row | {"answer": answer.text, "right_answer": turn.answer, "right": right[-1]})
        figures[kind] = float(np.mean(right))
        figures[f"{kind}_count"] = len(right)
    figures["answers"] = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))[:24]]
    return figures


def recognised(understander: Understander, generator: Generator, names: Names, seeds: int = 2) -> dict[str, Any]:
    """Draw every thing and ask what it is, from the codes alone. Gives the share of right names."""
    right = []
    for label, name in track(THINGS.items(), "drawing"):
        everyday = names.of({"kind": "icon", "split": "train", "label": label})
        for seed in range(seeds):
            drawn = generator.generate(f"a picture of {with_article(name)}", seed=seed)
            answer = understander.answer(drawn.codes[0], "What is this?", max_tokens=24)
            right.append(everyday is not None and answer.text == f"{with_article(everyday)}.".capitalize())
    return {"own_drawings": float(np.mean(right)), "own_drawings_count": len(right)}


def _is_right(kind: str, answer: str, right: str) -> bool:
    if kind in ("present", "coloured", "photograph", "colour"):
        return answer.replace(",", " ").replace(".", " ").split()[:1] == right.replace(",", " ").replace(".", " ").split()[:1]
    return answer == right


def first_token(understander: Understander, picture: Pixels) -> float:
    """Measure the median time to the first token of an answer about codes, in seconds."""
    taken = []
    # An answer about a picture that was asked about before is faster.
    for codes in [understander.tokenizer.encode(np.roll(picture, 16 * i, axis=1)) for i in range(8)]:
        began = perf_counter()
        understander.answer(codes, "What is this?", max_tokens=1)
        taken.append(perf_counter() - began)
    return median(taken[1:])


def seconds(tokenizer: Tokenizer, model: TokenFlowTokenizer, picture: Pixels) -> dict[str, float]:
    """Measure the median time of calls in seconds, with encode and decode in PyTorch for comparison. All take turns."""
    codes = tokenizer.encode_array(picture[None])
    indices = torch.from_numpy(codes).long()
    images = torch.from_numpy(np.array(picture))[None]
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {
            "encode": lambda: tokenizer.encode_array(picture[None]),
            "encode_eager": lambda: model.encode(images),
            "decode": lambda: tokenizer.decode_array(codes),
            "decode_eager": lambda: model.decode(indices),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(8):
            for name, call in calls.items():
                began = perf_counter()
                call()
                taken[name] += [perf_counter() - began] if i else []
    return {name: median(values) for name, values in taken.items()}


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)
    return unit


def _calibrated(pictures: Pictures) -> Teacher:
    teacher = Teacher()
    teacher.calibrate(to_tensor([np.asarray(pictures.icons[row]) for row in pictures.train_icons[:256:4]], CPU))
    return teacher


@torch.inference_mode()
def _embed(teacher: Teacher, picture: Pixels) -> Floats:
    """Average the teacher's features over 4 x 4 regions, and make them one unit vector."""
    cells = teacher(to_tensor([picture], CPU))[0].T.unflatten(1, (16, 16))
    pooled: Floats = F.adaptive_avg_pool2d(cells, 4).flatten().numpy()
    return _unit(pooled)
