"""Render conversations with a chat template, and check that the template renders all that is to be trained.

A template may omit tools, calls, reasoning or content without saying so. A short answer occurs in other text too, so
the check is also made on the same conversation in words that occur nowhere else.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from lorakit.data.records import REASONING, Conversation, Message, location
from lorakit.data.tokens import Tokenizer
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import DataError


def rendered(record: Conversation, tokenizer: Tokenizer, count: int | None = None, **options: bool) -> str:
    """Render the first `count` messages of a conversation, or all of them."""
    apply = partial(tokenizer.apply_chat_template, tokenize=False)
    return str(_applied(apply, record, record.as_dicts()[:count], **options))


def with_marks(record: Conversation, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and return its text with the offsets of what the template marks; see `marked_text`."""
    from lorakit.hub.tokenizer_hashes import marked_text

    text, spans = _applied(partial(marked_text, tokenizer), record, record.as_dicts())
    return text, spans


def _applied(apply: Callable[..., Any], record: Conversation, messages: list[JsonObject], **options: bool) -> Any:
    """Apply the chat template with a conversation's tools and options; a DataError if it rejects the messages."""
    try:
        return apply(messages, tools=list(record.tools) or None, **record.options, **options)
    except Exception as cause:  # a template is untrusted code and may raise anything
        raise row_error(record, f"the chat template rejects this conversation ({cause}).") from cause


def row_error(record: Conversation, problem: str) -> DataError:
    """Return an error about a conversation, with its location."""
    return DataError(f"{location(record)}: {problem}", where=location(record))


def template_name(tokenizer: Tokenizer) -> str:
    """Return how to name a tokenizer's chat template in a message."""
    name = getattr(tokenizer, "name_or_path", "")
    return f"the chat template of {name}" if name else "the model's chat template"


def _calls(turn: Message) -> list[JsonObject]:
    """Return the functions that a turn calls, each with its name and arguments."""
    calls: list[Any] = list(turn.fields.get("tool_calls") or ())  # type: ignore[arg-type]
    return [call["function"] for call in calls]


def _arguments(turn: Message) -> list[JsonValue]:
    """Return the values of the arguments of a turn's calls."""
    given = [call.get("arguments") for call in _calls(turn)]
    return [value for arguments in given if isinstance(arguments, dict) for value in arguments.values()]


def check_rendered(record: Conversation, tokenizer: Tokenizer, text: str) -> None:
    """Check that a rendered conversation contains its tools and the content, calls and reasoning of assistant turns.

    A template may leave the reasoning out of earlier turns, but must render it while the turn is the last one.
    """
    tools = [tool.get("function", tool) for tool in record.tools]
    names = Counter(str(tool.get("name")) for tool in tools if isinstance(tool, dict))
    if not contains(text, [*names, *(tool.get("description") for tool in tools if isinstance(tool, dict))]):
        raise _omitted("tools of the conversation", record, tokenizer)
    for index, turn in enumerate(record.messages):
        if turn.role != "assistant":
            continue
        names.update(str(call["name"]) for call in _calls(turn))
        if any(text.count(name) < count for name, count in names.items()) or not contains(text, _arguments(turn)):
            raise _omitted("tool calls of an assistant turn", record, tokenizer)
        content, reasoning = turn.content or "", [turn.fields.get(name) for name in REASONING]
        if not contains(text, [content.rpartition("</think>")[2]]):
            raise _omitted("content of an assistant turn", record, tokenizer)
        said = [content, *reasoning]
        if not contains(text, said) and not contains(rendered(record, tokenizer, index + 1), said):
            raise _omitted("reasoning of an assistant turn", record, tokenizer)


def contains(text: str, parts: Iterable[JsonValue]) -> bool:
    """Return whether a text contains strings, raw or in JSON; white space, which templates trim, is ignored."""
    squeezed = _squeezed(text)
    return all(
        any(
            _squeezed(form) in squeezed
            for form in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
        )
        for part in parts
        if isinstance(part, str)
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _omitted(what: str, record: Conversation, tokenizer: Tokenizer) -> DataError:
    return row_error(
        record,
        f"{template_name(tokenizer)} does not render the {what}. Use a model or a --chat-template that does, or remove "
        "them from the data.",
    )


def absent(stem: str, text: str) -> str:
    """Return a word that does not occur in a text."""
    while stem in text:
        stem += stem[-1]
    return stem


def in_words(record: Conversation, stem: str, end: str) -> Conversation:
    """Replace each part that `check_rendered` checks by a word from `stem` to `end` that no other text contains."""
    numbers = itertools.product("abcdefghij", repeat=6)
    new = (f"{stem}{''.join(number)}{end}" for number in numbers)
    names: dict[JsonValue, str] = {}
    tools = []
    for tool in record.tools:
        function = tool.get("function", tool)
        if isinstance(function, dict):
            function = _renamed(function, names, new)
            if _is_text(function.get("description")):
                function["description"] = next(new)
        tools.append({**tool, "function": function} if "function" in tool else function)
    messages = [
        _turn_in_words(message, names, new)
        if message.role == "assistant"
        else replace(message, fields=_renamed(dict(message.fields), names, new))
        for message in record.messages
    ]
    return replace(record, messages=tuple(messages), tools=tuple(tools))


def _is_text(value: JsonValue) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _renamed(function: JsonObject, names: dict[JsonValue, str], new: Iterator[str]) -> JsonObject:
    """Return an object with another name, the same for the same name."""
    if not isinstance(function.get("name"), str):
        return dict(function)
    return {**function, "name": names.setdefault(function["name"], next(new))}


def _turn_in_words(turn: Message, names: dict[JsonValue, str], new: Iterator[str]) -> Message:
    fields, reasons = dict(turn.fields), dict[JsonValue, str]()
    for key in REASONING:
        if _is_text(fields.get(key)):
            fields[key] = reasons.setdefault(fields[key], next(new))
    calls: list[JsonValue] = []
    given_calls: Any = fields.get("tool_calls") or ()
    for call in given_calls:
        function = _renamed(call["function"], names, new)
        if isinstance(given := function.get("arguments"), dict):
            function["arguments"] = {key: next(new) if _is_text(value) else value for key, value in given.items()}
        calls.append({**call, "function": function})
    if calls:
        fields["tool_calls"] = calls
    content = turn.content or ""
    if content.strip() or not fields:  # a template may drop the white space of a turn that calls
        reasoning, tag, answer = content.rpartition("</think>")
        begin = "<think>" * reasoning.lstrip().startswith("<think>")
        said = reasoning.strip().removeprefix(begin).strip() and next(new)
        content = f"{begin}{said}{tag}" + (answer and next(new))
    return replace(turn, content=content, fields=fields)


def answer_parts(turn: Message) -> list[str]:
    """Return what a turn says besides its reasoning: names and arguments of its calls, and its text."""
    parts = [
        *(call["name"] for call in _calls(turn)),
        *_arguments(turn),
        (turn.content or "").rpartition("</think>")[2],
    ]
    return [part for part in parts if isinstance(part, str) and part.strip()]
