"""Does an engine run an understander's graphs as onnxruntime did at export? Text, a picture, and single tokens after them are
stored with their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.model.sampling import TIES
from tokenflow_sdk.model.transformer import PagedTransformer
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

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class UnderstanderInputs:
    """What is run: text, features of N codes in the place of a picture, text, and then one token at a time.

    before, after, answer: token ids, int32 [T]; features: float32 [N, C].
    """

    before: Int32
    features: Float32
    after: Int32
    answer: Int32

    @classmethod
    def random(cls, config: UnderstanderConfig, codebook: Float32) -> UnderstanderInputs:
        """The same for every bundle of these sizes; features are rows of the tokenizer's codebook, float32 [K, C]."""
        rng = np.random.default_rng(0)
        before, after, answer = (rng.integers(0, config.vocabulary, count, np.int32) for count in (_TEXT, _TEXT, _ANSWER))
        rows = rng.integers(0, len(codebook), min(_IMAGE, config.image_tokens))
        return cls(before, codebook[rows], after, answer)

    def __len__(self) -> int:
        return len(self.before) + len(self.features) + len(self.after) + len(self.answer)


@dataclass(frozen=True)
class UnderstanderReference(UnderstanderInputs, LanguageModelReference):
    """`reference.npz` of an understander's bundle: its inputs, and what is right for them."""


def embed_pieces(sessions: Mapping[str, Session], inputs: UnderstanderInputs) -> Iterator[Piece]:
    """Some inputs as the transformer takes them. Each piece is valid until the next is asked for.

    Args:
        sessions: `embed_text` and `project`.
        inputs: what will be run.
    """
    texts = [("embed_text", "token_ids", ids) for ids in (inputs.before, inputs.after, *inputs.answer[:, None])]
    for graph, feed, values in (texts[0], ("project", "features", inputs.features), *texts[1:]):
        embeddings = sessions[graph].run_resident({feed: values[None]})["embeddings"]
        yield embeddings, np.arange(1, embeddings.shape[1] + 1, dtype=np.int32)


def greedy_feeds(hidden: Float32, config: UnderstanderConfig) -> dict[str, Tensor]:
    """What the head is fed to take the likeliest token after each hidden state [Q, H]."""
    ones = np.ones(len(hidden), np.float32)
    return {
        "hidden": hidden,
        "seen": np.zeros((len(hidden), 1), np.int32),
        "penalty": ones,
        "temperature": ones,
        "top_k": np.ones(len(hidden), np.int32),
        "top_p": ones,
        "noise": 0.5 * ones,
        "ranks": np.arange(min(1 + TIES, config.vocabulary), dtype=np.int32),
    }


def likeliest_tokens(head: Session, hidden: Float32, config: UnderstanderConfig) -> Int32:
    """The likeliest token after each hidden state [Q, H], int32 [Q]; as many rows at once as the engine takes."""
    most = head.max_size("batch") or len(hidden)
    parts = [
        head.run(greedy_feeds(hidden[start : start + most], config), ["token_ids"])["token_ids"]
        for start in range(0, len(hidden), most)
    ]
    return np.concatenate(parts).astype(np.int32)


def check_understander(
    bundle: Bundle[UnderstanderConfig], sessions: Mapping[str, Session], transformer: PagedTransformer
) -> LanguageModelReport:
    """Run a bundle's stored inputs on some sessions, and compare with the nearest of the results that are right.

    Raises:
        CorruptBundleError, BackendError: the reference or an engine cannot be loaded or run.
        PagesExhausted: the pool is smaller than the reference.
    """
    reference = UnderstanderReference.load(bundle)
    hidden = run_pieces(transformer, embed_pieces(sessions, reference), len(reference))
    return reference.compare(hidden, likeliest_tokens(sessions["head"], hidden, bundle.config), "token")
