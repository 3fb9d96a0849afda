"""Sizes of tokenizers, generators and understanders, read from `bundle.json` and validated."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from tokenflow_sdk.bundle.schema import checked_fields, require
from tokenflow_sdk.pictures.preparation import PREPROCESS_MODES, Preprocess
from tokenflow_sdk.pictures.scales import Scales
from tokenflow_sdk.pictures.tfc import Header

__all__ = [
    "PAGE_SIZE",
    "ChatTemplate",
    "GeneratorConfig",
    "LanguageModelConfig",
    "TokenizerConfig",
    "UnderstanderConfig",
    "pages_for",
]

PAGE_SIZE = 16
"""Default number of tokens in a page of keys and values."""
DEFAULT_IMAGES = 8
"""Images, or questions about images, for which a default pool has pages at once."""
DEFAULT_TEXT = 512
"""Tokens of text, question and answer together, for which a default pool has pages for each question."""


def pages_for(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Number of pages that `tokens` tokens take, the last one possibly partly filled."""
    return -(-tokens // page_size)


def _require_sizes(values: dict[str, Any], names: tuple[str, ...], least: int = 1) -> None:
    for key in names:
        require(type(values[key]) is int and least <= values[key] < 2**31, "config", f"gives {key} as {values[key]!r}")


def _require_texts(values: dict[str, Any], names: tuple[str, ...]) -> None:
    for key in names:
        require(isinstance(values[key], str), "config", f"has no {key}")


def _as_numbers(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Non-empty lists of integers that int32 holds, none negative, as tuples."""
    for key in names:
        numbers = values[key]
        whole = isinstance(numbers, list) and bool(numbers) and all(type(n) is int and 0 <= n < 2**31 for n in numbers)
        require(whole, "config", f"gives {key} as {numbers!r}")
    return {key: tuple(values[key]) for key in names}


def _require_preprocess(value: object) -> None:
    require(value in PREPROCESS_MODES, "config", f"asks to {value!r} pictures")


def _require_storable(variant: str, codebook_sha256: str, codebook_size: int, patch_nums: tuple[int, ...]) -> None:
    """Require that the tokenizer's codes can be stored in a `.tfc` file."""
    digest = re.fullmatch("[0-9a-f]{64}", codebook_sha256) is not None
    require(digest, "config", f"gives codebook_sha256 as {codebook_sha256!r}")
    problem = Header(variant, codebook_sha256[:16], codebook_size, patch_nums).problem()
    require(problem is None, "config", f"claims {problem}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer (docs/model.md, sections 1 and 2).

    Args:
        variant: its name, e.g. `clipb_256`.
        image_size: side of its images in pixels.
        patch_nums: sides of the scales in codes, coarse to fine.
        codebook_size: number of codebook entries K.
        semantic_dim, pixel_dim: widths of the two halves of a codebook entry; together C.
        pixel_weight: weight of the pixel half's squared distance in the codebook search.
        semantic_width: width W of the semantic decoder's features.
        codebook_sha256: hex SHA-256 of the float32 little-endian codebooks as released, semantic before pixel.
        preprocess: how images are made square; see `tokenflow_sdk.pictures.images.fit`.
    """

    kind: ClassVar[str] = "tokenizer"

    variant: str
    image_size: int
    patch_nums: tuple[int, ...]
    codebook_size: int
    semantic_dim: int
    pixel_dim: int
    pixel_weight: float
    semantic_width: int
    codebook_sha256: str
    preprocess: Preprocess

    @cached_property
    def scales(self) -> Scales:
        """The scales, with the place of each one's codes in the row of all codes."""
        return Scales(self.patch_nums)

    @property
    def grid(self) -> int:
        """Side of the finest scale, g."""
        return self.patch_nums[-1]

    @property
    def n_codes(self) -> int:
        """Number of codes of an image, L."""
        return self.scales.total

    @property
    def code_dim(self) -> int:
        """Width of the quantized features, C."""
        return self.semantic_dim + self.pixel_dim

    @classmethod
    def from_json(cls, data: object) -> TokenizerConfig:
        """Read the sizes from parsed JSON.

        Raises:
            CorruptBundleError: a field is missing or unknown, or has an impossible value.
        """
        values = checked_fields(cls, data, "config")
        _require_sizes(values, ("image_size", "codebook_size", "semantic_dim", "pixel_dim", "semantic_width"))
        weight = values["pixel_weight"]
        require(type(weight) in (int, float) and 0 < weight < 1e6, "config", f"gives pixel_weight as {weight!r}")
        lists = _as_numbers(values, ("patch_nums",))
        sides = lists["patch_nums"]
        require(sides == tuple(sorted(sides)), "config", f"gives patch_nums as {list(sides)!r}")
        _require_preprocess(values["preprocess"])
        _require_texts(values, ("variant", "codebook_sha256"))
        _require_storable(values["variant"], values["codebook_sha256"], values["codebook_size"], sides)
        return cls(**values | lists)


@dataclass(frozen=True)
class LanguageModelConfig(ABC):
    """Sizes that generators and understanders have in common.

    Args:
        width: hidden width H of the transformer.
        layers: number of its layers.
        kv_heads: key/value heads of a layer.
        head_dim: width of a head.
        patch_nums, codebook_sha256: of the paired tokenizer, as in `TokenizerConfig`.
        tokenizer_variant: name of the paired tokenizer.
        tokenizer: where its bundle is, relative to this bundle.
    """

    kind: ClassVar[str]

    width: int
    layers: int
    kv_heads: int
    head_dim: int
    patch_nums: tuple[int, ...]
    codebook_sha256: str
    tokenizer_variant: str
    tokenizer: str

    @cached_property
    def scales(self) -> Scales:
        """The scales, with the place of each one's codes in the row of all codes."""
        return Scales(self.patch_nums)

    @classmethod
    @abstractmethod
    def from_json(cls, data: object) -> LanguageModelConfig:
        """Read the sizes from parsed JSON.

        Raises:
            CorruptBundleError: a field is missing or unknown, or has an impossible value.
        """

    @abstractmethod
    def image_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Bound on the pages that one image takes.

        Args:
            page_size: tokens in a page.
        """

    @abstractmethod
    def default_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Number of pages of a pool for which the caller gives no size.

        Args:
            page_size: tokens in a page.
        """


@dataclass(frozen=True)
class GeneratorConfig(LanguageModelConfig):
    """Sizes of a text-to-image model (docs/model.md, section 4).

    Args:
        text_size: rows of the text embedding table: the vocabulary without the K image tokens.
        image_token_start: id of the first image token; text ids above the image tokens are K lower in the table.
        bos_id: id that begins every prompt.
        image_start_ids: ids that end every prompt; the last one predicts the first scale.
        max_prompt: largest number of prompt ids, BOS included, `image_start_ids` not.
        negative_prompt, preset, cfg_scale: defaults of a request.
        codebook_size: number of codebook entries K.
    """

    kind: ClassVar[str] = "generator"

    text_size: int
    image_token_start: int
    bos_id: int
    image_start_ids: tuple[int, ...]
    max_prompt: int
    negative_prompt: str
    preset: str
    cfg_scale: float
    codebook_size: int

    @property
    def n_codes(self) -> int:
        """Number of codes of an image, L."""
        return self.scales.total

    @property
    def prefix_length(self) -> int:
        """Position of image token 0, which the last image start id has; image token i has position `prefix_length` + i.

        Prompts are padded on the left to `max_prompt`, so that it does not depend on the prompt.
        """
        return self.max_prompt + len(self.image_start_ids) - 1

    def is_text(self, token_id: int) -> bool:
        """Whether a token id is in the text embedding table: before the image tokens, or after them."""
        after = self.image_token_start + self.codebook_size
        return 0 <= token_id < self.image_token_start or after <= token_id < self.text_size + self.codebook_size

    def image_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Bound on the pages that one image takes in addition to those of its prompts.

        An image has two rows, conditional and unconditional. The bound allows each a copy of its prompt's last page and one
        partly filled page.
        """
        stored = self.scales.starts[-1] - 1
        return 2 * (pages_for(stored, page_size) + 2)

    def default_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Pages for eight images with eight prompts of any length and a common negative prompt."""
        prefix = pages_for(self.prefix_length + 1, page_size)
        return DEFAULT_IMAGES * (self.image_pages(page_size) + prefix) + prefix

    @classmethod
    def from_json(cls, data: object) -> GeneratorConfig:
        """Read the sizes from parsed JSON.

        Raises:
            CorruptBundleError: a field is missing or unknown, or has an impossible value.
        """
        values = checked_fields(cls, data, "config")
        _require_sizes(values, ("width", "layers", "kv_heads", "head_dim", "text_size", "max_prompt", "codebook_size"))
        _require_sizes(values, ("image_token_start", "bos_id"), least=0)
        guidance = values["cfg_scale"]
        require(type(guidance) in (int, float) and 0 <= guidance <= 1000, "config", f"gives cfg_scale as {guidance!r}")
        lists = _as_numbers(values, ("patch_nums", "image_start_ids"))
        _require_texts(values, ("negative_prompt", "preset", "codebook_sha256", "tokenizer_variant", "tokenizer"))
        size, sides = values["codebook_size"], lists["patch_nums"]
        _require_storable(values["tokenizer_variant"], values["codebook_sha256"], size, sides)
        require(bool(values["negative_prompt"].strip()), "config", "has an empty negative_prompt")
        config = cls(**values | lists)
        ids = (config.bos_id, *config.image_start_ids)
        require(
            all(map(config.is_text, ids)), "config", f"begins prompts and images with {list(ids)}, which are not all text ids"
        )
        return config


@dataclass(frozen=True)
class ChatTemplate:
    """The tokens around the parts of a conversation. Every field is a sequence of token ids (control tokens) and texts.

    A conversation is `opening`, then for each turn `user`, the question, `assistant`, the answer and `closing`. Images come
    before the question of the first turn, each followed by `after_image`.

    Args:
        opening: begins the conversation.
        user: precedes a question and its images.
        after_image: follows an image.
        assistant: follows a question.
        closing: follows an answer.
    """

    opening: tuple[int | str, ...]
    user: tuple[int | str, ...]
    after_image: tuple[int | str, ...]
    assistant: tuple[int | str, ...]
    closing: tuple[int | str, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> ChatTemplate:
        """Read the template from parsed JSON; `where` names its place in error messages.

        Raises:
            CorruptBundleError: a field is missing or unknown, or a part is neither a token id nor text.
        """
        values = checked_fields(cls, data, where)
        for key, parts in values.items():
            usable = isinstance(parts, list) and all(type(p) is str or (type(p) is int and p >= 0) for p in parts)
            require(usable, where, f"gives {key} as {parts!r}")
        return cls(**{key: tuple(parts) for key, parts in values.items()})


@dataclass(frozen=True)
class UnderstanderConfig(LanguageModelConfig):
    """Sizes of a model that answers questions about images (docs/model.md, section 5).

    Args:
        context: largest number of tokens of a conversation, images included.
        vocabulary: number of text tokens V.
        stop_ids: tokens that end an answer.
        template: how conversations are written.
        image_tokens: feature vectors of an image, one for each token it takes.
        code_dim: width C of a feature vector.
        preprocess: how its pictures are made square; None in bundles of before it was recorded: as the tokenizer says.
    """

    kind: ClassVar[str] = "understander"

    context: int
    vocabulary: int
    stop_ids: tuple[int, ...]
    template: ChatTemplate
    image_tokens: int
    code_dim: int
    preprocess: Preprocess | None = None

    def image_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Number of pages that the tokens of one image take."""
        return pages_for(self.image_tokens, page_size)

    def default_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Pages for eight questions about an image each, with 512 tokens of text, or as many as the context allows."""
        return DEFAULT_IMAGES * pages_for(min(self.image_tokens + DEFAULT_TEXT, self.context), page_size)

    @classmethod
    def from_json(cls, data: object) -> UnderstanderConfig:
        """Read the sizes from parsed JSON.

        Raises:
            CorruptBundleError: a field is missing or unknown, or has an impossible value.
        """
        values = checked_fields(cls, {"preprocess": None, **data} if isinstance(data, Mapping) else data, "config")
        if values["preprocess"] is not None:
            _require_preprocess(values["preprocess"])
        _require_sizes(values, ("width", "layers", "kv_heads", "head_dim", "context", "vocabulary", "image_tokens", "code_dim"))
        lists = _as_numbers(values, ("patch_nums", "stop_ids"))
        _require_texts(values, ("codebook_sha256", "tokenizer_variant", "tokenizer"))
        template = ChatTemplate.from_json(values["template"], "config.template")
        parts = (*template.opening, *template.user, *template.after_image, *template.assistant, *template.closing)
        ids = [*values["stop_ids"], *(part for part in parts if isinstance(part, int))]
        require(max(ids) < values["vocabulary"], "config", f"names token {max(ids)} beyond its vocabulary")
        return cls(**values | lists | {"template": template})
