import json
import os
import re
from pathlib import Path

import pytest

from lorakit.data import Completion, Conversation, Document, Message, read_records
from lorakit.errors import DataError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(path: object) -> str:
    with pytest.raises(DataError) as error:
        read_records(path)
    return str(error.value)


def test_kinds_and_files_may_be_mixed_and_keep_their_place(tmp_path: Path) -> None:
    text = tmp_path / "a.md"
    text.write_bytes("\ufeffTitle\r\n\nWörter".encode())
    rows = write(
        tmp_path / "b.jsonl",
        {"text": "one"},
        "",
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    )
    records = read_records([text, rows])
    assert list(records) == [
        Document("Title\r\n\nWörter", str(text)),
        Document("one", str(rows), 1),
        Completion("p", "c", str(rows), 3),
        Conversation((Message("user", "u"), Message("assistant", "a")), str(rows), 4),
    ]
    assert records.notes == []


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\r\n{"text": "x"}', encoding="utf-8", newline="")
    assert [record.text for record in read_records(path) if isinstance(record, Document)] == [
        "one\u2028two\u0085three",
        "x",
    ]


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": []}
    path = write(tmp_path / "a.jsonl", {"text": "x", "id": 1}, {"text": "y", "id": 2}, {"messages": [message]})
    assert read_records(path).notes == [
        f"{path}: unused columns: 'id' (2 of 3 rows), 'messages[].tool_calls' (1 of 3 rows)."
    ]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    assert refused(tmp_path / "trian.txt").endswith("not found. Similar: train.txt.")
    assert refused(tmp_path / "no" / "a.txt").endswith(f"The directory {tmp_path / 'no'} does not exist either.")
    assert "a directory; pass the data files in it" in refused(tmp_path)
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
    other = tmp_path / "a.json"
    other.write_text("[]")
    assert "must end in .txt, .md or .jsonl, not '.json'. Convert the .json file to .jsonl" in refused(other)
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe)
    assert "No data file was given" in refused([])


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
        (
            {"prompt": "p"},
            "the field 'completion' is missing; a row must have 'text', or 'prompt' and 'completion', or",
        ),
        ({"text": "a", "messages": []}, "this one has 'text' and 'messages'."),
        ({}, "this one has no fields."),
        ({"Promt": "a", "output": "b"}, "this one has 'Promt', 'output'. Did you mean 'prompt' instead of 'Promt'?"),
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
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "the field 'messages[0].content' is a list; it must be a string",
        ),
    ],
)
def test_bad_rows_are_named_by_line_and_field(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, row)
    said = refused(path)
    assert said.startswith(f"{path}:2: ")
    assert message in said


def test_further_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": 1}, {"text": "fine"}, {"text": 2}, {"x": 1})
    said = refused(path)
    assert said.startswith(f"{path}:1: ")
    assert said.endswith("2 (lines 3, 4).")
    assert len(re.findall(r"[.!?](?: |$)", said)) <= 2
