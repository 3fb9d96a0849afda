from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.mini_understander import byte_fallback_tokenizer, byte_level_tokenizer
from tokenflow_export.language_model.chat_template import CHATML_SYSTEM, VICUNA_SYSTEM, chat_template, stop_ids
from tokenflow_sdk.errors import CheckpointError

QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
VICUNA = """\
{{ bos_token }}Be brief. {% for m in messages %}\
{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def write(directory: Path, template: object, name: str = "tokenizer_config.json") -> None:
    if name.endswith(".jinja"):
        (directory / name).write_text(str(template))
    else:
        (directory / name).write_text(json.dumps({"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}))


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (None, (258, f"system\n{CHATML_SYSTEM}", 259, "\n")),
        (QWEN, (258, "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", 259, "\n")),
        (QWEN.replace("You are Qwen, created", "Be brief,\nand kind, created"),) * 2,
        (QWEN.replace("{%- else", "{%- elif false"), ()),
        ([{"name": "tools", "template": LLAMA2}, {"name": "default", "template": QWEN}],) * 2,
    ],
)
def test_the_system_prompt_is_the_directorys(template: object, opening: object, tmp_path: Path) -> None:
    if template is not None:
        write(tmp_path, template)
    found = chat_template(byte_level_tokenizer(), tmp_path)
    if opening is not template:
        assert found.opening == opening
    assert found.assistant == (259, "\n", 258, "assistant\n")


def test_vicunas_template_may_be_written_down(tmp_path: Path) -> None:
    tokenizer = byte_fallback_tokenizer()
    assert chat_template(tokenizer, tmp_path).opening == (1, f"{VICUNA_SYSTEM} ")
    write(tmp_path, VICUNA)
    assert chat_template(tokenizer, tmp_path).opening == (1, "Be brief. ")
    write(tmp_path, VICUNA.replace("{{ bos_token }}", ""))
    assert chat_template(tokenizer, tmp_path).opening == (1, "Be brief. ")


def test_the_file_of_its_own_comes_first(tmp_path: Path) -> None:
    write(tmp_path, LLAMA2)
    write(tmp_path, QWEN, "chat_template.jinja")
    assert "created by Alibaba" in str(chat_template(byte_level_tokenizer(), tmp_path).opening)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LLAMA2, r"writes a conversation as '\[INST\] What\?"),
        (QWEN.replace("'\\n' + message.content", "message.content"), "writes a conversation as"),
        (QWEN.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>' }}"), "writes a conversation as"),
        (QWEN.replace("You are Qwen", "<|endoftext|>You are Qwen"), "writes a conversation as"),
        ("{{ messages", "cannot be rendered"),
        ("{{ raise_exception('only tools') }}", "cannot be rendered: only tools"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
        ("{{ messages.append(1) }}", "cannot be rendered"),
        (7, "chat_template that is no text"),
        ([{"name": "tools", "template": QWEN}], "chat_template that is no text"),
    ],
)
def test_other_templates_are_refused(template: object, words: str, tmp_path: Path) -> None:
    write(tmp_path, template)
    with pytest.raises(CheckpointError, match=words):
        chat_template(byte_level_tokenizer(), tmp_path)


def test_vicunas_conversations_begin_with_bos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    with pytest.raises(CheckpointError, match="adds no BOS"):
        chat_template(byte_fallback_tokenizer(), tmp_path)


@pytest.mark.parametrize("value", [True, "259", -1, 300, 1.5, [[1]], [1, True]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_stop_tokens_are_tokens(name: str, value: object, tmp_path: Path) -> None:
    template = chat_template(byte_level_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value if name != "config.json" else None}))
    with pytest.raises(CheckpointError, match=f"{name} gives eos_token_id as"):
        stop_ids(template, {"eos_token_id": value} if name == "config.json" else {}, tmp_path, 300)
