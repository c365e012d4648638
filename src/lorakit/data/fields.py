"""The values of one data row, read by field, with checks of their types."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorakit.data.messages import BadRow, messages_of, named, string_of, tools_of
from lorakit.data.records import Conversation, Message
from lorakit.durable import JsonValue

Row = Mapping[str, JsonValue]
"""A row of a data file: column -> value."""


@dataclass(frozen=True)
class Values:
    """The values of one row, keyed by field.

    Attributes:
        row: The row.
        columns: Field -> column.
        source: Path of the file, or another name to show in messages.
        line: Line or row number, starting at 1.
        unused: Counts of unused message fields, keyed by name; updated in place.
    """

    row: Row
    columns: Mapping[str, str]
    source: str
    line: int
    unused: Counter[str]

    def value(self, name: str) -> JsonValue:
        """Return the value of a field, or None if the row does not have it."""
        column = self.columns.get(name)
        return None if column is None else self.row.get(column)

    def string(self, name: str) -> str:
        """Return the value of a required field that must be a string.

        Raises:
            BadRow: The value is not a string.
        """
        return string_of(self.value(name), self.columns[name])

    def text(self, name: str) -> str:
        """Return the value of an optional field that must be a string; "" if the value is missing or null.

        Raises:
            BadRow: The value is not a string.
        """
        return "" if self.value(name) is None else self.string(name)

    def messages(self, name: str) -> tuple[Message, ...]:
        """Return the value of a field that must be a list of messages.

        Raises:
            BadRow: The value is not a list of messages.
        """
        return messages_of(self.value(name), self.columns[name], self.unused)

    def conversation(self, messages: Iterable[Message], *, is_instruction: bool = False) -> Conversation:
        """Return a conversation with these messages and with the row's tools and template options.

        Raises:
            BadRow: The tools or the template options are not valid.
        """
        options = self.value("chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise BadRow(
                f"the field '{self.columns['chat_template_kwargs']}' is {named(options)}; it must be an object."
            )
        tools = tools_of(self.value("tools"), self.columns.get("tools", "tools"))
        return Conversation(tuple(messages), self.source, self.line, tools, options or {}, is_instruction)


def label_of(values: Values, name: str) -> str | tuple[str, ...] | float | None:
    """Return the label of a row: a class name, class names, a score, or None if the row has no label.

    Raises:
        BadRow: The value is of another type.
    """
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
    """Return the name of a class, given as a string, an integer or a boolean.

    Raises:
        BadRow: The value is of another type, or empty.
    """
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
    """Return a value that must be a list of strings.

    Raises:
        BadRow: The value is not a list, or contains another type.
    """
    if not isinstance(value, list):
        raise BadRow(f"the field '{column}' is {named(value)}; it must be a list of strings.")
    return tuple(string_of(one, column) for one in value)
