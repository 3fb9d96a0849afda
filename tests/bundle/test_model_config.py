from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.support.fake_graphs import GENERATOR, UNDERSTANDER
from tests.support.fakes import CONFIG
from tokenflow_sdk.bundle.model_config import (
    PAGE_SIZE,
    ChatTemplate,
    GeneratorConfig,
    TokenizerConfig,
    UnderstanderConfig,
    pages_for,
)
from tokenflow_sdk.errors import CorruptBundleError

TEMPLATE = ChatTemplate((1, "<a>"), ("user ",), ("\n",), (2,), (3, "\n"))
CONFIGS: dict[type, Any] = {
    TokenizerConfig: CONFIG,
    GeneratorConfig: GENERATOR,
    UnderstanderConfig: replace(UNDERSTANDER, template=TEMPLATE, stop_ids=(6, 7)),
}
SIZES = {
    TokenizerConfig: ("image_size", "codebook_size", "semantic_dim", "pixel_dim", "semantic_width"),
    GeneratorConfig: ("width", "layers", "kv_heads", "head_dim", "text_size", "max_prompt", "codebook_size"),
    UnderstanderConfig: ("width", "layers", "kv_heads", "head_dim", "context", "vocabulary", "image_tokens", "code_dim"),
}
FROM_ZERO = {TokenizerConfig: (), GeneratorConfig: ("image_token_start", "bos_id"), UnderstanderConfig: ()}
LISTS = {
    TokenizerConfig: ("patch_nums",),
    GeneratorConfig: ("patch_nums", "image_start_ids"),
    UnderstanderConfig: ("patch_nums", "stop_ids"),
}
TEXTS = {
    TokenizerConfig: ("variant", "codebook_sha256"),
    GeneratorConfig: ("negative_prompt", "preset", "codebook_sha256", "tokenizer_variant", "tokenizer"),
    UnderstanderConfig: ("codebook_sha256", "tokenizer_variant", "tokenizer"),
}
OTHERS = {
    TokenizerConfig: {"pixel_weight", "preprocess"},
    GeneratorConfig: {"cfg_scale"},
    UnderstanderConfig: {"template", "preprocess"},
}


def as_json(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return found


def pairs(table: Mapping[type, tuple[str, ...]]) -> list[tuple[type, str]]:
    return [(kind, key) for kind, keys in table.items() for key in keys]


def refused(kind: Any, changes: Mapping[str, object], words: str) -> None:
    with pytest.raises(CorruptBundleError, match=words):
        kind.from_json(as_json(CONFIGS[kind]) | changes)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_read_as_it_is_written(kind: Any) -> None:
    assert kind.from_json(as_json(CONFIGS[kind])) == CONFIGS[kind]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_tested_here(kind: type) -> None:
    tested = {*SIZES[kind], *FROM_ZERO[kind], *LISTS[kind], *TEXTS[kind], *OTHERS[kind]}
    assert tested == set(as_json(CONFIGS[kind]))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (kind, key)
        for kind, config in CONFIGS.items()
        for key in as_json(config)
        if (kind, key) != (UnderstanderConfig, "preprocess")
    ],
)
def test_a_missing_field_is_named(kind: Any, key: str) -> None:
    data = as_json(CONFIGS[kind])
    del data[key]
    with pytest.raises(CorruptBundleError, match=rf"config has no '{key}'\."):
        kind.from_json(data)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_unknown_field_is_named(kind: Any) -> None:
    refused(kind, {"surprise": 1}, r"config has unknown 'surprise'\.")
    with pytest.raises(CorruptBundleError, match="config is not an object"):
        kind.from_json([])


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, "1", None, True, [1]])
@pytest.mark.parametrize(("kind", "key"), pairs(SIZES))
def test_a_size_is_a_whole_number_above_0(kind: Any, key: str, value: object) -> None:
    refused(kind, {key: value}, f"config gives {key} as")


@pytest.mark.parametrize("value", [-1, 2**31, 1.0, "1", None, False])
@pytest.mark.parametrize(("kind", "key"), pairs(FROM_ZERO))
def test_an_id_is_a_whole_number_from_0(kind: Any, key: str, value: object) -> None:
    refused(kind, {key: value}, f"config gives {key} as")


@pytest.mark.parametrize("changes", [{"bos_id": 20}, {"bos_id": 69}, {"image_start_ids": [5, 74]}, {"image_token_start": 0}])
def test_prompts_and_images_begin_with_text(changes: dict[str, object]) -> None:
    """Of the small generator's ids 20 .. 69 are codes, and 73 is the last."""
    refused(GeneratorConfig, changes, "begins prompts and images with")
    assert GeneratorConfig.from_json(as_json(GENERATOR) | {"bos_id": 0, "image_start_ids": [19, 73]}).bos_id == 0


@pytest.mark.parametrize("value", [[], None, 5, "12", {"a": 1}, [1, -1], [1, 2**31], [1, 2.0], [1, True], [[1]]])
@pytest.mark.parametrize(("kind", "key"), pairs(LISTS))
def test_a_list_holds_whole_numbers(kind: Any, key: str, value: object) -> None:
    refused(kind, {key: value}, f"config gives {key} as")


@pytest.mark.parametrize("value", [None, 5, ["x"], {}])
@pytest.mark.parametrize(("kind", "key"), pairs(TEXTS))
def test_a_text_is_text(kind: Any, key: str, value: object) -> None:
    refused(kind, {key: value}, f"config has no {key}")


