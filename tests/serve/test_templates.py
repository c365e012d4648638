"""lorakit.serve.templates: texts equal those of transformers; a template has limits of time, memory and length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from lorakit.errors import UsageError
from lorakit.serve import templates
from lorakit.serve.templates import LimitedTokenizer, TemplateProcesses
from lorakit.session.tokenizers import _FOLDER

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <\u00e9>"},
    {"role": "user", "content": "2 + 2?", "name": None},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]},
    {"role": "tool", "content": "4"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "'a' & \u00e9", "parameters": {}}}]

ALL_OF_IT = """
{%- set ns = namespace(count=0, first=none) %}
{% for message in messages %}
    {% if message.name is defined %}{{ 'never' }}{% endif %}
    {% if loop.index0 > 2 %}{% break %}{% endif %}
    {% set ns.count = ns.count + loop.index %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
{% endfor %}
{{ ns.count }}{{ strftime_now('%Y') }}{{ tools | tojson(indent=2) }}{{ dict(a=1, b='\u00e9') | tojson }}
{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ documents }}{{ add_generation_prompt }}{{ enable_thinking }}
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    with contextlib.closing(TemplateProcesses()) as processes:
        yield processes


def test_texts_and_tokens_equal_those_of_transformers(processes: TemplateProcesses, tiny_tokenizer: Any) -> None:
    limited = LimitedTokenizer(tiny_tokenizer, processes)
    named = [path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.jinja"))]
    assert len(named) >= 4
    for template in [tiny_tokenizer.chat_template, *named, ALL_OF_IT]:
        tiny_tokenizer.chat_template = template
        for tools in (None, TOOLS) if template == ALL_OF_IT else (None,):
            given: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "enable_thinking": False}
            turns = CHAT if template == ALL_OF_IT else CHAT[:2]
            text = tiny_tokenizer.apply_chat_template(turns, tokenize=False, **given)
            assert limited.apply_chat_template(turns, tokenize=False, **given) == text
            ids = tiny_tokenizer.apply_chat_template(turns, **given)["input_ids"]
            assert limited.apply_chat_template(turns, **given)["input_ids"] == ids


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 10**10 }}", "takes more than"),
        ("{{ 'a' | center(10**10) }}", "takes more than"),
        ("{% set ns = namespace(x='aa') %}{% for _ in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "MiB"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than"),
        ("{{ range(9999) | join('a' * 999) }}", "more than 8,388,608 characters"),
        ("{{ raise_exception('no' * 999) }}", "nono"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "underscore"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_limits_and_errors(
    processes: TemplateProcesses, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0)
    with contextlib.closing(TemplateProcesses()) as limited, pytest.raises(UsageError, match=said) as caught:
        limited.render(template, {})
    assert len(str(caught.value)) <= templates.MOST_ERROR
    assert processes.render("{{ a }}", {"a": "\u00e9"}) == "\u00e9"
