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
    served = running.service.find("one")
    served.tokenizer.chat_template = WITH_TOOLS + served.tokenizer.chat_template
    say(monkeypatch, running, SAID)
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


def say(monkeypatch: pytest.MonkeyPatch, running: Running, text: str) -> None:
    """Choose the tokens of a text and the end of the turn, instead of sampling."""
    from lorakit.generate import Sampler

    said = [*running.service.find("one").encode_text(text), 2]
    monkeypatch.setattr(Sampler, "pick", lambda self, logits: _next(self, said))


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


def test_a_function_that_is_chosen_is_called_with_arguments_of_its_schema(client: Any, running: Running) -> None:
    """A model of random weights writes valid arguments; langchain's `with_structured_output` sends these fields."""
    pytest.importorskip("llguidance")
    served = running.service.find("one")
    served.tokenizer.chat_template = WITH_TOOLS + served.tokenizer.chat_template
    number = {"$ref": "#/$defs/digit"}
    schema = {
        "type": "object",
        "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        "properties": {"a": number, "b": number},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    function = {"name": "plus", "parameters": schema, "strict": True}
    tokenizer = served.tokenizer
    spaces = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    given = {
        "model": "one",
        "messages": ASKED,
        "tools": [*TOOLS, {"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "plus"}},
        "parallel_tool_calls": False,
        "logit_bias": dict.fromkeys(map(str, spaces), -100),  # this model would write little else
        "seed": 1,
    }
    (choice,) = client.chat.completions.create(**given, max_tokens=40).choices
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, choice.message.content, choice.finish_reason) == ("plus", None, "tool_calls")
    assert set(arguments) == {"a", "b"} and all(number in range(10) for number in arguments.values())
    parts = [part.choices[0].delta for part in client.chat.completions.create(**given, max_tokens=40, stream=True)]
    (streamed,) = [one for part in parts for one in part.tool_calls or []]
    assert streamed.function.arguments == call.function.arguments and not any(part.content for part in parts)
    cut = client.chat.completions.create(**given, max_tokens=2).choices[0]
    assert cut.message.tool_calls is None and cut.message.content and cut.finish_reason == "length"
    wrong = {"name": "plus", "parameters": {"type": "fox"}}
    for change, param in [
        ({"tool_choice": {"type": "function", "function": {"name": "minus"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": wrong}]}, "tools"),
    ]:
        response = running.client.post("/v1/chat/completions", json={**given, **change})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_without_parallel_calls_the_first_one_counts(
    monkeypatch: pytest.MonkeyPatch, client: Any, running: Running
) -> None:
    served = running.service.find("one")
    served.tokenizer.chat_template = WITH_TOOLS + served.tokenizer.chat_template
    say(monkeypatch, running, '<tool_call>{"name": "one"}</tool_call><tool_call>{"name": "two"}</tool_call>')
    given = {"model": "one", "messages": ASKED, "tools": TOOLS}
    for parallel, names in {True: ["one", "two"], False: ["one"]}.items():
        message = client.chat.completions.create(**given, parallel_tool_calls=parallel).choices[0].message
        assert [call.function.name for call in message.tool_calls] == names
