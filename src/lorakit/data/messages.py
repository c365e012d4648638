"""Values of data rows, read by field with checks of their types, and the records that are built from them.

Two layouts of messages are accepted: `role` and `content`, or `from` and `value`, as in ShareGPT files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.records import ROLES, Completion, Conversation, Document, Labeled, Message, Record, Tagged
from lorakit.durable import JsonObject, JsonValue, parse_json, problem_in
from lorakit.errors import did_you_mean

TOOL_FIELDS = ("tool_calls", "tool_call_id", "name", "tool_plan", "reasoning_content", "reasoning", "thinking")
"""Fields of a message besides its role and content that are passed to the chat template."""

SHAREGPT_ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Value of `from` in a ShareGPT message -> role."""

_FORM = "a list of objects with 'role' and 'content'"


class BadRow(Exception):
    """An invalid row; the message describes the problem but not the row's location."""


def named(value: JsonValue) -> str:
    """Describe a JSON value by its type, and by the value itself if it is a scalar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value[:30]!r}"
    return "a list" if isinstance(value, list) else "an object"


def string_of(value: JsonValue, name: str) -> str:
    """Return a value that must be a string; a BadRow if it is not."""
    if not isinstance(value, str):
        raise BadRow(f"the field '{name}' is {named(value)}; it must be a string.")
    return value


def check_value(value: JsonValue, name: str, *, is_used: bool = True) -> None:
    """Check a value where it enters, including every string and name in it, so that no later code has to.

    A value from which no record is built may contain what JSON lacks, such as dates.

    Raises:
        BadRow: A string or a name contains an unpaired surrogate, the value is nested too deeply, or a value that is
            used is not JSON.
    """
    problem = problem_in(value, is_json=is_used)
    if problem is not None:
        raise BadRow(f"the field '{name}{problem[0]}' {problem[1]}.")


def messages_of(value: JsonValue, name: str, unused: Counter[str]) -> tuple[Message, ...]:
    """Return a value that must be a nonempty list of messages; a string is parsed as JSON first.

    Raises:
        BadRow: The value is not such a list, or a string in it is not valid text.
    """
    value = _parsed(value, name)
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else named(value)
        raise BadRow(f"the field '{name}' is {came}; it must be {_FORM}.")
    return tuple(_message(item, f"{name}[{index}]", name, unused) for index, item in enumerate(value))


def tools_of(value: JsonValue, name: str) -> tuple[JsonObject, ...]:
    """Return a value that must be None or a list of tools (JSON schemas of functions); a string is parsed as JSON.

    Raises:
        BadRow: The value is not such a list, or a string in it is not valid text.
    """
    value = _parsed(value, name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"the field '{name}' is {named(value)}; it must be a list of tools (JSON schemas of functions).")
    return tuple(value)


def _parsed(value: JsonValue, name: str) -> JsonValue:
    """Parse a string that contains a JSON list or object; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            return value
        check_value(value, name)
    return value


def _message(item: JsonValue, where: str, column: str, unused: Counter[str]) -> Message:
    if not isinstance(item, dict):
        raise BadRow(f"the field '{where}' is {named(item)}; it must be an object with 'role' and 'content'.")
    if "role" not in item and "from" in item:
        return _from_sharegpt(item, where, column, unused)
    fields: dict[str, Any] = {key: item[key] for key in TOOL_FIELDS if item.get(key) is not None}
    if "tool_calls" in fields:
        fields["tool_calls"] = _calls(fields["tool_calls"], f"{where}.tool_calls")
        if not fields["tool_calls"]:
            del fields["tool_calls"]
    for key in ("role", "content"):
        if key not in item and (key == "role" or not fields):
            raise BadRow(f"the field '{where}.{key}' is missing; a message must have 'role' and 'content'.")
    role = string_of(item["role"], f"{where}.role")
    if role not in ROLES:
        allowed = f"{', '.join(ROLES)}.{did_you_mean(role, ROLES)}"
        raise BadRow(f"the field '{where}.role' is '{role}'; it must be one of {allowed}")
    known = ("role", "content", "weight", *TOOL_FIELDS)
    unused.update(f"{column}[].{key}" for key in item if key not in known and item[key] is not None)
    content = item.get("content")
    if content is None and not fields:
        raise BadRow(
            f"the field '{where}.content' is null; it must be a string, because the message has no tool calls."
        )
    content = None if content is None else _content(content, f"{where}.content")
    return Message(role, content, fields, _weight(item.get("weight"), f"{where}.weight"))


