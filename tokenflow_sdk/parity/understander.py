"""Compares an understander's sessions with its bundle's reference: text, image features and single tokens, run at export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.model.sampling import TIES
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.batches import Rows, batch_sizes, check_batches
from tokenflow_sdk.parity.language_model import LanguageModelReference, LanguageModelReport, Piece, run_pieces

__all__ = [
    "UnderstanderInputs",
    "UnderstanderReference",
    "check_understander",
    "embed_pieces",
    "greedy_feeds",
    "likeliest_tokens",
]

_TEXT, _IMAGE, _ANSWER = 24, 64, 4
"""Positions of each text, of the image and of the answer in the reference."""

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class UnderstanderInputs:
    """Inputs of the reference: text, an image's features, more text, and an answer of which each token is one step.

    Attributes:
        before: token ids of the text before the image, int32 [T].
        features: quantized features of the image, float32 [N, C].
        after: token ids of the text after the image, int32 [T].
        answer: token ids of the answer, int32 [T].
    """

    before: Int32
    features: Float32
    after: Int32
    answer: Int32

    @classmethod
    def random(cls, config: UnderstanderConfig, codebook: Float32) -> UnderstanderInputs:
        """Random inputs, the same for every model with these sizes and this codebook.

        Args:
            config: of the understander.
            codebook: of the paired tokenizer, float32 [K, C]; its rows are the features.
        """
        rng = np.random.default_rng(0)
        before, after, answer = (rng.integers(0, config.vocabulary, count, np.int32) for count in (_TEXT, _TEXT, _ANSWER))
        rows = rng.integers(0, len(codebook), min(_IMAGE, config.image_tokens))
        return cls(before, codebook[rows], after, answer)

    def __len__(self) -> int:
        return len(self.before) + len(self.features) + len(self.after) + len(self.answer)


@dataclass(frozen=True)
class UnderstanderReference(UnderstanderInputs, LanguageModelReference):
    """`reference.npz` of an understander's bundle: the inputs and their expected results."""

    layout: ClassVar[str] = (
        "before int32<vocabulary b; features float32 n code_dim; after int32<vocabulary a; answer int32<vocabulary w; "
        "hidden float32 r t width; likeliest int32<vocabulary r t"
    )


def embed_pieces(sessions: Mapping[str, Session], inputs: UnderstanderInputs) -> Iterator[Piece]:
    """Embed the inputs and yield them as pieces for `run_pieces`, all causal. Each piece is valid until the next is taken.

    Args:
        sessions: of the graphs `embed_text` and `project`.
        inputs: of the reference.
    """
    texts = [("embed_text", "token_ids", ids) for ids in (inputs.before, inputs.after, *inputs.answer[:, None])]
    for graph, feed, values in (texts[0], ("project", "features", inputs.features), *texts[1:]):
        embeddings = sessions[graph].run_resident({feed: values[None]})["embeddings"]
        yield embeddings, np.arange(1, embeddings.shape[1] + 1, dtype=np.int32)


def greedy_feeds(hidden: Float32, config: UnderstanderConfig) -> dict[str, Tensor]:
    """Inputs of the graph `head` that make it choose the likeliest token after each hidden state, float32 [Q, H]."""
    ones = np.ones(len(hidden), np.float32)
    return {
        "hidden": hidden,
        "seen": np.zeros((len(hidden), 1), np.int32),
        "penalty": ones,
        "temperature": ones,
        "top_k": np.ones(len(hidden), np.int32),
        "top_p": 0 * ones,
        "noise": 0.5 * ones,
        "ranks": np.arange(min(1 + TIES, config.vocabulary), dtype=np.int32),
    }


def likeliest_tokens(head: Session, hidden: Float32, config: UnderstanderConfig) -> Int32:
    """The likeliest token after each hidden state.

    Args:
        head: session of the graph `head`; runs as many rows in a call as it can.
        hidden: float32 [Q, H].
        config: of the understander.

    Returns:
        Token ids, int32 [Q].
    """
    most = head.max_size("batch") or len(hidden)
    parts = [
        head.run(greedy_feeds(hidden[start : start + most], config), ["token_ids"])["token_ids"]
        for start in range(0, len(hidden), most)
    ]
    return np.concatenate(parts).astype(np.int32)


def check_understander(
    bundle: Bundle[UnderstanderConfig], sessions: Mapping[str, Session], transformer: PagedTransformer
) -> LanguageModelReport:
    """Run the inputs of an understander's reference on sessions, and compare the results; and batches with their rows alone.

    The batches are one token for each of eight answers, and the largest of each optimization profile.

    Args:
        bundle: with the reference.
        sessions: of the graphs `embed_text`, `project` and `head`.
        transformer: of the graph `transformer`.

    Raises:
        CorruptBundleError: the bundle has no reference, or it is damaged.
        BackendError: a session cannot be run.
        PagesExhausted: the pool is too small.
    """
    reference = UnderstanderReference.load(bundle)
    hidden = run_pieces(transformer, embed_pieces(sessions, reference), len(reference))
    report = reference.compare(hidden, likeliest_tokens(sessions["head"], hidden, bundle.config), "token")
    image = next(islice(embed_pieces(sessions, reference), 1, None))
    rows = _rows(sessions, bundle.config, reference)
    return replace(report, batches=check_batches(transformer, image, rows, batch_sizes(transformer, 8, 1)))


def _rows(sessions: Mapping[str, Session], config: UnderstanderConfig, inputs: UnderstanderInputs) -> Rows:
    """Rows of text with causal attention."""

    def embed(numbers: Sequence[int], queries: int) -> Tensor:
        ids = np.stack([np.resize(np.roll(inputs.before, -number), queries) for number in numbers])
        return sessions["embed_text"].run_resident({"token_ids": ids})["embeddings"]

    return Rows(
        embed,
        lambda queries: np.arange(1, queries + 1, dtype=np.int32),
        lambda hidden: likeliest_tokens(sessions["head"], hidden.reshape(-1, config.width), config).reshape(hidden.shape[:2]),
    )
