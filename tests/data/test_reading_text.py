"""Text is validated where rows enter: every string of a row, of every shape, in every format that can carry the problem.

The test finds the strings of a row by walking its JSON itself, including JSON that is written inside a string.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Record, Request, read_records
from lorakit.data.reading import open_stream
from lorakit.data.records import content_key
from lorakit.data.shapes import TRAINABLE
from lorakit.data.sources import Place
from lorakit.errors import DataError

SURROGATE = "\ud8a0"
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "go", "arguments": {"to": "Bern", "by": ["bus", {"n": "5"}]}},
}
TOOLS = [{"type": "function", "function": {"name": "go", "description": "d", "parameters": {"required": ["to"]}}}]
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "go"}], "note": "unused"},
    {"role": "assistant", "content": "ok", "reasoning_content": "r", "thinking": "t", "tool_calls": [CALL]},
    {"role": "tool", "content": "done", "tool_call_id": "1", "name": "go"},
    {"role": "assistant", "content": "done", "reasoning": "r", "tool_plan": "p"},
]
SHAREGPT = [
    {"from": "human", "value": "go"},
    {"from": "function_call", "value": json.dumps({"name": "go", "arguments": json.dumps({"to": "Bern"})})},
    {"from": "gpt", "value": "done"},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "a", "more": {"deep": ["er"]}}],
    "prompt-completion": [
        {"prompt": "a", "completion": "b"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:2], "tools": json.dumps(TOOLS)},
    ],
    "messages": [
        {"messages": MESSAGES, "tools": TOOLS, "chat_template_kwargs": {"mode": "on"}, "system": "s"},
        {"messages": json.dumps(MESSAGES)},
    ],
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "system": "s"}],
    "sharegpt": [{"conversations": SHAREGPT, "tools": json.dumps(TOOLS)}],
    "question-answer": [{"question": "a", "context": "b", "answer": "c"}],
    "classification": [{"text": "a", "label": "b"}, {"text": "a", "label": ["b", "c"]}],
    "text-pair": [
        {"anchor": "a", "positive": "b", "negative": "c"},
        {"sentence1": "a", "sentence2": "b", "label": "d"},
    ],
    "token-classification": [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}],
    "source-target": [{"source": "a", "target": "b"}],
}
Change = Callable[[str], str]


def spoiled(value: Any, change: Change) -> Iterator[Any]:
    """Yield copies of a JSON value, each with one string or one name changed; JSON in strings is opened."""
    if isinstance(value, str):
        yield change(value)
        if value[:1] in ("[", "{"):
            yield from map(json.dumps, spoiled(json.loads(value), change))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in spoiled(item, change))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from ({**value, name: other} for other in spoiled(item, change))
        yield {**value, change("name"): "x"}


CASES = [
    (shape, row, bad)
    for shape, rows in ROWS.items()
    for row in rows
    for bad in spoiled(row, lambda text: text + SURROGATE + text)
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def json_list(path: Path, rows: list[dict[str, Any]]) -> str:
    path = path / "rows.json"
    path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]")
    return str(path)


def whole(path: str, request: Request) -> list[Record]:
    return list(read_records(path, request))


def streamed(path: str, request: Request) -> list[Record]:
    return [row.record for row in open_stream([path], request).rows(Place())]


READERS = [whole, streamed]


def test_every_shape_is_covered() -> None:
    assert set(ROWS) == {shape.name for shape in TRAINABLE}
    assert len(CASES) > 100


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("write", [jsonl, json_list])
def test_every_string_of_a_row_is_validated(
    read: Callable[[str, Request], list[Record]], write: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path
) -> None:
    for shape, row, bad in CASES:
        path = write(tmp_path, [row, bad, row])
        with pytest.raises(DataError) as caught:
            read(path, Request(format=shape))
        assert caught.value.where == f"{path}:2", bad
        assert "surrogate" in str(caught.value), bad
        str(caught.value).encode()
        found = read(path, Request(format=shape, skip_bad_rows=True))
        assert [content_key(record) for record in found] == [content_key(found[0])] * 2, bad


@pytest.mark.parametrize("read", READERS)
def test_deep_values_are_bad_rows(read: Callable[[str, Request], list[Record]], tmp_path: Path) -> None:
    for depth in (200, 600, 900):
        bad = copy.deepcopy(ROWS["messages"][0])
        bad["chat_template_kwargs"]["mode"] = json.loads("[" * depth + "]" * depth)
        path = jsonl(tmp_path, [ROWS["messages"][0], bad])
        with pytest.raises(DataError) as caught:
            read(path, Request())
        assert caught.value.where == f"{path}:2"
        assert len(read(path, Request(skip_bad_rows=True))) == 1


@pytest.mark.parametrize("read", READERS)
def test_values_that_are_not_json_are_bad_rows(read: Callable[[str, Request], list[Record]], tmp_path: Path) -> None:
    import datetime

    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    when = datetime.datetime(2026, 1, 2)
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "b"}], "chat_template_kwargs": {"at": at}, "day": when}
        for at in (None, when)
    ]
    tables.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        read(path, Request())
    assert caught.value.where == f"{path}:2"
    assert len(read(path, Request(skip_bad_rows=True))) == 1