def _content(value: JsonValue, where: str) -> str:
    """Return the text of a message; a list of text parts is joined."""
    if not isinstance(value, list):
        return string_of(value, where)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in (None, "text"):
            what = f"of type {kind!r}" if isinstance(kind, str) else named(part)
            raise BadRow(f"the field '{where}[{number}]' is {what}; only text is supported.")
        texts.append(string_of(part.get("text"), f"{where}[{number}].text"))
    return "".join(texts)


def _weight(value: JsonValue, where: str) -> bool:
    if value is None:
        return True
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadRow(f"the field '{where}' is {named(value)}; it must be 0 (do not train on the turn) or 1.")


def _calls(value: JsonValue, where: str) -> list[JsonObject]:
    """Return tool calls whose arguments are objects; arguments in JSON text, as in OpenAI's files, are parsed."""
    value = _parsed(value, where)
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRow(f"the field '{where}' is {named(value)}; it must be a list of objects.")
    calls = []
    for number, call in enumerate(value):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"the field '{where}[{number}]' has no function name; it must be an object with 'function'.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}[{number}].function.arguments")
            if not isinstance(arguments, dict):
                raise BadRow(f"the field '{where}[{number}].function.arguments' is not a JSON object.")
        function = {**function, "arguments": {} if arguments is None else arguments}
        rest = {key: part for key, part in call.items() if part is not None} if "function" in call else {}
        calls.append({"type": "function", **rest, "function": function})
    return calls


def _from_sharegpt(item: JsonObject, where: str, column: str, unused: Counter[str]) -> Message:
    speaker = string_of(item["from"], f"{where}.from")
    role = SHAREGPT_ROLES.get(speaker.lower())
    if role is None:
        allowed = f"{', '.join(SHAREGPT_ROLES)}.{did_you_mean(speaker, SHAREGPT_ROLES)}"
        raise BadRow(f"the field '{where}.from' is '{speaker}'; it must be one of {allowed}")
    unused.update(
        f"{column}[].{key}" for key in item if key not in ("from", "value", "weight") and item[key] is not None
    )
    if "value" not in item:
        raise BadRow(f"the field '{where}.value' is missing; a message must have 'from' and 'value'.")
    weight = _weight(item.get("weight"), f"{where}.weight")
    if speaker.lower() == "function_call":
        call = _parsed(item["value"], f"{where}.value")
        return Message(
            role, None, {"tool_calls": _calls(call if isinstance(call, list) else [call], f"{where}.value")}, weight
        )
    return Message(role, _content(item["value"], f"{where}.value"), {}, weight)


Row = Mapping[str, JsonValue]
"""A row of a data file: column -> value."""


@dataclass(frozen=True)
class Values:
    """The values of one row, keyed by field; `columns` maps a field to its column.

    `source` and `line` (starting at 1, or None) are for messages; unused fields of messages are counted in `unused`.
    """

    row: Row
    columns: Mapping[str, str]
    source: str
    line: int | None
    unused: Counter[str]

    def value(self, name: str) -> JsonValue:
        """Return the value of a field, or None if the row does not have it."""
        column = self.columns.get(name)
        return None if column is None else self.row.get(column)

    def string(self, name: str) -> str:
        """Return the value of a required field that must be a string; a BadRow if it is not."""
        return string_of(self.value(name), self.columns[name])

    def text(self, name: str) -> str:
        """Return the value of an optional string field, "" if it is missing or null; a BadRow for another type."""
        return "" if self.value(name) is None else self.string(name)

    def messages(self, name: str) -> tuple[Message, ...]:
        """Return the value of a field that must be a list of messages; a BadRow if it is not."""
        return messages_of(self.value(name), self.columns[name], self.unused)

    def conversation(self, messages: Iterable[Message], *, is_instruction: bool = False) -> Conversation:
        """Return a conversation with the row's tools and template options; a BadRow if these are not valid."""
        options = self.value("chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise BadRow(
                f"the field '{self.columns['chat_template_kwargs']}' is {named(options)}; it must be an object."
            )
        tools = tools_of(self.value("tools"), self.columns.get("tools", "tools"))
        return Conversation(tuple(messages), self.source, self.line, tools, options or {}, is_instruction)


