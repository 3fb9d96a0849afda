"""The generator of the recipe: its training resumes, and its loss weighs scales by their sides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.tiny.codes import codebook
from recipes.tiny.concepts import DRAWN_STYLES
from recipes.tiny.config import TINY
from recipes.tiny.optimizers import Optimizers
from recipes.tiny.prompts import train_prompt_tokenizer
from recipes.tiny.train_generator import MIN_SCALE_WEIGHT, GeneratorTraining
from tests.conftest import ROOT
from tokenflow_sdk import Tokenizer

PROMPTS = train_prompt_tokenizer(["red apple", "cat"], TINY.codebook_size)


@pytest.fixture(scope="module")
def pictures() -> Any:
    """Three drawings that are learned, and one that is not."""
    labels = [("red apple", "noto"), ("red apple", "3d"), ("cat face", "flat"), ("passport control", "noto")]
    entries = [
        {"kind": "icon", "split": "train", "label": label, "style": style, "row": row}
        for row, (label, style) in enumerate(labels)
    ]
    icons = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    return SimpleNamespace(icon_entries=entries, icons=icons)


@pytest.fixture(scope="module")
def make(pictures: Any) -> Any:
    rows = codebook(ROOT / "models" / "tiny")
    with Tokenizer.from_pretrained("tiny", threads=1) as tokenizer:
        yield lambda: GeneratorTraining(pictures, tokenizer, PROMPTS, rows, 10, 1, 1e-3, 3)


def test_a_resumed_generator_training_repeats_the_steps(make: Any, tmp_path: Path) -> None:
    first = make()
    assert [(entry["label"], entry["style"]) for entry in first.entries] == [
        ("red apple", "noto"), ("red apple", "3d"), ("cat", "flat")
    ]  # fmt: skip
    assert {entry["style"] for entry in first.entries} <= set(DRAWN_STYLES)
    first.run_step()
    torch.save(first.state(), tmp_path / "state")
    expected = first.run_step()
    again = make()
    again.load(torch.load(tmp_path / "state", weights_only=True))
    assert again.run_step() == expected
    assert again.evaluate(tmp_path) == first.evaluate(tmp_path)


def test_a_training_that_begins_with_weights_keeps_its_codebook(make: Any) -> None:
    first, again = make(), make()
    first.run_step()
    kept = again.model.codebook.clone()
    again.begin({**first.model.state_dict(), "codebook": torch.zeros_like(kept)})
    for model in (again.model, again.average):
        assert torch.equal(model.codebook, kept)
        assert torch.equal(model.head.weight, first.model.head.weight)


def test_muon_has_the_matrices_of_the_transformer_and_each_weight_has_one_optimizer(make: Any) -> None:
    training = make()
    assert isinstance(training.optimizer, Optimizers)
    muon, adamw = ({id(p) for group in part.param_groups for p in group["params"]} for part in training.optimizer.parts)
    assert muon == {id(p) for p in training.model.transformer.parameters() if p.ndim == 2}
    assert adamw == {id(p) for p in training.model.parameters()} - muon


def test_scales_are_weighed_by_their_sides(make: Any) -> None:
    training = make()
    codes = training.codes[:2]
    found = training._loss(training.model, [[1, 5], [1, 5, 6]], codes, codes, 4, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=training.half), torch.no_grad():
        logits: Tensor = training.model([[1, 5], [1, 5, 6]], codes, 4, None).float()
    start, total, weights = 0, 0.0, 0
    for side in TINY.patch_nums[:4]:
        own, weight = slice(start, start := start + side * side), max(side, MIN_SCALE_WEIGHT)
        total += weight * float(F.cross_entropy(logits[:, own].flatten(0, 1), codes[:, own].flatten()))
        weights += weight
    assert float(found.detach()) == pytest.approx(total / weights, rel=1e-4)
