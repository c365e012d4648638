"""Shapes of rows: which columns make which record, and what the user can choose."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.choices import FORMATS
from lorakit.data import (
    SHAPES,
    Completion,
    Conversation,
    Document,
    Labeled,
    Message,
    Record,
    Request,
    encode,
    read_records,
)
from lorakit.data.shapes import TRAINABLE, text_records
from lorakit.errors import ConfigError, DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def record(tmp_path: Path, row: dict[str, Any], request: Request | None = None) -> Record:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return read_records(path, request)[0]


def turns(found: Record) -> list[tuple[str, str | None]]:
    assert isinstance(found, Conversation)
    return [(message.role, message.content) for message in found.messages]


EXCHANGE = [("user", "ask"), ("assistant", "reply")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "ask", "output": "reply"}, EXCHANGE),
        (
            {"instruction": "ask", "input": "more", "output": "reply", "text": "both"},
            [("user", "ask\n\nmore"), EXCHANGE[1]],
        ),
        ({"instruction": "ask", "context": "", "response": "reply", "category": "qa"}, EXCHANGE),  # Dolly
        ({"question": "ask", "answer": "reply"}, EXCHANGE),
        ({"question": "ask", "context": "facts", "answer": "reply"}, [("user", "facts\n\nask"), EXCHANGE[1]]),
        ({"system": "rules", "question": "ask", "answer": "reply"}, [("system", "rules"), *EXCHANGE]),
        (
            {
                "conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}],
                "system": "rules",
            },
            [("system", "rules"), *EXCHANGE],
        ),
        ({"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]}, EXCHANGE),
        ({"messages": json.dumps([{"from": "user", "value": "ask"}, {"from": "model", "value": "reply"}])}, EXCHANGE),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]}
                ]
            },
            EXCHANGE[:1],
        ),
    ],
)
def test_chats(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(record(tmp_path, row)) == expected


def test_other_shapes(tmp_path: Path) -> None:
    source = str(tmp_path / "rows.jsonl")
    assert record(tmp_path, {"text": "t"}) == Document("t", source, 1)
    assert record(tmp_path, {"prompt": "p", "response": "r"}) == Completion("p", "r", source, 1)


def test_only_the_completion_of_a_conversational_prompt_is_trained(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = record(tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert isinstance(found, Conversation)
    assert [message.is_trained for message in found.messages] == [False, False, False, True]


def test_tools_calls_reasoning_and_weights_reach_the_record(tmp_path: Path) -> None:
    openai = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    rows = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": None, "tool_calls": [openai], "reasoning_content": "think"},
        {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"},
        {"role": "assistant", "content": "It rains.", "weight": 0},
    ]
    row = {"messages": rows, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"enable_thinking": True}}
    found = record(tmp_path, row)
    assert isinstance(found, Conversation)
    assert found.tools == (TOOL,) and found.options == {"enable_thinking": True}
    call = {"reasoning_content": "think", "tool_calls": [{"id": "1", **CALL}]}
    assert found.messages[1] == Message("assistant", None, call)
    assert found.messages[2].fields == {"tool_call_id": "1", "name": "weather"}
    assert [message.is_trained for message in found.messages] == [True, True, True, False]


def test_a_sharegpt_function_call_is_a_tool_call(tmp_path: Path) -> None:
    talk = [
        {"from": "human", "value": "ask"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Bern"}})},
        {"from": "observation", "value": "rain"},
    ]
    found = record(tmp_path, {"conversations": talk})
    assert isinstance(found, Conversation)
    assert found.messages[1] == Message("assistant", None, {"tool_calls": [CALL]})
    assert found.messages[2].role == "tool"


def test_columns_with_other_names_are_mapped(tmp_path: Path) -> None:
    row = {"frage": "ask", "antwort": "reply", "text": "both"}
    request = Request(columns={"question": "frage", "answer": "antwort"})
    assert turns(record(tmp_path, row, request)) == EXCHANGE
    request = Request(columns={"prompt": "frage", "completion": "antwort"})
    assert isinstance(record(tmp_path, row, request), Completion)
    with pytest.raises(DataError, match="there is no column 'antwrt'; the columns are 'frage', 'antwort', 'text'"):
        record(tmp_path, row, Request(columns={"question": "frage", "answer": "antwrt"}))


def test_a_format_decides_between_shapes(tmp_path: Path) -> None:
    row = {"text": "t", "prompt": "p", "completion": "c", "label": 1}
    with pytest.raises(DataError, match="fit several shapes, prompt-completion and classification; select one"):
        record(tmp_path, row)
    assert record(tmp_path, row, Request("text")) == Document("t", str(tmp_path / "rows.jsonl"), 1)
    assert isinstance(record(tmp_path, row, Request("prompt-completion")), Completion)
    with pytest.raises(DataError, match="question-answer"):
        record(tmp_path, row, Request("question-answer"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "text_pair": "b", "label": 1}, Labeled(("a", "b"), "1")),
        ({"text_pair": "b", "text": "a"}, Labeled(("a", "b"))),
        ({"text": "a", "text_pair": "b", "score": 0.5}, Labeled(("a", "b"), 0.5)),
        ({"sentence1": "a", "sentence2": "b", "labels": "x"}, Labeled(("a", "b"), "x")),
        ({"text": "a", "hypothesis": 3, "positive": 4, "label": "x"}, Labeled(("a",), "x")),
        ({"text": "a", "sentence2": "b"}, Document("a")),
    ],
)
def test_pairs_of_texts(row: dict[str, Any], expected: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The columns `text` and `text_pair` are those of a tokenizer's call; alone, `text` is not a part of a pair."""
    found: Any = record(tmp_path, row)
    assert dataclasses.replace(found, source=expected.source, line=None) == expected
    if "text_pair" in row:
        texts = {name: row[name] for name in ("text", "text_pair")}
        assert tiny_tokenizer(*found.texts)["input_ids"] == tiny_tokenizer(**texts)["input_ids"]


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ConfigError, match=r"format is .alpacca..*Did you mean alpaca"):
        Request("alpacca")
    with pytest.raises(ConfigError, match=r"columns is .promt..*Did you mean prompt"):
        Request(columns={"promt": "question"})


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 1}\n{"text": "a"}\n{"tex\n{"text": "b"}\n')
    found = read_records(path, Request(skip_bad_rows=True))
    assert [row.text for row in found if isinstance(row, Document)] == ["a", "b"]
    assert found.notes == [
        f"{path}: 2 rows skipped; the first is line 1: the field 'text' is the number 1; it must be a string."
    ]
    path.write_text('{"text": 1}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the field 'text' is the number 1"):
        read_records(path, Request(skip_bad_rows=True))


def test_the_shape_of_unusual_columns_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    assert read_records(path).notes == [f"{path}: question-answer rows."]
    path.write_text('{"conversations": [{"from": "human", "value": "x"}]}\n')
    assert read_records(path).notes == [f"{path}: sharegpt (messages from 'conversations') rows."]


def test_an_instruction_needs_no_chat_template(tiny_tokenizer: Any) -> None:
    turns = (Message("user", "what is two plus two?"), Message("assistant", "four"))
    tiny_tokenizer.chat_template = None
    encoded = encode([Conversation(turns, is_instruction=True)], tiny_tokenizer, 64)
    row = encoded.sequences[0]
    assert tiny_tokenizer.decode(row.input_ids).startswith("what is two plus two?\n\nfour")
    trained = [label for label in row.labels if label != -100]
    assert tiny_tokenizer.decode(trained, skip_special_tokens=True) == "four"
    with pytest.raises(DataError, match="no chat template"):
        encode([Conversation(turns)], tiny_tokenizer, 64)


def test_the_names_of_formats_are_those_of_the_shapes() -> None:
    assert tuple(shape.name for shape in TRAINABLE) == FORMATS
    assert all(shape.remedy for shape in SHAPES if shape.build is None)


def test_texts_as_rows() -> None:
    words, text = (Request(allowed=(name,), needs_label=False) for name in ("token-classification", "classification"))
    assert text_records(["Ann met  Bob"], words)[0].words == ("Ann", "met", "Bob")  # type: ignore[union-attr]
    assert text_records(["a", "b"], text)[1].texts == ("b",)  # type: ignore[union-attr]
    with pytest.raises(DataError):
        text_records(["a\udcff"], text)
    with pytest.raises(ConfigError):
        text_records(["a"], Request(allowed=("text-pair",), needs_label=False))