def label_of(values: Values, name: str) -> str | tuple[str, ...] | float | None:
    """Return a row's label: class name or names, a score, or None without one; a BadRow for another type."""
    value = values.value(name)
    if value is None:
        return None
    if isinstance(value, list):
        return tuple(class_name(one, values.columns[name]) for one in value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"the field '{values.columns[name]}' is {value}; a score must be finite.")
        return value
    return class_name(value, values.columns[name])


def class_name(value: JsonValue, column: str) -> str:
    """Return the name of a class, given as a string, an integer or a boolean; a BadRow if empty or another type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"the field '{column}' contains {named(value)}; a label must be a string or an integer.")
    text = string_of(value, column).strip()
    if not text:
        raise BadRow(f"the field '{column}' is empty; a label must not be empty.")
    return text


def strings_of(value: JsonValue, column: str) -> tuple[str, ...]:
    """Return a value that must be a list of strings; a BadRow if it is not."""
    if not isinstance(value, list):
        raise BadRow(f"the field '{column}' is {named(value)}; it must be a list of strings.")
    return tuple(string_of(one, column) for one in value)


def document_of(values: Values) -> Record:
    """Build a document from a text."""
    return Document(values.string("text"), values.source, values.line)


def completion_of(values: Values) -> Record:
    """Build a completion, or a conversation if the prompt or the completion is a list of messages."""
    prompt, completion = values.value("prompt"), values.value("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Completion(values.string("prompt"), values.string("completion"), values.source, values.line)
    context = values.messages("prompt") if isinstance(prompt, list) else (Message("user", values.string("prompt")),)
    answer = (
        values.messages("completion")
        if isinstance(completion, list)
        else (Message("assistant", values.string("completion")),)
    )
    return values.conversation([*(message.untrained() for message in context), *answer])


def chat_of(values: Values) -> Record:
    """Build a conversation from messages."""
    return values.conversation([*_system(values), *values.messages("messages")])


def _system(values: Values) -> list[Message]:
    system = values.text("system")
    return [Message("system", system)] if system else []


def instruction_of(values: Values) -> Record:
    """Build a conversation from an instruction with an optional input, and its output."""
    request = "\n\n".join(part for part in (values.string("instruction"), values.text("input")) if part)
    return _exchange(values, request, "output")


def question_of(values: Values) -> Record:
    """Build a conversation from a question with an optional context, and its answer."""
    request = "\n\n".join(part for part in (values.text("context"), values.string("question")) if part)
    return _exchange(values, request, "answer")


def _exchange(values: Values, request: str, answer: str) -> Record:
    turns = (Message("user", request), Message("assistant", values.string(answer)))
    return values.conversation([*_system(values), *turns], is_instruction=True)


def translation_of(values: Values) -> Record:
    """Build a conversation from a source text and its target, which may be missing."""
    target = values.string("target") if "target" in values.columns else ""
    turns = (Message("user", values.string("source")), Message("assistant", target))
    return values.conversation(turns, is_instruction=True)


def labeled_of(values: Values) -> Record:
    """Build a labeled text."""
    return Labeled((values.string("text"),), label_of(values, "label"), values.source, values.line)


def text_pair_of(values: Values) -> Record:
    """Build a pair of texts, or three, with an optional label."""
    names = ["first", "second", *(["negative"] if values.value("negative") is not None else [])]
    texts = tuple(values.string(name) for name in names)
    return Labeled(texts, label_of(values, "label"), values.source, values.line)


def tagged_of(values: Values) -> Record:
    """Build tagged words; tags may be missing, and a BadRow means that they do not fit the words."""
    words, tags = strings_of(values.value("tokens"), values.columns["tokens"]), values.value("tags")
    if tags is None:
        return Tagged(words, (), values.source, values.line)
    if not isinstance(tags, list) or len(tags) != len(words):
        raise BadRow(
            f"the field '{values.columns['tags']}' is {named(tags)}"
            f"{f' of {len(tags)} tags' if isinstance(tags, list) else ''}; it must be a list with one tag for each of "
            f"the {len(words)} tokens."
        )
    if -100 in tags:
        raise BadRow(
            f"the field '{values.columns['tags']}' contains -100, which marks tokens without a tag, not words."
        )
    names = tuple(class_name(tag, values.columns["tags"]) for tag in tags)
    return Tagged(words, names, values.source, values.line)
