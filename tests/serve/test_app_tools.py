"""lorakit.serve.app: tools and their calls, through OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Running

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ASKED = [{"role": "user", "content": "2+2"}]
SAID = 'I add.<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call>'
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"


def test_calls_of_tools(monkeypatch: pytest.MonkeyPatch, client: Any, running: Running) -> None:
    """The model says a call: its tokens are chosen here."""
    from lorakit.generate import Sampler

    served = running.service.find("one")
    served.tokenizer.chat_template = WITH_TOOLS + served.tokenizer.chat_template
    said = [*served.encode_text(SAID), 2]
    monkeypatch.setattr(Sampler, "pick", lambda self, logits: _next(self, said))
    given = {"model": "one", "messages": ASKED, "tools": TOOLS}
    (choice,) = client.chat.completions.create(**given).choices
    (call,) = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason) == ("I add.", "tool_calls")
    assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": 2, "b": 2}
    parts = [part.choices[0] for part in client.chat.completions.create(**given, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == "I add."
    (streamed,) = [one for part in parts for one in part.delta.tool_calls or []]
    assert (
        streamed.index == 0
        and streamed.function.model_dump() == call.function.model_dump()
        and parts[-1].finish_reason == "tool_calls"
    )
    none = client.chat.completions.create(**given, tool_choice="none").choices[0]
    assert none.message.content == SAID and none.message.tool_calls is None
    answered = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    more = client.chat.completions.create(model="one", messages=answered, max_tokens=2)
    assert more.usage.prompt_tokens > len(served.encode_chat(ASKED))


def _next(sampler: Any, tokens: list[int]) -> int:
    sampler.at = getattr(sampler, "at", -1) + 1
    token: int = tokens[sampler.at]
    return token


@pytest.mark.parametrize("strict", [True, False, None])
def test_strict_of_a_tool_is_accepted_and_not_part_of_the_prompt(
    client: Any, running: Running, strict: bool | None
) -> None:
    """The model was trained on functions without this field, so it reads them as they are without it."""
    tokenizer = running.service.find("one").tokenizer
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + tokenizer.chat_template
    given = {"model": "one", "messages": ASKED, "max_tokens": 2, "extra_body": {"return_token_ids": True}}
    without = client.chat.completions.create(**given, tools=TOOLS)
    function = {"name": "add", "parameters": {"type": "object"}, "strict": strict}
    found = client.chat.completions.create(**given, tools=[{"type": "function", "function": function}])
    assert found.prompt_token_ids == without.prompt_token_ids
    assert '"add"' in tokenizer.decode(found.prompt_token_ids)
