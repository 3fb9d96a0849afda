from __future__ import annotations

import psutil
import pytest

from tokenflow_export.language_model import template_rendering as module
from tokenflow_export.language_model.template_rendering import RenderingError, render

CONVERSATIONS = [[{"role": "user", "content": "What?"}], [{"role": "user", "content": "Ünd \ud800\n"}]]
LOOP = "{% for i in range(99999) %}"


def test_conversations_are_rendered_as_transformers_does() -> None:
    blocks = "{% for m in messages %}\n  {% break %}\n{% endfor %}\n"
    source = blocks + "{{ bos_token }}{{ eos_token }}|{{ messages[0].content }}|{{ tools }}"
    assert render(source, CONVERSATIONS, {"bos_token": "<s>"}) == ["<s>|What?|None", "<s>|Ünd \ud800\n|None"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' | center(10**10) }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_memory_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, memory = [], module._memory
    monkeypatch.setattr(module, "_memory", lambda process_id: seen.append(memory(process_id)) or seen[-1])
    monkeypatch.setattr(module, "MEGABYTES", 100)
    with pytest.raises(RenderingError, match="takes more than 100 MB of memory"):
        render(source, CONVERSATIONS, {})
    assert 1e8 < max(seen) < 1e9


@pytest.mark.parametrize(
    "source",
    [
        f"{LOOP}{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
        "{{ 10 ** (10 ** (10 * messages | length)) }}",  # one operation, during which no other Python code runs
    ],
)
def test_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with pytest.raises(RenderingError, match=r"takes more than 0\.3 s"):
        render(source, CONVERSATIONS, {})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**6 }}", "writes more than 100000 characters"),
        ("{{ raise_exception('a' * 10**6) }}", "^a{300}$"),
        ("{{ [0] * 10**18 }}", "^MemoryError$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_fails_is_named(source: str, words: str) -> None:
    with pytest.raises(RenderingError, match=words):
        render(source, CONVERSATIONS, {})


def test_a_process_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROGRAM", "import os; os.abort()")
    with pytest.raises(RenderingError, match="its process failed"):
        render("", CONVERSATIONS, {})


def test_an_interrupt_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def interrupt(process_id: int) -> int:
        seen.append(process_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_memory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render(LOOP + "{% endfor %}", CONVERSATIONS, {})
    assert not psutil.pid_exists(seen[0])
