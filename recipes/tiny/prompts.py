"""The generator's prompt tokenizer: byte-level BPE trained on captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.tiny.captions import caption, held_out_caption
from recipes.tiny.concepts import DRAWN_STYLES

__all__ = ["BOS", "FIRST_WORD", "NEGATIVE_PROMPT", "text_size", "train_prompt_tokenizer"]

VOCABULARY = 1024
PAD, BOS, FIRST_WORD = 0, 1, 2
NEGATIVE_PROMPT = "anything"
"""The prompt that stands for no prompt; training puts it in place of one caption in ten."""


def train_prompt_tokenizer(labels: Sequence[str], codes: int) -> Tokenizer:
    """Train a tokenizer with text tokens, then `codes` image tokens, then `<img>`, as in a released directory."""

    def texts() -> Iterator[str]:
        rng = np.random.default_rng(0)
        yield NEGATIVE_PROMPT
        for label in labels:
            for style in DRAWN_STYLES:
                yield caption(label, style, rng)
                yield held_out_caption(label, style, rng)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["[PAD]", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([f"<vq_token_{i}>" for i in range(codes)])
    tokenizer.add_special_tokens([AddedToken("<img>", special=True)])
    return tokenizer


def text_size(tokenizer: Tokenizer) -> int:
    """How many text tokens a generator has, `<img>` included. Their ids come before those of the image tokens."""
    first_image_token = tokenizer.token_to_id("<vq_token_0>")
    assert first_image_token is not None
    return first_image_token + 1
