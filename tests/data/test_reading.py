import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Completion, Conversation, Document, Message, Request, encode, read_records
from lorakit.errors import DataError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(path: object) -> str:
    with pytest.raises(DataError) as error:
        read_records(path)
    return str(error.value)


def test_files_of_different_shapes_keep_their_place(tmp_path: Path) -> None:
    text = tmp_path / "a.md"
    text.write_bytes("\ufeffTitle\r\n\nWörter".encode())
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    texts = write(tmp_path / "b.jsonl", {"text": "one"}, "", {"text": "two"})
    pairs = write(tmp_path / "c.jsonl", {"prompt": "p", "completion": "c"})
    chats = write(tmp_path / "d.jsonl", {"messages": turns})
    records = read_records([text, texts, pairs, chats])
    assert list(records) == [
        Document("Title\r\n\nWörter", str(text)),
        Document("one", str(texts), 1),
        Document("two", str(texts), 3),
        Completion("p", "c", str(pairs), 1),
        Conversation((Message("user", "u"), Message("assistant", "a")), str(chats), 1),
    ]
    assert records.notes == []


def test_a_file_has_one_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one"}, {"prompt": "p", "completion": "c"})
    assert "a.jsonl:2: the field 'text' is missing; the file's first row has 'text'" in refused(path)


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\r\n{"text": "x"}', encoding="utf-8", newline="")
    assert [record.text for record in read_records(path) if isinstance(record, Document)] == [
        "one\u2028two\u0085three",
        "x",
    ]


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "a", "mood": "calm", "tool_calls": []}
    path = write(
        tmp_path / "a.jsonl", {"messages": [message], "id": 1}, {"messages": [message | {"mood": None}], "id": 2}
    )
    assert read_records(path).notes == [f"{path}: unused columns: 'id' (2 of 2 rows), 'messages[].mood' (1 of 2 rows)."]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    assert refused(tmp_path / "trian.txt").endswith(f"not found. Did you mean {tmp_path / 'train.txt'}?")
    assert refused(tmp_path / "no" / "a.txt").endswith(f"The directory {tmp_path / 'no'} does not exist either.")
    (tmp_path / "none").mkdir()
    assert "no data files found; their names must end in .txt" in refused(tmp_path / "none")
    assert "no data files found" in refused(str(tmp_path / "*.csv"))
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b" \n\t\n")
    assert refused(empty) == f"{empty}: the data file is empty."
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ELF\0\1\2")
    assert "looks binary (null byte at offset 3)" in refused(binary)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"first\ncaf\xe9 au lait")
    assert "byte 0xe9 at offset 9 (line 2)" in refused(latin)
    wide = tmp_path / "wide.txt"
    wide.write_text("wide", encoding="utf-16")
    assert "the data file is UTF-16; save it as UTF-8" in refused(wide)
    other = tmp_path / "a.xlsx"
    other.write_text("[]")
    assert "must end in .txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, not '.xlsx'" in refused(other)
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe)
    assert "No data was given" in refused([])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ('{"text": "a", "text": "b"}', "not valid JSON (duplicate key 'text')."),
        ('{"text": "a", "weight": NaN}', "not valid JSON (NaN is not a JSON number)."),
        ("[" * 100_000, "not valid JSON (nested too deeply)."),
        ([1], "must be a JSON object, not a list."),
        ({"text": 3}, "the field 'text' is the number 3; it must be a string"),
        ({"text": None}, "the field 'text' is null; it must be a string"),
        ({"prompt": "p", "completion": True}, "the field 'completion' is the boolean true; it must be a string"),
        ({"prompt": "p"}, "the field 'completion' is missing; prompt-completion rows have 'prompt' and 'completion'."),
        ({"text": "a", "messages": []}, "the columns 'text', 'messages' fit several shapes, text and messages; select"),
        ({}, "the columns no columns are not recognized"),
        ({"Promt": "a", "out": "b"}, "the columns 'Promt', 'out' are not recognized; rows must have 'text' (text), "),
        ({"Promt": "a", "out": "b"}, "Did you mean 'prompt' instead of 'Promt'"),
        ({"Promt": "a", "out": "b"}, "with --columns, such as prompt=COLUMN"),
        (
            {"chosen": "a", "rejected": "b"},
            "these are preference rows ('chosen', 'rejected'), which cannot be trained on",
        ),
        ({"text": "a", "label": {}}, "the field 'label' contains an object; a label must be a string or an integer."),
        ({"text": "a", "label": " "}, "the field 'label' is empty; a label must not be empty."),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "the field 'tags' is a list of 1 tags; it must be a list with one tag"),
        ({"tokens": "a b", "tags": ["O"]}, "the field 'tokens' is the string 'a b'; it must be a list of strings."),
        ({"chosen": "a", "rejected": "b"}, "these are preference rows"),
        ('{"text": "a\\ud800"}', "the field 'text' contains an unpaired surrogate (\\ud800) at character 1"),
        (
            {"messages": []},
            "the field 'messages' is an empty list; it must be a list of objects with 'role' and 'content'",
        ),
        ({"messages": "hi"}, "the field 'messages' is the string 'hi'; it must be a list of objects"),
        (
            {"messages": ["hi"]},
            "the field 'messages[0]' is the string 'hi'; it must be an object with 'role' and 'content'",
        ),
        ({"messages": [{"role": "user"}]}, "the field 'messages[0].content' is missing"),
        (
            {"messages": [{"role": "assitant", "content": "x"}]},
            "the field 'messages[0].role' is 'assitant'; it must be one of system, developer, user, assistant, tool. "
            "Did you mean assistant?",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            "the field 'messages[0].content[0]' is of type 'image'; only text is supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "the field 'messages[0].content' is null; it must be a string, because the message has no tool calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "the field 'messages[0].weight' is the number 0.5; it must be 0 (do not train on the turn) or 1",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
            "the field 'messages[0].tool_calls[0]' has no function name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "a=1"}}]}]},
            "the field 'messages[0].tool_calls[0].function.arguments' is not a JSON object",
        ),
        (
            {"conversations": [{"from": "humen", "value": "x"}]},
            "the field 'conversations[0].from' is 'humen'; it must be one of system, human",
        ),
        ({"conversations": [{"from": "human"}]}, "the field 'conversations[0].value' is missing"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "none"}, "the field 'tools' is the string 'none'"),
    ],
)
def test_bad_rows_are_named_by_line_and_field(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", "", row)
    said = refused(path)
    assert said.startswith(f"{path}:2: ")
    assert message in said


def test_further_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": 1}, {"text": "fine"}, {"text": 2}, {"x": 1})
    said = refused(path)
    assert said.startswith(f"{path}:1: ")
    assert said.endswith("2 (lines 3, 4).")
    assert len(re.findall(r"[.!?](?: |$)", said)) <= 2


def test_the_shape_and_columns_that_all_files_have_in_common(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("frage,answer\nwhat?,that\n")
    (tmp_path / "b.jsonl").write_text('{"question": "what?", "answer": "that"}\n')
    (tmp_path / "c.txt").write_text("the quick fox")
    (tmp_path / "d.jsonl").write_text('{"text": "the quick fox"}\n')
    renamed = Request(columns={"question": "frage"})
    report = encode(read_records(tmp_path / "a.csv", renamed), tiny_tokenizer, 32).report
    assert (report.shape, report.columns) == ("question-answer", {"question": "frage", "answer": "answer"})
    cases = {
        ("b.jsonl",): ("question-answer", {"question": "question", "answer": "answer"}),
        ("c.txt",): ("text", {}),
        ("c.txt", "d.jsonl"): ("text", {"text": "text"}),
        ("b.jsonl", "d.jsonl"): (None, {}),
    }
    for names, expected in cases.items():
        found = read_records([tmp_path / name for name in names])
        assert (found.shape, found.columns) == expected
        assert encode(found, tiny_tokenizer, 32).report.as_dict()["shape"] == expected[0]
