"""What a bundle says about itself, as frozen, validated dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.tfc import Header

__all__ = [
    "ChatTemplate",
    "FileEntry",
    "GeneratorConfig",
    "GraphEntry",
    "TensorSpec",
    "TokenizerConfig",
    "UnderstanderConfig",
]

_REBUILD = "Export the bundle again with `python -m export`, or fetch it again."
DType = Literal["uint8", "int32", "int64", "float16", "float32"]


def _checked(cls: type, data: object, where: str) -> dict[str, Any]:
    """`data` as keyword arguments of dataclass `cls`: exactly its fields, no more and no fewer."""
    if not isinstance(data, Mapping):
        raise CorruptBundleError(f"bundle.json: {where} is not an object.", _REBUILD)
    names = {field.name for field in fields(cls)}
    wrong = [f"unknown {key!r}" for key in data if key not in names] + [f"no {key!r}" for key in names - set(data)]
    if wrong:
        raise CorruptBundleError(f"bundle.json: {where} has {', '.join(wrong)}.", _REBUILD)
    return dict(data)


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise CorruptBundleError(f"bundle.json: {where} {what}.", _REBUILD)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A string in `shape` names a dimension that varies, as `batch` does."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> TensorSpec:
        values = _checked(cls, data, where)
        _require(isinstance(values["name"], str), where, "has no name")
        _require(values["dtype"] in get_args(DType), where, f"has the unknown dtype {values['dtype']!r}")
        shape = values["shape"]
        _require(isinstance(shape, list) and all(type(d) in (int, str) for d in shape), where, "has no usable shape")
        return cls(values["name"], values["dtype"], tuple(shape))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle, by plain name (never a path), with its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str

    @classmethod
    def from_json(cls, data: object, where: str) -> FileEntry:
        values = _checked(cls, data, where)
        name, size, digest = values["name"], values["size"], values["sha256"]
        plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        _require(plain, where, f"names the file {name!r}, which is not a plain file name")
        _require(type(size) is int and size >= 0, where, f"gives the size {size!r}")
        _require(isinstance(digest, str) and len(digest) == 64, where, "gives no SHA-256")
        return cls(name, size, digest)


@dataclass(frozen=True)
class GraphEntry:
    """One ONNX graph: its files (the `.onnx` first, then external data) and its inputs and outputs."""

    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> GraphEntry:
        values = _checked(cls, data, where)
        for key, value in values.items():
            _require(isinstance(value, list) and len(value) > 0, where, f"lists no {key}")
        return cls(
            tuple(FileEntry.from_json(item, f"{where}.files") for item in values["files"]),
            tuple(TensorSpec.from_json(item, f"{where}.inputs") for item in values["inputs"]),
            tuple(TensorSpec.from_json(item, f"{where}.outputs") for item in values["outputs"]),
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer bundle (spec section 1).

    `image_size` is in pixels; `patch_nums` are the sides of the scales in cells, coarse to fine; `semantic_width` is the
    width of the teacher-like features; `codebook_sha256` is over the float32 little-endian codebooks as released
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

    @property
    def grid(self) -> int:
        """Side of the finest scale."""
        return self.patch_nums[-1]

    @property
    def n_codes(self) -> int:
        """Codes of a whole picture."""
        return sum(side * side for side in self.patch_nums)

    @property
    def code_dim(self) -> int:
        """Width of the quantized feature."""
        return self.semantic_dim + self.pixel_dim

    @classmethod
    def from_json(cls, data: object) -> TokenizerConfig:
        where = "config"
        values = _checked(cls, data, where)
        for key in ("image_size", "codebook_size", "semantic_dim", "pixel_dim", "semantic_width"):
            _require(type(values[key]) is int and 0 < values[key] < 2**31, where, f"gives {key} as {values[key]!r}")
        weight = values["pixel_weight"]
        _require(type(weight) in (int, float) and 0 < weight < 1e6, where, f"gives pixel_weight as {weight!r}")
        sides = values["patch_nums"]
        ascending = isinstance(sides, list) and bool(sides) and all(type(s) is int for s in sides) and sides == sorted(sides)
        _require(ascending, where, f"gives patch_nums as {sides!r}")
        _require(values["preprocess"] in ("crop", "squash", "pad"), where, f"asks to {values['preprocess']!r} pictures")
        for key in ("variant", "codebook_sha256"):
            _require(isinstance(values[key], str), where, f"has no {key}")
        header = Header(values["variant"], values["codebook_sha256"][:16], values["codebook_size"], tuple(sides))
        _require(header.problem() is None, where, f"claims {header.problem()}")
        return cls(**values | {"patch_nums": tuple(sides)})


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a text-to-image bundle (spec section 4).

    The transformer: `width`, `layers`, `kv_heads`, `head_dim`. Text: `text_size` rows of the text embedding table, which is the
    vocabulary without the image codes that begin at `image_token_start`; `bos_id`; `image_start_ids`, usually one; prompts
    of at most `max_prompt` ids, BOS included. For requests that name none: `negative_prompt`, `preset`, `cfg_scale`.
    Pictures: as in `TokenizerConfig`, for the tokenizer `tokenizer_variant` with codebook `codebook_sha256`, expected at the
    path `tokenizer`, relative to the bundle.
    """

    kind: ClassVar[str] = "generator"

    width: int
    layers: int
    kv_heads: int
    head_dim: int
    text_size: int
    image_token_start: int
    bos_id: int
    image_start_ids: tuple[int, ...]
    max_prompt: int
    negative_prompt: str
    preset: str
    cfg_scale: float
    patch_nums: tuple[int, ...]
    codebook_size: int
    codebook_sha256: str
    tokenizer_variant: str
    tokenizer: str

    @property
    def n_codes(self) -> int:
        """Codes of a whole picture."""
        return sum(side * side for side in self.patch_nums)

    @property
    def prefix_length(self) -> int:
        """Positions before the first image token's input: the longest prompt and the image start ids but the last."""
        return self.max_prompt + len(self.image_start_ids) - 1

    def place(self, scale: int) -> int:
        """The number of image tokens before a scale."""
        return sum(side * side for side in self.patch_nums[:scale])

    @classmethod
    def from_json(cls, data: object) -> GeneratorConfig:
        where = "config"
        values = _checked(cls, data, where)
        sizes = ("width", "layers", "kv_heads", "head_dim", "text_size", "max_prompt", "codebook_size")
        for key in (*sizes, "image_token_start", "bos_id"):
            _require(
                type(values[key]) is int and int(key in sizes) <= values[key] < 2**31, where, f"gives {key} as {values[key]!r}"
            )
        guidance = values["cfg_scale"]
        _require(type(guidance) in (int, float) and 0 <= guidance <= 1000, where, f"gives cfg_scale as {guidance!r}")
        for key in ("patch_nums", "image_start_ids"):
            numbers = values[key]
            whole = isinstance(numbers, list) and bool(numbers) and all(type(n) is int and n >= 0 for n in numbers)
            _require(whole, where, f"gives {key} as {numbers!r}")
        for key in ("negative_prompt", "preset", "codebook_sha256", "tokenizer_variant", "tokenizer"):
            _require(isinstance(values[key], str), where, f"has no {key}")
        lists = {key: tuple(values[key]) for key in ("patch_nums", "image_start_ids")}
        header = Header(
            values["tokenizer_variant"], values["codebook_sha256"][:16], values["codebook_size"], lists["patch_nums"]
        )
        _require(header.problem() is None, where, f"claims {header.problem()}")
        return cls(**values | lists)


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written: parts are token ids (control tokens) and text.

    `opening` begins it, `user` comes before a question, `after_image` after each of its pictures, which come first, `assistant`
    between question and answer, and `closing` after an answer.
    """

    opening: tuple[int | str, ...]
    user: tuple[int | str, ...]
    after_image: tuple[int | str, ...]
    assistant: tuple[int | str, ...]
    closing: tuple[int | str, ...]

    @classmethod
    def from_json(cls, data: object, where: str) -> ChatTemplate:
        values = _checked(cls, data, where)
        for key, parts in values.items():
            usable = isinstance(parts, list) and all(type(p) is str or (type(p) is int and p >= 0) for p in parts)
            _require(usable, where, f"gives {key} as {parts!r}")
        return cls(**{key: tuple(parts) for key, parts in values.items()})


@dataclass(frozen=True)
class UnderstanderConfig:
    """Sizes of a bundle that answers questions about pictures (spec section 5).

    The transformer: `width`, `layers`, `kv_heads`, `head_dim`, trained for up to `context` tokens. Text: `vocabulary` tokens,
    of which `stop_ids` end an answer; `template`. Pictures: `image_tokens` features of `code_dim` values each, from the
    tokenizer `tokenizer_variant` with these `patch_nums` and codebook `codebook_sha256`, expected at the path `tokenizer`,
    relative to the bundle.
    """

    kind: ClassVar[str] = "understander"

    width: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int
    vocabulary: int
    stop_ids: tuple[int, ...]
    template: ChatTemplate
    image_tokens: int
    code_dim: int
    patch_nums: tuple[int, ...]
    codebook_sha256: str
    tokenizer_variant: str
    tokenizer: str

    @classmethod
    def from_json(cls, data: object) -> UnderstanderConfig:
        where = "config"
        values = _checked(cls, data, where)
        for key in ("width", "layers", "kv_heads", "head_dim", "context", "vocabulary", "image_tokens", "code_dim"):
            _require(type(values[key]) is int and 0 < values[key] < 2**31, where, f"gives {key} as {values[key]!r}")
        for key in ("patch_nums", "stop_ids"):
            numbers = values[key]
            whole = isinstance(numbers, list) and bool(numbers) and all(type(n) is int and n >= 0 for n in numbers)
            _require(whole, where, f"gives {key} as {numbers!r}")
        for key in ("codebook_sha256", "tokenizer_variant", "tokenizer"):
            _require(isinstance(values[key], str), where, f"has no {key}")
        template = ChatTemplate.from_json(values["template"], f"{where}.template")
        parts = (*template.opening, *template.user, *template.after_image, *template.assistant, *template.closing)
        ids = [*values["stop_ids"], *(part for part in parts if isinstance(part, int))]
        _require(max(ids) < values["vocabulary"], where, f"names token {max(ids)} beyond its vocabulary")
        lists = {key: tuple(values[key]) for key in ("patch_nums", "stop_ids")}
        return cls(**values | lists | {"template": template})
