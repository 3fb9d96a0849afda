"""Train the bundled generator on the codes that the bundled tokenizer gives to captioned pictures.

    python -m recipes.tiny.train_generator --data data/tiny --tokenizer models/tiny --out data/tiny/generator

Resumes from the checkpoint in --out. Losses on wordings that training never uses are written to curve.jsonl there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from tokenizers import Tokenizer as PromptTokenizer
from torch import Tensor
from torch.nn import functional as F

from recipes.tiny.captions import caption, held_out_caption
from recipes.tiny.codes import codebook, encoded
from recipes.tiny.concepts import THINGS, drawn
from recipes.tiny.config import TINY
from recipes.tiny.data import Pictures
from recipes.tiny.generator_model import GeneratorModel
from recipes.tiny.loop import (
    AveragedTraining,
    best_average,
    cooled,
    device,
    has_bfloat16,
    kept_text_tokenizer,
    run,
    transformer_parser,
)
from recipes.tiny.optimizers import transformer_optimizers
from recipes.tiny.prompts import BOS, FIRST_WORD, NEGATIVE_PROMPT, text_size, train_prompt_tokenizer
from tokenflow_sdk import Tokenizer

__all__ = ["GeneratorTraining", "load_generator", "main"]

PROMPTS = "tokenizer.json"

WITHOUT_PROMPT = 0.1
"""Share of captions that are replaced by `NEGATIVE_PROMPT`."""
RANDOM_TOKENS, MAX_RANDOM_TOKENS = 0.65, 8
"""Share of prompts that get random tokens, mostly in front, and how many at most: unknown words should be ignored."""
FEW_SCALES, ALL_SCALES = 0.2, 0.5
"""Shares of steps over two or three scales, in which the prompt decides about the picture, and over all scales. The others
have a random number in between.
"""
MAX_BATCH_FACTOR = 8
"""Batches of short sequences are at most this many times larger."""
CORRUPTED = 0.4
"""Share of pictures whose coarser codes are partly wrong, so that the model relies on the prompt."""
MIN_SCALE_WEIGHT = 3
"""Least weight of a scale in the loss; otherwise the weight is its side."""
RESAMPLED = 0.5
"""Share of steps whose last scale has the inputs of a refinement pass."""
OWN_SAMPLES = 0.6
"""The share of these whose codes are sampled by the model itself; the others have random wrong codes."""


def load_generator(directory: Path, rows: Tensor) -> tuple[GeneratorModel, PromptTokenizer]:
    """Load the averaged generator of a training's best checkpoint for a codebook [K, C], and its prompt tokenizer."""
    prompts = PromptTokenizer.from_file(str(directory / PROMPTS))
    model = GeneratorModel(text_size(prompts), rows)
    model.load_state_dict(best_average(directory))
    return model.eval().requires_grad_(False), prompts


