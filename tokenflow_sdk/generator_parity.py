"""Does an engine run a generator's graphs as onnxruntime did at export? A prompt and a scale are stored with their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.base import Session, Tensor
from tokenflow_sdk.bundle import Bundle, load_reference
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.paged_parity import missed_bars, nearest_agreement, run_pieces
from tokenflow_sdk.sampling import TIES
from tokenflow_sdk.transformer import PagedTransformer

__all__ = [
    "GeneratorReference",
    "GeneratorReport",
    "Steps",
    "check_generator",
    "compare_generators",
    "embed_steps",
    "likeliest_codes",
    "run_generator",
    "run_steps",
]

_PROMPT, _BLOCK = 48, 64

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Steps:
    """What is run: a causal prompt, and a scale that follows it. token_ids: int32 [P]; code_indices: int32 [Q]."""

    token_ids: Int32
    code_indices: Int32

    @classmethod
    def random(cls, config: GeneratorConfig) -> Steps:
        """The same for every bundle of these sizes."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.text_size, _PROMPT, np.int32)
        return cls(ids, rng.integers(0, config.codebook_size, min(_BLOCK, config.n_codes), np.int32))


@dataclass(frozen=True)
class GeneratorReference:
    """`reference.npz` of a bundle: its steps, and R results of which each is right.

    The first is what the graphs gave. Graphs with int8 weights round what a product reads as well, which engines do not:
    the second is float32 arithmetic on the same weights.

    hidden: float32 [R, P + Q, H]; likeliest: the likeliest code of each position, int32 [R, P + Q].
    """

    token_ids: Int32
    code_indices: Int32
    hidden: Float32
    likeliest: Int32

    def __post_init__(self) -> None:
        if self.hidden.ndim != 3 or self.likeliest.shape != self.hidden.shape[:2]:
            raise ValueError(f"hidden states {self.hidden.shape} with codes {self.likeliest.shape}")

    @property
    def steps(self) -> Steps:
        """What was run."""
        return Steps(self.token_ids, self.code_indices)

    @classmethod
    def load(cls, bundle: Bundle[GeneratorConfig]) -> GeneratorReference:
        """Raises:
        CorruptBundleError: the file is damaged.
        """
        return load_reference(bundle, cls)


@dataclass(frozen=True)
class GeneratorReport:
    """`hidden_error` is the largest difference of hidden states, `hidden_cosine` their least cosine, `same_code` the share of
    positions whose likeliest code is the same."""

    hidden_error: float
    hidden_cosine: float
    same_code: float

    def failures(self) -> list[str]:
        """Which bars are missed, in words; empty when all hold. A difference that is not a number misses them."""
        return missed_bars(self.hidden_cosine, self.same_code, "code")

    def to_json(self) -> dict[str, Any]:
        """For certificates."""
        return asdict(self)


def embed_steps(sessions: Mapping[str, Session], codebook: Float32, steps: Steps) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt [1, P, H] and of the scale [1, Q, H].

    Args:
        sessions: `embed_text` and `embed_image`.
        codebook: float32 [K, 40].
        steps: what will be run.
    """
    starts = np.zeros((1, len(steps.token_ids)), np.float32)
    starts[0, -1] = 1
    text = {"token_ids": steps.token_ids[None], "starts": starts}
    places = np.arange(len(steps.code_indices), dtype=np.int32)
    image = {"features": codebook[steps.code_indices][None], "level": np.ones(1, np.int32), "places": places}
    feeds: dict[str, dict[str, Tensor]] = {"embed_text": dict(text), "embed_image": dict(image)}
    prompt, scale = (sessions[name].run_resident(values)["embeddings"] for name, values in feeds.items())
    return prompt, scale


def run_steps(transformer: PagedTransformer, prompt: Tensor, scale: Tensor) -> Float32:
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
    sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32, steps: Steps
) -> GeneratorReference:
    """What some sessions make of steps, as the one result.

    Raises:
        BackendError: an engine cannot be run.
    """
    hidden = run_steps(transformer, *embed_steps(sessions, codebook, steps))
    codes = likeliest_codes(sessions["sample"], hidden)
    return GeneratorReference(steps.token_ids, steps.code_indices, hidden[None], codes[None])


def compare_generators(found: GeneratorReference, expected: GeneratorReference) -> GeneratorReport:
    """How the first result of the same steps differs from the nearest of those expected."""
    return GeneratorReport(*nearest_agreement(found.hidden[0], found.likeliest[0], expected.hidden, expected.likeliest))


def check_generator(
    bundle: Bundle[GeneratorConfig], sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32
) -> GeneratorReport:
    """Run a bundle's stored steps on some sessions and compare.

    Raises:
        CorruptBundleError, BackendError: the reference or an engine cannot be loaded or run.
    """
    reference = GeneratorReference.load(bundle)
    return compare_generators(run_generator(sessions, transformer, codebook, reference.steps), reference)
