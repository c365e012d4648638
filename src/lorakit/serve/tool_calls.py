"""Calls of functions in an answer, in the form of Hermes models.

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>

Source:
    https://github.com/NousResearch/Hermes-Function-Calling, README, "Prompt Format for Function Calling".
"""

from __future__ import annotations

import json
import secrets

from lorakit.durable import JsonObject, parse_json, problem_in
from lorakit.generate import StopStrings

BEGIN, END = "<tool_call>", "</tool_call>"


class ToolStream:
    """An answer's text with calls: text is passed on, and from the first call on held back until the end.

    Args:
        called: The function whose arguments are the whole text, or None.
    """

    def __init__(self, called: str | None = None) -> None:
        self._marker, self._text, self._given = StopStrings([BEGIN]), "", 0
        self._called = called

    def push(self, piece: str) -> str:
        """Add a piece of text, and return what cannot be part of a call."""
        self._text += piece
        if self._called is not None:
            return ""
        text = self._marker.push(piece)
        self._given += len(text)
        return text

    def finish(self) -> tuple[str, list[JsonObject]]:
        """Return the rest of the text, and the calls."""
        if self._called is None:
            return parsed(self._text[self._given :])
        call = _call(f'{{"name": {json.dumps(self._called)}, "arguments": {self._text}}}')
        return (self._text, []) if call is None else ("", [call])


def parsed(text: str) -> tuple[str, list[JsonObject]]:
    """Return the text without its calls, and the calls in OpenAI's form; the whole text if a call is not valid.

    The last call may lack its end, because the token that ends an answer can replace it.
    """
    rest, *parts = text.split(BEGIN)
    calls = []
    for part in parts:
        body, _, after = part.partition(END)
        call = _call(body)
        if call is None:
            return text, []
        calls.append(call)
        rest += after
    return rest if rest.strip() else "", calls


def _call(body: str) -> JsonObject | None:
    """Return a call in OpenAI's form, whose arguments are JSON text, or None if it is not one."""
    try:
        call = parse_json(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or problem_in(call) is not None:
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
