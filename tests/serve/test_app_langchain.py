"""lorakit.serve.app: `ChatOpenAI` of langchain-openai gives the answers, structured answers and calls of the server."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel

from .conftest import Running
from .test_app_tools import say

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),  # of the class of a structured answer
]
openai = pytest.importorskip("openai")
langchain = pytest.importorskip("langchain_openai")
exceptions = pytest.importorskip("langchain_core.exceptions")

ASKED = [("system", "Be brief."), ("human", "What is two plus two?")]
TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}"
    "{% for message in messages %}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"
)


class Plus(BaseModel, extra="forbid"):  # this model of random weights would add fields
    """Add two digits."""

    a: Literal[1, 2, 3]
    b: Literal["x", "y"]


@pytest.fixture
def chat(running: Running) -> Any:
    """A client of the adapter `one`, whose template renders tools."""
    tokenizer = running.service.find("one").tokenizer
    tokenizer.chat_template = TOOLS + tokenizer.chat_template
    spaces = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    return langchain.ChatOpenAI(
        base_url=f"{running.url}/v1",
        api_key="none",
        model="one",
        max_tokens=40,
        seed=11,
        max_retries=0,
        logit_bias=dict.fromkeys(map(str, spaces), -100),  # it would write little else
    )


def test_answers_whole_in_parts_and_together(chat: Any, running: Running) -> None:
    whole = chat.invoke(ASKED)
    body = {
        "model": "one",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two plus two?"}],
        "max_tokens": 40,
        "seed": 11,
        "logit_bias": chat.logit_bias,
    }
    reply = running.client.post("/v1/chat/completions", json=body).json()
    assert whole.content == reply["choices"][0]["message"]["content"] != ""
    assert whole.response_metadata["model_name"] == running.id("one")
    assert whole.response_metadata["system_fingerprint"] == running.service.fingerprint
    assert whole.usage_metadata["output_tokens"] == reply["usage"]["completion_tokens"]
    parts = [*chat.stream(ASKED)]
    assert len(parts) > 2 and "".join(part.content for part in parts) == whole.content
    others = ["Hello", "And then?", "def add"]
    assert [one.content for one in chat.batch(others)] == [chat.invoke(text).content for text in others]


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_follows_its_schema(chat: Any, method: str) -> None:
    found = chat.with_structured_output(Plus, method=method).invoke(ASKED)
    assert isinstance(found, Plus)
    raw = chat.with_structured_output(Plus, method=method, include_raw=True).invoke(ASKED)
    assert raw["parsed"] == found and raw["parsing_error"] is None
    parts = [*chat.with_structured_output(Plus, method=method).stream(ASKED)]
    assert parts[-1] == found


def test_json_mode(monkeypatch: pytest.MonkeyPatch, chat: Any, running: Running) -> None:
    say(monkeypatch, running, '{"a": 2, "b": "y"}')
    assert chat.with_structured_output(Plus, method="json_mode").invoke(ASKED) == Plus(a=2, b="y")


def test_calls_of_tools_are_answered(monkeypatch: pytest.MonkeyPatch, chat: Any, running: Running) -> None:
    forced = chat.bind_tools([Plus], tool_choice="Plus").invoke(ASKED)
    assert [call["name"] for call in forced.tool_calls] == ["Plus"] and Plus(**forced.tool_calls[0]["args"])
    bound = chat.bind_tools([Plus], max_tokens=70)
    with monkeypatch.context() as patches:
        say(patches, running, 'I add.<tool_call>{"name": "Plus", "arguments": {"a": 2, "b": "x"}}</tool_call>')
        whole = bound.invoke(ASKED)
        first, *rest = bound.stream(ASKED)
    for part in rest:
        first += part
    for message in (whole, first):
        (call,) = message.tool_calls
        assert (message.content, call["name"], call["args"]) == ("I add.", "Plus", {"a": 2, "b": "x"})
    (call,) = whole.tool_calls
    talk = [*ASKED, whole, {"role": "tool", "content": "4", "tool_call_id": call["id"]}]
    answer = bound.invoke(talk, max_tokens=4)
    assert answer.usage_metadata["input_tokens"] > bound.invoke(ASKED).usage_metadata["input_tokens"]
    assert answer.content


def test_errors_have_their_classes(chat: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat.bind(model="three").invoke(ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(exceptions.ContextOverflowError) as long:
        chat.invoke("word " * 400)
    assert long.value.code == "context_length_exceeded"