class GeneratorTraining(AveragedTraining[GeneratorModel]):
    """The training of the generator: model, average, optimizer and step, which a checkpoint keeps, and the data."""

    def __init__(
        self,
        pictures: Pictures,
        tokenizer: Tokenizer,
        prompts: PromptTokenizer,
        rows: Tensor,
        steps: int,
        batch: int,
        rate: float,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.device = rows.device
        self.half = has_bfloat16(self.device)
        self.steps, self.batch, self.rate, self.seed = steps, batch, rate, seed
        self.entries = drawn(pictures.icon_entries)
        # They are not mirrored, to keep the task small.
        drawings = (np.asarray(pictures.icons[entry["row"]]) for entry in track(self.entries, "encoding"))
        self.codes = encoded(drawings, tokenizer).long().to(self.device)
        self.prompts = prompts
        model = GeneratorModel(text_size(prompts), rows).to(self.device)
        others = (part for name, part in model.named_children() if name != "transformer")
        super().__init__(model, transformer_optimizers(model.transformer, others, rate), decay=0.998)

    def ids(self, text: str) -> list[int]:
        return [BOS, *self.prompts.encode(text, add_special_tokens=False).ids]

    def _prompt(self, entry: dict[str, Any], rng: np.random.Generator) -> list[int]:
        """The token ids of a random caption of a picture, with or without random tokens in it; or of no caption."""
        if rng.random() < WITHOUT_PROMPT:
            return self.ids(NEGATIVE_PROMPT)
        ids = self.ids(caption(entry["label"], entry["style"], rng))
        if rng.random() < RANDOM_TOKENS:
            for _ in range(int(rng.integers(1, MAX_RANDOM_TOKENS + 1))):
                place = int(rng.integers(1, 3 if rng.random() < 0.85 else len(ids) + 1))
                ids.insert(place, int(rng.integers(FIRST_WORD, self.model.text.num_embeddings - 1)))
        return ids

    def run_step(self) -> dict[str, float]:
        """Run one optimizer step, and return the loss."""
        rng = np.random.default_rng([self.seed, self.step])
        sides = TINY.patch_nums
        kind = rng.random()
        whole = kind >= 1 - ALL_SCALES
        scales = int(rng.integers(2, 4)) if kind < FEW_SCALES else len(sides) if whole else int(rng.integers(4, len(sides)))
        size = self.batch * min(MAX_BATCH_FACTOR, TINY.n_codes // sum(side * side for side in sides[:scales]))
        picks = rng.integers(len(self.entries), size=size)
        prompts = [self._prompt(self.entries[i], rng) for i in picks]
        codes = self.codes[torch.from_numpy(picks)]
        seen = torch.stack([self._corrupted(row, scales, rng) if rng.random() < CORRUPTED else row for row in codes])
        resampled = self._resampled(prompts, codes, scales, rng) if rng.random() < RESAMPLED else None
        loss = self._loss(self.model, prompts, seen, codes, scales, resampled)
        self.descend(loss, self.rate * cooled(self.step, self.steps))
        return {"loss": float(loss.detach())}

    def _corrupted(self, codes: Tensor, scales: int, rng: np.random.Generator) -> Tensor:
        """Replace about half of the scales of codes [L], except the last, by another picture's or by partly wrong ones."""
        codes, start = codes.clone(), 0
        for side in TINY.patch_nums[: scales - 1]:
            own = slice(start, start := start + side * side)
            kind = rng.random()
            if kind < 0.25:
                codes[own] = self.codes[int(rng.integers(len(self.codes))), own]
            elif kind < 0.5:
                wrong = torch.from_numpy(rng.integers(TINY.codebook_size, size=side * side)).to(codes)
                places = torch.from_numpy(rng.random(side * side) < rng.uniform(0.0, 0.6)).to(codes.device)
                codes[own] = torch.where(places, wrong, codes[own])
        return codes

    @torch.no_grad()
    def _resampled(self, prompts: Sequence[Sequence[int]], codes: Tensor, scales: int, rng: np.random.Generator) -> Tensor:
        """The codes of the last scale as the model samples them in a first pass, or with a random share of wrong ones."""
        side, start = TINY.patch_nums[scales - 1], sum(s * s for s in TINY.patch_nums[: scales - 1])
        right = codes[:, start : start + side * side]
        if rng.random() < OWN_SAMPLES:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                logits = self.model(prompts, codes, scales, None)[:, start:].float()
            uniform = torch.from_numpy(rng.random(tuple(logits.shape), dtype=np.float32)).to(logits)
            sampled: Tensor = (logits - uniform.clamp_min(1e-9).log().neg().log()).argmax(dim=-1)
            return sampled
        wrong = torch.from_numpy(rng.integers(TINY.codebook_size, size=tuple(right.shape))).to(right)
        places = torch.from_numpy(rng.random(tuple(right.shape)) < rng.uniform(0.0, 0.9)).to(right.device)
        return torch.where(places, wrong, right)

    def _loss(
        self,
        model: GeneratorModel,
        prompts: Sequence[Sequence[int]],
        seen: Tensor,
        codes: Tensor,
        scales: int,
        resampled: Tensor | None,
    ) -> Tensor:
        """The cross entropy of `codes` given `seen`. Scales are weighted by their sides, not by their number of codes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = model(prompts, seen, scales, resampled).float()
        sides = TINY.patch_nums[:scales]
        counts = [side * side for side in sides]
        weights = [max(side, MIN_SCALE_WEIGHT) for side in sides]
        # One row a code: over the middle axis it takes several times as long on a CPU.
        losses = F.cross_entropy(logits.flatten(0, 1), codes[:, : sum(counts)].flatten(), reduction="none")
        each = [torch.full((count,), weight / count) for weight, count in zip(weights, counts, strict=True)]
        return (losses.view(len(codes), -1) * torch.cat(each).to(losses)).sum(dim=1).mean() / sum(weights)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the weights of another training, but with this tokenizer's codebook."""
        super().begin({**weights, "codebook": self.model.codebook})

    @torch.no_grad()
    def evaluate(self, out: Path) -> dict[str, float]:
        """The loss over 64 training pictures with captions in wordings that training never uses, for 5 scales and for all."""
        rng, model = np.random.default_rng(0), self.average
        figures = {}
        picks = rng.permutation(len(self.entries))[:64]
        for scales in (5, len(TINY.patch_nums)):
            found = []
            for i in picks:
                entry = self.entries[i]
                ids = self.ids(held_out_caption(entry["label"], entry["style"], rng))
                codes = self.codes[i : i + 1]
                found.append(float(self._loss(model, [ids], codes, codes, scales, None)))
            figures[f"loss_{scales}_scales"] = float(np.mean(found))
        return figures

    def score(self, figures: dict[str, float]) -> float:
        return -figures[f"loss_{len(TINY.patch_nums)}_scales"]


def main(argv: list[str] | None = None) -> int:
    parser = transformer_parser(__doc__, out=Path("data/tiny/generator"), steps=20000, batch=16, rate=1.5e-3)
    parser.add_argument("--tokenizer", type=Path, default=Path("models/tiny"), help="its bundle (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    pictures = Pictures(arguments.data)
    rows = codebook(arguments.tokenizer).to(device())
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = kept_text_tokenizer(
        arguments.out / PROMPTS, lambda: train_prompt_tokenizer(sorted(THINGS.values()), TINY.codebook_size), arguments.start
    )
    with Tokenizer.from_pretrained(arguments.tokenizer) as tokenizer:
        training = GeneratorTraining(
            pictures, tokenizer, prompts, rows, arguments.steps, arguments.batch, arguments.rate, arguments.seed
        )
    if arguments.compile:
        training.model.transformer.compile(dynamic=True)
    run(training, arguments.out, arguments.start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
