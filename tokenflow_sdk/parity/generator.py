"""Compares a generator's sessions with its bundle's reference: a prompt and a scale of image tokens, run at export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.model.sampling import TIES
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.batches import Rows, batch_sizes, check_batches
from tokenflow_sdk.parity.language_model import LanguageModelReference, LanguageModelReport, run_pieces

__all__ = [
    "GeneratorInputs",
    "GeneratorReference",
    "check_generator",
    "embed_inputs",
    "likeliest_codes",
    "likeliest_feeds",
    "run_generator",
    "run_inputs",
]

_PROMPT, _BLOCK = 48, 64
"""Tokens in the reference's prompt and scale."""

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class GeneratorInputs:
    """Inputs of the reference: a prompt with causal attention, and after it a scale with bidirectional attention.

    Attributes:
        token_ids: of the prompt, int32 [P].
        code_indices: the scale's codes, int32 [Q].
    """

    token_ids: Int32
    code_indices: Int32

    @classmethod
    def random(cls, config: GeneratorConfig) -> GeneratorInputs:
        """Random inputs, the same for every model with these sizes."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.text_size, _PROMPT, np.int32)
        return cls(ids, rng.integers(0, config.codebook_size, min(_BLOCK, config.n_codes), np.int32))


@dataclass(frozen=True)
class GeneratorReference(GeneratorInputs, LanguageModelReference):
    """`reference.npz` of a generator's bundle: the inputs and their expected results."""

    layout: ClassVar[str] = (
        "token_ids int32<text_size p; code_indices int32<codebook_size q; hidden float32 r t width; "
        "likeliest int32<codebook_size r t"
    )

    def __len__(self) -> int:
        return len(self.token_ids) + len(self.code_indices)


def embed_inputs(sessions: Mapping[str, Session], codebook: Float32, inputs: GeneratorInputs) -> tuple[Tensor, Tensor]:
    """Embed the prompt and the scale.

    Args:
        sessions: of the graphs `embed_text` and `embed_image`.
        codebook: float32 [K, C].
        inputs: of the reference.

    Returns:
        Embeddings of the prompt, float32 [1, P, H], and of the scale, float32 [1, Q, H]. They are valid until the sessions run
        again.
    """
    starts = np.zeros((1, len(inputs.token_ids)), np.float32)
    starts[0, -1] = 1
    text = {"token_ids": inputs.token_ids[None], "starts": starts}
    places = np.arange(len(inputs.code_indices), dtype=np.int32)
    image = {"features": codebook[inputs.code_indices][None], "level": np.ones(1, np.int32), "places": places}
    feeds: dict[str, dict[str, Tensor]] = {"embed_text": dict(text), "embed_image": dict(image)}
    prompt, scale = (sessions[name].run_resident(values)["embeddings"] for name, values in feeds.items())
    return prompt, scale


def run_inputs(transformer: PagedTransformer, prompt: Tensor, scale: Tensor) -> Float32:
    """Run the transformer on the prompt, and then on the scale over the prompt's pages.

    Args:
        transformer: whose pool has room for P + Q tokens.
        prompt: embeddings, float32 [1, P, H].
        scale: embeddings, float32 [1, Q, H].

    Returns:
        Hidden states, float32 [P + Q, H].

    Raises:
        PagesExhausted: the pool is too small.
        BackendError: the session cannot be run.
    """
    causal = np.arange(1, prompt.shape[1] + 1, dtype=np.int32)
    bidirectional = np.full(scale.shape[1], scale.shape[1], np.int32)
    return run_pieces(transformer, [(prompt, causal), (scale, bidirectional)], prompt.shape[1] + scale.shape[1])


def likeliest_feeds(hidden: Float32) -> dict[str, Tensor]:
    """Inputs of the graph `sample` that make it choose the likeliest code at each hidden state, float32 [R, Q, H]."""
    images = len(hidden)
    return {
        "conditional": hidden,
        "unconditional": np.zeros_like(hidden),
        "guidance": np.zeros(images, np.float32),
        "top_k": np.ones(images, np.int32),
        "top_p": np.zeros(images, np.float32),
        "noise": np.full(hidden.shape[:2], 0.5, np.float32),
        "ranks": np.arange(1 + TIES, dtype=np.int32),
    }


def likeliest_codes(sample: Session, hidden: Float32) -> Int32:
    """The likeliest code at each position, without classifier-free guidance.

    Args:
        sample: session of the graph `sample`.
        hidden: hidden states of R images, float32 [R, Q, H].

    Returns:
        int32 [R, Q].
    """
    return sample.run(likeliest_feeds(hidden), ["code_indices"])["code_indices"].astype(np.int32)


def run_generator(
    sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32, inputs: GeneratorInputs
) -> GeneratorReference:
    """Run inputs on sessions, and return the results as a reference with R = 1.

    Args:
        sessions: of the graphs `embed_text`, `embed_image` and `sample`.
        transformer: of the graph `transformer`.
        codebook: float32 [K, C].
        inputs: of the reference.

    Raises:
        BackendError: a session cannot be run.
        PagesExhausted: the pool is too small.
    """
    hidden = run_inputs(transformer, *embed_inputs(sessions, codebook, inputs))
    codes = likeliest_codes(sessions["sample"], hidden[None])
    return GeneratorReference(
        token_ids=inputs.token_ids, code_indices=inputs.code_indices, hidden=hidden[None], likeliest=codes
    )


def check_generator(
    bundle: Bundle[GeneratorConfig], sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32
) -> LanguageModelReport:
    """Run the inputs of a generator's reference on sessions, and compare the results; and batches with their rows alone.

    The batches are two images with guidance at the last scale, and the largest of each optimization profile.

    Args:
        bundle: with the reference.
        sessions: of the graphs `embed_text`, `embed_image` and `sample`.
        transformer: of the graph `transformer`.
        codebook: float32 [K, C].

    Raises:
        CorruptBundleError: the bundle has no reference, or it is damaged.
        BackendError: a session cannot be run.
        PagesExhausted: the pool is too small.
    """
    reference = GeneratorReference.load(bundle)
    found = run_generator(sessions, transformer, codebook, reference)
    report = reference.compare(found.hidden[0], found.likeliest[0], "code")
    sizes = batch_sizes(transformer, 4, bundle.config.scales.counts[-1])
    prompt, _ = embed_inputs(sessions, codebook, reference)
    context = prompt, np.arange(1, prompt.shape[1] + 1, dtype=np.int32)
    return replace(report, batches=check_batches(transformer, context, _rows(sessions, codebook, reference), sizes))


def _rows(sessions: Mapping[str, Session], codebook: Float32, inputs: GeneratorInputs) -> Rows:
    """Rows of codes with bidirectional attention. The first half are images' conditional rows, which are sampled from."""

    def embed(numbers: Sequence[int], queries: int) -> Tensor:
        codes = np.stack([np.resize(np.roll(inputs.code_indices, -number), queries) for number in numbers])
        places = np.arange(queries, dtype=np.int32)
        feeds: dict[str, Tensor] = {"features": codebook[codes], "level": np.ones(1, np.int32), "places": places}
        return sessions["embed_image"].run_resident(feeds)["embeddings"]

    return Rows(
        embed,
        lambda queries: np.full(queries, queries, np.int32),
        lambda hidden: likeliest_codes(sessions["sample"], hidden[: max(1, len(hidden) // 2)]),
    )
