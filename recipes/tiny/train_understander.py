"""Train the bundled understander on the codes that the bundled tokenizer gives to labelled pictures.

    python -m recipes.tiny.train_understander --data data/tiny --models models/tiny --out data/tiny/understander

It also learns to name what the bundled generator draws, so both are exported before. Resumes from the checkpoint in --out.
Shares of right answers about held-out pictures are written to curve.jsonl there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.tiny.captions import STYLES, with_article
from recipes.tiny.codes import codebook, encoded, quantizer
from recipes.tiny.colours import colours
from recipes.tiny.concepts import DRAWN_STYLES, THINGS
from recipes.tiny.data import Pictures, Pixels
from recipes.tiny.guesses import groups, guess_loss, labels
from recipes.tiny.loop import (
    AveragedTraining,
    best_average,
    cooled,
    cools,
    device,
    has_bfloat16,
    kept_text_tokenizer,
    run,
    transformer_parser,
)
from recipes.tiny.optimizers import transformer_optimizers
from recipes.tiny.questions import KINDS, checks, conversation, question
from recipes.tiny.scenes import Scene, names_of, scenes
from recipes.tiny.subjects import Names, Subject
from recipes.tiny.understander_model import (
    SIZES,
    Conversation,
    UnderstanderModel,
    apart,
    check,
    filled,
    tokenized,
    train_text_tokenizer,
)
from tokenflow_sdk import Generator, Tokenizer

__all__ = ["TEXT_TOKENIZER", "Encoded", "UnderstanderTraining", "load_understander", "main"]

TEXT_TOKENIZER, SCENES, DRAWN = "tokenizer.json", "scenes.pt", "drawn.pt"
VARIANTS, SEVERAL = 12, 0.5
"""Variants of a training picture at most, and pictures of several drawings for each drawing that can be counted."""
DRAWINGS, FIRST_SEED = 5, 1000
"""Pictures that the generator draws of each thing in each style, and their seed, which is none of those that are measured."""
TURNS = 8
"""Most questions about a picture in a step, beside some fifteen checks (`recipes.tiny.questions.checks`).

Comparing what is asked for with what is seen is learned only from so many questions with yes or no: from those of conversations
alone it was still a guess after 6,000 steps.
"""
CHATS = 0.25
"""The share of steps in which they are one conversation. In the others each is by itself, so that its answer is learned from
the picture: in a conversation it often follows from the answers before, such as whether a thing is there.
"""
LOOK = 1200
"""The first steps, at most half of all, in which there are checks alone, so that each has four times as many pictures.

All the time a linear layer guesses name, first colour, style and number from what the transformer gives at a picture's cells.
It teaches to see, since each picture says directly what is in it, and is not part of the model.
"""
SEEN = 0.25
"""The share of a picture's cells that the model sees until the learning rate falls."""


@dataclass(frozen=True)
class Encoded:
    """Pictures as codes int16 [N, L], and what is known about each."""

    codes: Tensor
    subjects: list[Subject]

    @classmethod
    def of(cls, made: Iterable[Scene], tokenizer: Tokenizer) -> Encoded:
        """Encode pictures as they are made."""
        subjects: list[Subject] = []

        def pictures() -> Iterator[Pixels]:
            for scene in track(made, "encoding", total=None):
                subjects.append(scene.subject)
                yield scene.picture

        return cls(encoded(pictures(), tokenizer), subjects)

    @classmethod
    def drawn(cls, generator: Generator, names: Names) -> Encoded:
        """Draw the generator's things. What was asked for counts as shown, though not every drawing shows it."""
        codes, subjects = [], []
        for label, thing in track(THINGS.items(), "drawing"):
            name = names.of({"kind": "icon", "split": "train", "label": label})
            for style in DRAWN_STYLES if name else ():
                made = generator.generate(f"{with_article(thing)} in {STYLES[style][0]}", n=DRAWINGS, seed=FIRST_SEED)
                codes += [torch.from_numpy(each.indices.astype(np.int16)) for each in made.codes]
                subjects += [Subject(((str(name), 1),), colours(np.asarray(image)), style) for image in made.images]
        return cls(torch.stack(codes), subjects)

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded(torch.cat([self.codes, other.codes]), self.subjects + other.subjects)


def load_understander(*directories: Path) -> tuple[UnderstanderModel, TextTokenizer]:
    """Load the averaged understander of a training's best checkpoint, or the mean of several, and the first text tokenizer."""
    text = TextTokenizer.from_file(str(directories[0] / TEXT_TOKENIZER))
    model = UnderstanderModel(text.get_vocab_size())
    model.load_state_dict(best_average(*directories))
    return model.eval().requires_grad_(False), text


