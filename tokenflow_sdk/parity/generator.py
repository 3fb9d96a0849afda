"""Does an engine run a generator's graphs as onnxruntime did at export? A prompt and a scale are stored with their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.model.sampling import TIES
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.language_model import LanguageModelReference, LanguageModelReport, run_pieces

__all__ = [
    "GeneratorInputs",
    "GeneratorReference",
    "check_generator",
    "embed_inputs",
    "likeliest_codes",
    "run_generator",
    "run_inputs",
]

_PROMPT, _BLOCK = 48, 64

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class GeneratorInputs:
    """What is run: a causal prompt, and a scale that follows it. token_ids: int32 [P]; code_indices: int32 [Q]."""

    token_ids: Int32
    code_indices: Int32

    @classmethod
    def random(cls, config: GeneratorConfig) -> GeneratorInputs:
        """The same for every bundle of these sizes."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.text_size, _PROMPT, np.int32)
        return cls(ids, rng.integers(0, config.codebook_size, min(_BLOCK, config.n_codes), np.int32))


@dataclass(frozen=True)
class GeneratorReference(GeneratorInputs, LanguageModelReference):
    """`reference.npz` of a generator's bundle: its inputs, and what is right for them."""


def embed_inputs(sessions: Mapping[str, Session], codebook: Float32, inputs: GeneratorInputs) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt [1, P, H] and of the scale [1, Q, H].

    Args:
        sessions: `embed_text` and `embed_image`.
        codebook: float32 [K, 40].
        inputs: what will be run.
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
    """Hidden states [P + Q, H] of a causal prompt and of a bidirectional scale over its pages."""
    seen = np.arange(1, prompt.shape[1] + 1, dtype=np.int32), np.full(scale.shape[1], scale.shape[1], np.int32)
    return run_pieces(transformer, [(prompt, seen[0]), (scale, seen[1])], prompt.shape[1] + scale.shape[1])


def likeliest_codes(sample: Session, hidden: Float32) -> Int32:
    """The likeliest code of each position, int32 [P + Q], without guidance."""
    feeds: dict[str, Tensor] = {
        "conditional": hidden[None],
        "unconditional": np.zeros_like(hidden[None]),
        "guidance": np.zeros(1, np.float32),
        "top_k": np.ones(1, np.int32),
        "top_p": np.ones(1, np.float32),
        "noise": np.full((1, len(hidden)), 0.5, np.float32),
        "ranks": np.arange(1 + TIES, dtype=np.int32),
    }
    found: Int32 = sample.run(feeds, ["code_indices"])["code_indices"][0].astype(np.int32)
    return found


def run_generator(
    sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32, inputs: GeneratorInputs
) -> GeneratorReference:
    """What some sessions make of inputs, as the one result.

    Raises:
        BackendError: an engine cannot be run.
    """
    hidden = run_inputs(transformer, *embed_inputs(sessions, codebook, inputs))
    codes = likeliest_codes(sessions["sample"], hidden)
    return GeneratorReference(
        token_ids=inputs.token_ids, code_indices=inputs.code_indices, hidden=hidden[None], likeliest=codes[None]
    )


def check_generator(
    bundle: Bundle[GeneratorConfig], sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32
) -> LanguageModelReport:
    """Run a bundle's stored inputs on some sessions and compare.

    Raises:
        CorruptBundleError, BackendError: the reference or a session cannot be loaded or run.
    """
    reference = GeneratorReference.load(bundle)
    found = run_generator(sessions, transformer, codebook, reference)
    return reference.compare(found.hidden[0], found.likeliest[0], "code")
