"""What a model of each kind says about itself in `bundle.json`: sizes, frozen and validated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from tokenflow_sdk.bundle.schema import checked_fields, require
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
"""Tokens in a page of keys and values, unless told otherwise."""
DEFAULT_IMAGES = 8
"""Images that a generator's default pool holds at once, and questions that an understander's does."""
DEFAULT_TEXT = 512
"""Tokens of a question and its answer that the default pool has room for."""


def pages_for(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that so many tokens fill, the last perhaps in part."""
    return -(-tokens // page_size)


def _require_sizes(values: dict[str, Any], names: tuple[str, ...], least: int = 1) -> None:
    for key in names:
        require(type(values[key]) is int and least <= values[key] < 2**31, "config", f"gives {key} as {values[key]!r}")


def _require_texts(values: dict[str, Any], names: tuple[str, ...]) -> None:
    for key in names:
        require(isinstance(values[key], str), "config", f"has no {key}")


def _as_numbers(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Lists of whole numbers as tuples."""
    for key in names:
        numbers = values[key]
        whole = isinstance(numbers, list) and bool(numbers) and all(type(n) is int and n >= 0 for n in numbers)
        require(whole, "config", f"gives {key} as {numbers!r}")
    return {key: tuple(values[key]) for key in names}


def _require_storable(variant: str, codebook_sha256: str, codebook_size: int, patch_nums: tuple[int, ...]) -> None:
    """Codes of this tokenizer must fit the file format."""
    problem = Header(variant, codebook_sha256[:16], codebook_size, patch_nums).problem()
    require(problem is None, "config", f"claims {problem}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer bundle (docs/model.md, sections 1 and 2).

    `image_size` is in pixels; `patch_nums` are the sides of the scales in cells, coarse to fine; `semantic_width` is the
    width of the semantic decoder's features; `codebook_sha256` is over the float32 little-endian codebooks as released
    (semantic, then pixel); `pixel_weight` is the weight of the pixel half's distance in the search; `preprocess` is how a
    picture is made square.
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
    preprocess: Literal["crop", "squash", "pad"]

    @cached_property
    def scales(self) -> Scales:
        """Where each scale's codes stand in a row of all codes."""
        return Scales(self.patch_nums)

    @property
    def grid(self) -> int:
        """Side of the finest scale."""
        return self.patch_nums[-1]

    @property
    def n_codes(self) -> int:
        """Codes of a whole picture."""
        return self.scales.total

    @property
    def code_dim(self) -> int:
        """Width of the quantized feature."""
        return self.semantic_dim + self.pixel_dim

    @classmethod
    def from_json(cls, data: object) -> TokenizerConfig:
        """Raises:
        CorruptBundleError: a field is missing, unknown or has a value that cannot be.
        """
        values = checked_fields(cls, data, "config")
        _require_sizes(values, ("image_size", "codebook_size", "semantic_dim", "pixel_dim", "semantic_width"))
        weight = values["pixel_weight"]
        require(type(weight) in (int, float) and 0 < weight < 1e6, "config", f"gives pixel_weight as {weight!r}")
        lists = _as_numbers(values, ("patch_nums",))
        sides = lists["patch_nums"]
        require(sides == tuple(sorted(sides)), "config", f"gives patch_nums as {list(sides)!r}")
        require(values["preprocess"] in ("crop", "squash", "pad"), "config", f"asks to {values['preprocess']!r} pictures")
        _require_texts(values, ("variant", "codebook_sha256"))
        _require_storable(values["variant"], values["codebook_sha256"], values["codebook_size"], sides)
        return cls(**values | lists)


@dataclass(frozen=True)
class LanguageModelConfig(ABC):
    """What the configurations of both language models share.

    The transformer: `width`, `layers`, `kv_heads`, `head_dim`. Images: `patch_nums` and `codebook_sha256` of the tokenizer
    `tokenizer_variant`, which is expected at the path `tokenizer`, relative to the bundle.
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
        """Where each scale's codes stand in a row of all codes."""
        return Scales(self.patch_nums)

    @classmethod
    @abstractmethod
    def from_json(cls, data: object) -> LanguageModelConfig:
        """Raises:
        CorruptBundleError: a field is missing, unknown or has a value that cannot be.
        """

    @abstractmethod
    def image_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Most pages that one image takes."""

    @abstractmethod
    def default_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Pages of a pool whose size nobody gave."""


@dataclass(frozen=True)
class GeneratorConfig(LanguageModelConfig):
    """Sizes of a text-to-image bundle (docs/model.md, section 4).

    Text: `text_size` rows of the text embedding table, which is the vocabulary without the image codes that begin at
    `image_token_start`; `bos_id`; `image_start_ids`, usually one; prompts of at most `max_prompt` ids, BOS included. For
    requests that name none: `negative_prompt`, `preset`, `cfg_scale`. The codebook has `codebook_size` entries.
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
        """Codes of a whole picture."""
        return self.scales.total

    @property
    def prefix_length(self) -> int:
        """Positions before the first image token's input: the longest prompt and the image start ids but the last."""
        return self.max_prompt + len(self.image_start_ids) - 1

    def image_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Most pages that one image's two rows take beyond their prefixes, with a copied page each."""
        stored = self.scales.starts[-1] - 1
        return 2 * (pages_for(stored, page_size) + 2)

    def default_pages(self, page_size: int = PAGE_SIZE) -> int:
        """A pool for eight images of eight prompts of any length, and one negative prompt."""
        prefix = pages_for(self.prefix_length + 1, page_size)
        return DEFAULT_IMAGES * (self.image_pages(page_size) + prefix) + prefix

    @classmethod
    def from_json(cls, data: object) -> GeneratorConfig:
        """Raises:
        CorruptBundleError: a field is missing, unknown or has a value that cannot be.
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
        return cls(**values | lists)


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written: parts are token ids (control tokens) and text.

    `opening` begins it, `user` comes before a question, `after_image` after each of its images, which come first, `assistant`
    between question and answer, and `closing` after an answer.
    """

    opening: tuple[int | str, ...]
    user: tuple[int | str, ...]
    after_image: tuple[int | str, ...]
    assistant: tuple[int | str, ...]
    closing: tuple[int | str, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> ChatTemplate:
        """Raises:
        CorruptBundleError: a part is neither a token id nor text.
        """
        values = checked_fields(cls, data, where)
        for key, parts in values.items():
            usable = isinstance(parts, list) and all(type(p) is str or (type(p) is int and p >= 0) for p in parts)
            require(usable, where, f"gives {key} as {parts!r}")
        return cls(**{key: tuple(parts) for key, parts in values.items()})


@dataclass(frozen=True)
class UnderstanderConfig(LanguageModelConfig):
    """Sizes of a bundle that answers questions about images (docs/model.md, section 5).

    The transformer was trained for up to `context` tokens. Text: `vocabulary` tokens, of which `stop_ids` end an answer;
    `template`. Images: `image_tokens` features of `code_dim` values each.
    """

    kind: ClassVar[str] = "understander"

    context: int
    vocabulary: int
    stop_ids: tuple[int, ...]
    template: ChatTemplate
    image_tokens: int
    code_dim: int

    def image_pages(self, page_size: int = PAGE_SIZE) -> int:
        """Pages of one image's tokens."""
        return pages_for(self.image_tokens, page_size)

    def default_pages(self, page_size: int = PAGE_SIZE) -> int:
        """A pool for eight questions about eight images."""
        return DEFAULT_IMAGES * pages_for(min(self.image_tokens + DEFAULT_TEXT, self.context), page_size)

    @classmethod
    def from_json(cls, data: object) -> UnderstanderConfig:
        """Raises:
        CorruptBundleError: a field is missing, unknown or has a value that cannot be.
        """
        values = checked_fields(cls, data, "config")
        _require_sizes(values, ("width", "layers", "kv_heads", "head_dim", "context", "vocabulary", "image_tokens", "code_dim"))
        lists = _as_numbers(values, ("patch_nums", "stop_ids"))
        _require_texts(values, ("codebook_sha256", "tokenizer_variant", "tokenizer"))
        template = ChatTemplate.from_json(values["template"], "config.template")
        parts = (*template.opening, *template.user, *template.after_image, *template.assistant, *template.closing)
        ids = [*values["stop_ids"], *(part for part in parts if isinstance(part, int))]
        require(max(ids) < values["vocabulary"], "config", f"names token {max(ids)} beyond its vocabulary")
        return cls(**values | lists | {"template": template})
