"""lorakit.serve.tool_calls: calls and text are told apart, however the text is divided into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.serve.tool_calls import ToolStream, parsed

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
CASES = {
    "plain text": ("no call", "no call", []),
    "a call": (ADD, "", [("add", {"a": 1, "b": [2]})]),
    "text and two calls": (f"Let me see.\n{ADD}\n{ADD}", "Let me see.\n", [("add", {"a": 1, "b": [2]})] * 2),
    "without its end": (ADD.removesuffix("</tool_call>"), "", [("add", {"a": 1, "b": [2]})]),
    "without arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    "text after": (f"{ADD} Done.", " Done.", [("add", {"a": 1, "b": [2]})]),
    "the beginning of a mark": ("a <tool_cal", "a <tool_cal", []),
}
BROKEN = [
    "{",
    "[]",
    '{"name": 1}',
    '{"name": "f", "arguments": 3}',
    '{"name": "f", "arguments": {"x": NaN}}',
    "[" * 5000,
]


@pytest.mark.parametrize("name", CASES)
@given(cuts=st.lists(st.integers(0, 150), max_size=8))
def test_pieces_give_the_same_as_the_whole(name: str, cuts: list[int]) -> None:
    text, rest, calls = CASES[name]
    stream, bounds = ToolStream(), [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = "".join(stream.push(text[a:b]) for a, b in itertools.pairwise(bounds))
    end, found = stream.finish()
    assert "<tool_call>" not in shown and shown + end == rest
    assert [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in found] == calls
    assert len({one["id"] for one in found}) == len(calls)


@pytest.mark.parametrize("body", BROKEN)
def test_a_broken_call_is_text(body: str) -> None:
    text = f"{ADD}<tool_call>{body}</tool_call>"
    assert parsed(text) == (text, [])
