"""The chat templates of lorakit: their text against independent templates, their marks against the generation prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Conversation, Message
from lorakit.data.chat import conversation_tokens
from lorakit.errors import ConfigError
from lorakit.session.tokenizers import template_names, use_template

from ..conftest import CHAT_TEMPLATE

CALL = {"function": {"name": "lookup_tide", "arguments": {"harbour": "Zeebrugge"}}}
TOOL = {"type": "function", "function": {"name": "lookup_tide", "description": "Tells the tide.", "parameters": {}}}
PLAIN = Conversation(
    (
        Message("user", "hello"),
        Message("assistant", "a"),
        Message("user", "what is two plus two?"),
        Message("assistant", "It is four. 🎉"),
    )
)
SYSTEM = Message("system", "Be brief.")
MARKERS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "plain": [],
}


@pytest.fixture
def named(make_tiny_tokenizer: Callable[[], Any]) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        tokenizer = make_tiny_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", *MARKERS[name]]})
        use_template(tokenizer, name, [])
        return tokenizer

    return make


def shown(tokenizer: Any, record: Conversation, **options: Any) -> str:
    text = tokenizer.apply_chat_template(record.as_dicts(), tools=list(record.tools) or None, tokenize=False, **options)
    return str(text)


def test_all_are_tested_and_documented() -> None:
    assert template_names() == sorted(MARKERS)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert (
        sorted(re.findall(r"^\| `(\w+)` \|", page.partition("by name\n")[2].partition("## ")[0], re.M))
        == template_names()
    )


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_the_text_is_that_of_the_models_template(named: Callable[[str], Any], name: str) -> None:
    trl = pytest.importorskip("trl")
    tokenizer = named(name)
    tokenizer.bos_token = "<|endoftext|>"
    text = shown(tokenizer, PLAIN), shown(tokenizer, PLAIN, add_generation_prompt=True)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    assert text == (shown(tokenizer, PLAIN), shown(tokenizer, PLAIN, add_generation_prompt=True))


def test_chatml_is_chatml(named: Callable[[str], Any]) -> None:
    tokenizer, record = named("chatml"), Conversation((SYSTEM, *PLAIN.messages))
    text = shown(tokenizer, record), shown(tokenizer, record, add_generation_prompt=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert text == (shown(tokenizer, record), shown(tokenizer, record, add_generation_prompt=True))


@pytest.mark.parametrize("name", sorted(MARKERS))
def test_marks_are_what_follows_the_generation_prompt(named: Callable[[str], Any], name: str) -> None:
    tokenizer = named(name)
    for record in (PLAIN, Conversation((SYSTEM, *PLAIN.messages))):
        marked = conversation_tokens(record, tokenizer)
        use_template(tokenizer, name, [])
        tokenizer.chat_template = re.sub(r"\{%- (end)?generation -%\}", "", tokenizer.chat_template)
        located = conversation_tokens(record, tokenizer)
        assert located.ids == marked.ids
        rest = [k for k, (a, b) in enumerate(zip(marked.trained, located.trained, strict=True)) if a != b]
        assert not tokenizer.decode([marked.ids[k] for k in rest]).strip()  # blank lines between turns
        assert marked.ended
        assert located.untrained_turns == 0
        use_template(tokenizer, name, [])


def test_chatml_renders_tools_calls_and_reasoning(named: Callable[[str], Any]) -> None:
    tokenizer = named("chatml")
    messages = (
        Message("user", "hello"),
        Message("assistant", "Let me see.", {"tool_calls": [CALL, CALL], "reasoning_content": "It asks."}),
        Message("tool", "high", {"name": "lookup_tide"}),
        Message("assistant", "It is high."),
    )
    for first in ((), (SYSTEM,)):
        record = Conversation((*first, *messages), tools=(TOOL,))
        result = conversation_tokens(record, tokenizer)
        said = tokenizer.decode([token for token, mark in zip(result.ids, result.trained, strict=True) if mark])
        call = '<tool_call>\n{"name": "lookup_tide", "arguments": {"harbour": "Zeebrugge"}}\n</tool_call>'
        assert said == (
            f"<think>\nIt asks.\n</think>\n\nLet me see.\n{call}\n{call}<|im_end|>\nIt is high.<|im_end|>\n"
        )
        assert '"description": "Tells the tide."' in shown(tokenizer, record)


@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_missing_tokens_are_named(make_tiny_tokenizer: Callable[[], Any], name: str) -> None:
    tokenizer = make_tiny_tokenizer()
    with pytest.raises(ConfigError, match="--new-tokens") as found:
        use_template(tokenizer, name, MARKERS[name][:1])
    assert found.value.field == "chat_template"
    assert all((marker in str(found.value)) == (marker != MARKERS[name][0]) for marker in MARKERS[name])
    assert tokenizer.chat_template == CHAT_TEMPLATE
    use_template(tokenizer, name, MARKERS[name])


def test_plain_needs_an_end_of_text(make_tiny_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text"):
        use_template(tokenizer, "plain", [])


def test_an_unknown_name(make_tiny_tokenizer: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean chatml") as found:
        use_template(make_tiny_tokenizer(), "chatlm", [])
    assert found.value.what == "chatlm"
    (tmp_path / "own.jinja").write_text("{{ messages }}", encoding="utf-8")
    tokenizer = make_tiny_tokenizer()
    use_template(tokenizer, str(tmp_path / "own.jinja"), [])
    assert tokenizer.chat_template == "{{ messages }}"