class UnderstanderTraining(AveragedTraining[UnderstanderModel]):
    """The training of the understander: model, average, optimizer and step, which a checkpoint keeps, and the data.

    Args:
        train: pictures to learn from. held_out: pictures to measure with.
        names: of things that questions may be about.
        rows: the codebook [K, C]; the model reads the quantized features of codes.
        text: tokenizes questions and answers.
        steps: of the whole training. batch: pictures in a step, at least. rate: largest learning rate. seed: of all choices.
        noise: the spread of the noise added to features that it learns from, as a share of their own.
    """

    def __init__(
        self,
        train: Encoded,
        held_out: Encoded,
        names: Sequence[str],
        rows: Tensor,
        text: TextTokenizer,
        steps: int,
        batch: int,
        rate: float,
        seed: int,
        noise: float = 0.0,
    ) -> None:
        torch.manual_seed(seed)
        self.device = rows.device
        self.half = has_bfloat16(self.device)
        self.train, self.held_out, self.names, self.text = train, held_out, names, text
        self.quantizer = quantizer(rows)
        self.steps, self.batch, self.rate, self.seed, self.noise = steps, batch, rate, seed, noise
        self.chances = _chances(train.subjects)
        self.known = torch.tensor([labels(known, names) for known in train.subjects], device=self.device)
        self.groups = groups(names)
        model = UnderstanderModel(text.get_vocab_size()).to(self.device)
        self.guess = nn.Linear(SIZES.width, sum(self.groups)).to(self.device)
        others = (model.text, model.projector, self.guess)
        super().__init__(model, transformer_optimizers(model.transformer, others, rate), decay=0.998)

    def run_step(self) -> dict[str, float]:
        """Run one optimizer step, and return the losses."""
        rng = np.random.default_rng([self.seed, self.step])
        looks, last = self.step < min(LOOK, self.steps // 2), cools(self.step, self.steps)
        times = 4 if looks else 1 if last else 2
        picks = rng.choice(len(self.chances), size=self.batch * times, p=self.chances)
        turns = 0 if looks else int(rng.integers(1, TURNS + 1))
        chat = looks or rng.random() < CHATS
        every = [conversation(self.train.subjects[i], self.names, turns, rng) for i in picks]
        asked = []
        for i, said in zip(picks, every, strict=True):
            parts = [tokenized(self.text, turns) for turns in ([said] if chat else [[turn] for turn in said])]
            parts += [check(self.text, *each) for each in checks(self.train.subjects[i], self.names, rng)]
            asked.append(apart(parts))
        features = self._features(self.train, picks)
        count = features.shape[1] if last else int(SEEN * features.shape[1])
        cells = torch.from_numpy(np.sort(rng.permutation(features.shape[1])[:count])).to(self.device)
        if self.noise:
            noise = torch.from_numpy(rng.standard_normal(features.shape, np.float32)).to(self.device)
            features = features + self.noise * features.std() * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            hidden = self.model.hidden(features, asked, cells)
            guesses = self.guess(hidden[:, count // 2 : count])
            targets, taught = _targets(asked, self.device)
            logits = self.model.logits(hidden[:, count - 1 : -1][taught])
        losses = {
            "guess": guess_loss(guesses.float(), self.known[torch.from_numpy(picks)], self.groups),
            "loss": F.cross_entropy(logits.float(), targets[taught]),
        }
        self.descend(torch.stack(list(losses.values())).sum(), self.rate * cooled(self.step, self.steps))
        return {name: float(loss.detach()) for name, loss in losses.items()}

    @torch.no_grad()
    def _features(self, pictures: Encoded, picks: NDArray[np.intp]) -> Tensor:
        """Quantized features [B, grid * grid, C] of some pictures."""
        codes = pictures.codes[torch.from_numpy(picks)].long().to(self.device)
        features: Tensor = self.quantizer.decode(codes).flatten(2).transpose(1, 2)
        return features

    @torch.no_grad()
    def evaluate(self, out: Path, pictures: int = 64) -> dict[str, float]:
        """The share of right answers by kind of question, about held-out pictures.

        An answer is right if each of its tokens is the likeliest after those before it, which is to say that the model gives
        exactly this answer.
        """
        figures = {}
        for number, (kind, (_, _, needs_name)) in enumerate(KINDS.items()):
            rng = np.random.default_rng([7, number])
            able = [i for i, known in enumerate(self.held_out.subjects) if known.things or not needs_name]
            right = []
            for group in np.array_split(rng.permutation(able)[:pictures], -(-pictures // 16)):
                asked = [tokenized(self.text, [question(kind, self.held_out.subjects[i], self.names, rng)]) for i in group]
                logits = self.average(self._features(self.held_out, group), asked)
                targets, taught = _targets(asked, self.device)
                right += ((logits[:, :-1].argmax(dim=-1) == targets) | ~taught).all(dim=1).tolist()
            figures[f"right_{kind}"] = float(np.mean(right))
        return figures

    def score(self, figures: dict[str, float]) -> float:
        return float(np.mean([figures[f"right_{kind}"] for kind in KINDS]))

    def state(self) -> dict[str, Any]:
        return super().state() | {"guess": self.guess.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.guess.load_state_dict(state["guess"])


def _targets(asked: Sequence[Conversation], place: torch.device) -> tuple[Tensor, Tensor]:
    """The ids after the pictures [B, L], and which of them are taught."""
    taught = torch.tensor(filled([each.taught for each in asked], False), dtype=torch.bool, device=place)
    return torch.tensor(filled([each.after for each in asked], 0), dtype=torch.long, device=place), taught


def _chances(subjects: Sequence[Subject]) -> NDArray[np.float64]:
    """How often each picture is chosen: a name comes as the fourth root of how many have it, none three times as often."""
    counts = Counter(known.things for known in subjects)
    weights = np.array([counts[known.things] ** -0.75 * (1 if known.things else 3) for known in subjects])
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances


def _texts(subjects: Sequence[Subject], names: Sequence[str]) -> list[str]:
    """Questions and answers of all kinds, from which the text tokenizer is trained."""
    rng = np.random.default_rng(0)
    turns = (turn for known in subjects for turn in conversation(known, names, TURNS, rng))
    return [text for turn in turns for text in (turn.question, turn.answer)]


def _encoded(pictures: Pictures, names: Names, models: Path, out: Path, seed: int) -> dict[str, Encoded]:
    """The scenes of both splits as codes, with the generator's drawings among those that are learned from.

    They come from files beside the checkpoint if they were made with these models before.
    """

    def made() -> dict[str, Encoded]:
        with Tokenizer.from_pretrained(models) as tokenizer:
            return {
                split: Encoded.of(scenes(pictures, names, split, variants, SEVERAL, seed), tokenizer)
                for split, variants in (("heldout", 1), ("train", VARIANTS))
            }

    def drawn() -> dict[str, Encoded]:
        with Generator.from_pretrained(models) as generator:
            return {"train": Encoded.drawn(generator, names)}

    tokenizer, generator = (
        json.loads((models / kind / "bundle.json").read_text(encoding="utf-8")) for kind in ("tokenizer", "generator")
    )
    drawn_by = [tokenizer["graphs"], generator["graphs"], generator["config"], DRAWINGS, FIRST_SEED]
    counts = [VARIANTS, SEVERAL, seed, len(pictures.icon_entries), len(pictures.photo_entries)]
    found = _kept(out / SCENES, [tokenizer["graphs"]["encode"], names.known, counts], made)
    drawings = _kept(out / DRAWN, [drawn_by, names.known, THINGS, DRAWN_STYLES, STYLES], drawn)
    return {**found, "train": found["train"] + drawings["train"]}


def _kept(path: Path, made_of: object, make: Callable[[], dict[str, Encoded]]) -> dict[str, Encoded]:
    """What `make` gives; from a file if that was made of the same before."""
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    if path.exists():
        stored = torch.load(path, weights_only=True)
        if stored.pop("key") == digest:
            return {
                split: Encoded(codes, [Subject(*known) for known in subjects]) for split, (codes, subjects) in stored.items()
            }
    found = make()
    lists = {split: (each.codes, [(s.things, s.colours, s.style) for s in each.subjects]) for split, each in found.items()}
    partial = path.with_suffix(".partial")
    torch.save({"key": digest, **lists}, partial)
    partial.replace(path)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = transformer_parser(__doc__, out=Path("data/tiny/understander"), steps=20000, batch=16, rate=1e-3)
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="packages as fetched (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models/tiny"), help="codes, drawings (default: %(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="added to features, as a share of their spread (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(arguments.data)
    names = names_of(pictures, arguments.cache)
    found = _encoded(pictures, names, arguments.models, out, arguments.seed)
    subjects = found["train"].subjects
    text = kept_text_tokenizer(
        out / TEXT_TOKENIZER, lambda: train_text_tokenizer(_texts(subjects, names.known)), arguments.start
    )
    training = UnderstanderTraining(
        found["train"],
        found["heldout"],
        names.known,
        codebook(arguments.models).to(device()),
        text,
        arguments.steps,
        arguments.batch,
        arguments.rate,
        arguments.seed,
        arguments.noise,
    )
    if arguments.compile:
        training.model.transformer.compile(dynamic=True)
    run(training, out, arguments.start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
