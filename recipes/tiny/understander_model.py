"""The understander as it is trained: the exporter's transformer in Qwen2's layout, over whole conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from recipes.tiny.config import TINY
from recipes.tiny.generator_model import FusedAttention
from recipes.tiny.questions import Turn
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.models.llama import Transformer

__all__ = [
    "MAX_TOKENS",
    "SIZES",
    "SYSTEM",
    "Conversation",
    "UnderstanderModel",
    "apart",
    "check",
    "filled",
    "tokenized",
    "train_text_tokenizer",
]

T = TypeVar("T")
SIZES = TransformerConfig(
    width=192,
    layers=6,
    heads=3,
    kv_heads=1,
    head_dim=64,
    mlp_width=512,
    norm_eps=1e-6,
    rope_theta=10000.0,
    norm_placement="pre",
    qk_norm=False,
    qkv_bias=True,
)
MAX_TOKENS = 1024
"""Tokens that a conversation may have, those of its pictures included."""
VOCABULARY = 2048
SYSTEM = "You are a helpful assistant."
_START, _END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Conversation:
    """A conversation about one picture as token ids, or several that are `apart`.

    Args:
        before: ids before the picture.
        after: ids after it.
        taught: for each id of `after` whether the model learns to give it: those of answers, each with what ends it.
        positions: for each id of `after` its position after the picture.
    """

    before: list[int]
    after: list[int]
    taught: list[bool]
    positions: list[int]


def train_text_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE with ChatML's control tokens, as Qwen2's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", _START, _END)])
    return tokenizer


def tokenized(tokenizer: Tokenizer, turns: Sequence[Turn]) -> Conversation:
    """Write a conversation in ChatML, in the pieces in which the runtime tokenizes it."""
    start, end = (tokenizer.get_vocab()[text] for text in (_START, _END))

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    before = [start, *ids(f"system\n{SYSTEM}"), end, *ids("\n"), start, *ids("user\n")]
    after: list[int] = []
    taught: list[bool] = []
    for number, turn in enumerate(turns):
        asked = [*([start, *ids(f"user\n{turn.question}")] if number else ids(f"\n{turn.question}")), end]
        asked += [*ids("\n"), start, *ids("assistant\n")]
        answer = [*ids(turn.answer), end]
        after += [*asked, *answer, *ids("\n")]
        taught += [False] * len(asked) + [True] * len(answer) + [False] * len(ids("\n"))
    return Conversation(before, after, taught, list(range(len(after))))


def check(tokenizer: Tokenizer, asked: str, is_so: bool) -> Conversation:
    """A question and the first token of its answer, yes or no, without what ChatML writes between them, so that many fit.

    It is for `apart`, after another conversation, from which it has what comes before the picture.
    """
    answer = tokenizer.encode("Yes" if is_so else "No", add_special_tokens=False).ids[:1]
    after = [*tokenizer.encode(f"\n{asked}", add_special_tokens=False).ids, *answer]
    return Conversation([], after, [False] * (len(after) - 1) + [True], list(range(len(after))))


def apart(conversations: Sequence[Conversation]) -> Conversation:
    """Several conversations about one picture in one sequence. Each begins at position 0 and does not see the others."""
    return Conversation(
        conversations[0].before,
        [i for each in conversations for i in each.after],
        [i for each in conversations for i in each.taught],
        [i for each in conversations for i in each.positions],
    )


def filled(rows: Sequence[list[T]], pad: T) -> list[list[T]]:
    """Rows of one length: shorter ones end with pads."""
    longest = max(map(len, rows))
    return [row + [pad] * (longest - len(row)) for row in rows]


class UnderstanderModel(nn.Module):
    """Embeddings, projector, transformer and head, which is the embeddings' table (docs/model.md, section 5)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        width = SIZES.width
        self.text = nn.Embedding(vocabulary, width)
        self.projector = nn.Sequential(nn.Linear(TINY.code_dim, width), nn.GELU(), nn.Linear(width, width))
        self.transformer = Transformer(SIZES, FusedAttention)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.startswith("transformer") and name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2 and not name.startswith("projector"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, features: Tensor, conversations: Sequence[Conversation], cells: Tensor | None = None) -> Tensor:
        """The logits [B, L, V] that follow each id after the pictures, and follow the pictures themselves at index 0.

        The arguments are those of `hidden`.
        """
        seen = features.shape[1] if cells is None else len(cells)
        return self.logits(self.hidden(features, conversations, cells)[:, seen - 1 :])

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of what the transformer gives [..., H]."""
        logits: Tensor = hidden @ self.text.weight.T
        return logits

    def hidden(self, features: Tensor, conversations: Sequence[Conversation], cells: Tensor | None = None) -> Tensor:
        """What the transformer gives [B, N + L, H] at the cells that it sees and at the ids after the pictures.

        Args:
            features: quantized features [B, grid * grid, C] of the pictures.
            conversations: one about each picture.
            cells: int64 [N], ascending: those of the grid that the model sees; all if None.
        """
        device = features.device
        before = torch.tensor([each.before for each in conversations], device=device)
        after, own = (
            torch.tensor(filled(rows, 0), dtype=torch.long, device=device)
            for rows in ([each.after for each in conversations], [each.positions for each in conversations])
        )
        begin, count = before.shape[1], features.shape[1]
        if cells is None:
            cells = torch.arange(count, device=device)
        x = torch.cat([self.text(before), self.projector(features[:, cells]), self.text(after)], dim=1)
        shared = torch.cat([torch.arange(begin, device=device), begin + cells]).expand(len(x), -1)
        positions = torch.cat([shared, begin + count + own], dim=1)
        # What all conversations of a row share has number 0; each id at position 0 begins the next one, and so does each pad.
        number = torch.cat([torch.zeros_like(shared), (own == 0).cumsum(dim=1)], dim=1)
        mask = (number[:, None] == 0) | (number[:, None] == number[:, :, None])
        out: Tensor = self.transformer(x, positions, mask.tril())
        return out[:, begin:]