@pytest.mark.parametrize("value", [0, -1.0, 1e6, float("nan"), "1", None, True])
def test_the_weight_of_the_pixel_half_is_above_0(value: object) -> None:
    refused(TokenizerConfig, {"pixel_weight": value}, "config gives pixel_weight as")


@pytest.mark.parametrize("value", ["stretch", "", None, 5, ["crop"]])
@pytest.mark.parametrize("kind", [TokenizerConfig, UnderstanderConfig])
def test_there_are_four_ways_to_make_a_picture_square(kind: Any, value: object) -> None:
    if (kind, value) != (UnderstanderConfig, None):
        refused(kind, {"preprocess": value}, "config asks to .* pictures")
    for known in ("crop", "squash", "pad", "pad-grey"):
        assert kind.from_json(as_json(CONFIGS[kind]) | {"preprocess": known}).preprocess == known


def test_an_understander_of_before_preprocess_was_recorded_leaves_it_to_its_tokenizer() -> None:
    data = as_json(CONFIGS[UnderstanderConfig])
    del data["preprocess"]
    assert UnderstanderConfig.from_json(data).preprocess is None


def test_scales_are_ascending() -> None:
    refused(TokenizerConfig, {"patch_nums": [4, 2]}, r"config gives patch_nums as \[4, 2\]")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_nums": [1, 10**6]}, "config claims .*1000000"),
        ({"patch_nums": [0, 2]}, "config claims"),
        ({"codebook_size": 2**30}, "config claims"),
        ({"codebook_sha256": "xy"}, "config gives codebook_sha256 as"),
        ({"codebook_sha256": "AB" * 32}, "config gives codebook_sha256 as"),
    ],
)
@pytest.mark.parametrize("kind", [TokenizerConfig, GeneratorConfig])
def test_codes_fit_the_file_format(kind: Any, changes: dict[str, object], words: str) -> None:
    refused(kind, changes, words)
    refused(kind, {"variant" if kind is TokenizerConfig else "tokenizer_variant": ""}, "config claims .*variant name")


@pytest.mark.parametrize("value", [-0.5, 1000.5, float("nan"), float("inf"), "1", None, True])
def test_guidance_is_from_0_to_1000(value: object) -> None:
    refused(GeneratorConfig, {"cfg_scale": value}, "config gives cfg_scale as")
    for known in (0, 1000.0):
        assert GeneratorConfig.from_json(as_json(GENERATOR) | {"cfg_scale": known}).cfg_scale == known


def test_a_template_has_all_its_parts() -> None:
    data = as_json(TEMPLATE)
    for key in data:
        refused(
            UnderstanderConfig, {"template": {k: v for k, v in data.items() if k != key}}, f"config.template has no '{key}'"
        )
        for value in (None, "text", [None], [-1], [1.5], [True], [["x"]]):
            refused(UnderstanderConfig, {"template": data | {key: value}}, f"config.template gives {key} as")
    refused(UnderstanderConfig, {"template": []}, "config.template is not an object")
    refused(UnderstanderConfig, {"template": data | {"more": []}}, "config.template has unknown 'more'")


def test_no_token_is_beyond_the_vocabulary() -> None:
    refused(UnderstanderConfig, {"stop_ids": [1, 8]}, "config names token 8 beyond its vocabulary")
    for key in as_json(TEMPLATE):
        refused(UnderstanderConfig, {"template": as_json(TEMPLATE) | {key: ["x", 9]}}, "config names token 9 beyond")


def test_figures_of_a_tokenizer() -> None:
    config = replace(CONFIG, patch_nums=(1, 2, 4), semantic_dim=32, pixel_dim=8)
    assert (config.grid, config.n_codes, config.code_dim, config.scales.sides) == (4, 21, 40, (1, 2, 4))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 200])
def test_pages_hold_all_tokens_and_none_is_empty(tokens: int, page_size: int) -> None:
    count = pages_for(tokens, page_size)
    assert count * page_size >= tokens
    assert (count - 1) * page_size < tokens or count == 0


def test_pages_of_a_generator() -> None:
    """1 + 4 + 9 codes: the keys of two and three scales are stored, not those of the first (it is the prompt's last) or the
    last. Two rows; each copies the page where its prompt ends, and breaks into one more at most."""
    config = replace(GENERATOR, patch_nums=(1, 2, 3, 4), max_prompt=8, image_start_ids=(70, 71))
    assert (config.n_codes, config.prefix_length) == (30, 9)
    assert config.image_pages(4) == 2 * (4 + 2)
    assert config.image_pages() == config.image_pages(PAGE_SIZE) == 2 * (1 + 2)
    # Eight prompts of 8 + 2 tokens, and a negative one.
    assert config.default_pages(4) == 8 * (12 + 3) + 3
    assert config.default_pages() == 8 * (6 + 1) + 1


def test_pages_of_an_understander() -> None:
    config = replace(UNDERSTANDER, image_tokens=81, context=2000)
    assert config.image_pages(4) == 21
    assert config.image_pages() == 6
    # Eight questions of 512 tokens and an image each, or of all that the model reads.
    assert config.default_pages() == 8 * 38
    assert replace(config, context=100).default_pages() == 8 * 7


def test_released_sizes() -> None:
    """A generator of 680 codes in 256 pixels; a question about 729 features."""
    generator = replace(GENERATOR, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), max_prompt=256)
    assert generator.image_pages() == 2 * (-(-(generator.scales.starts[-1] - 1) // 16) + 2)
    assert replace(UNDERSTANDER, image_tokens=729, context=32_768).default_pages() == 8 * 78
