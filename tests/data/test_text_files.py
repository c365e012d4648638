"""Rows of CSV files and JSON lists that are read from any position: line numbers, invalid rows, bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.data import Document, Request, json_list, text_files
from lorakit.data.reading import open_stream
from lorakit.data.sources import Place
from lorakit.errors import DataError


def texts(path: Path, request: Request | None = None, skipped: list[tuple[str, str]] | None = None) -> list[str]:
    stream = open_stream([str(path)], request or Request(), None if skipped is None else lambda *x: skipped.append(x))
    return [row.record.text for row in stream.rows(Place()) if isinstance(row.record, Document)]


def failure(path: Path, text: str | bytes) -> DataError:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        texts(path)
    return caught.value


def test_invalid_rows_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    good = 'id,text\n1,"a\nb"\n\n'
    for bad in ("2\n", '2,"x"y\n', b"2,\xff\n", '2,"open\nx\n'):
        raw = good.encode() + (bad if isinstance(bad, bytes) else bad.encode())
        assert failure(path, raw).where == f"{path}:5"
    path.write_bytes(good.encode() + b'2,"x"y\n3,\xff\n4\n5,c\n6,"open')
    skipped = list[tuple[str, str]]()
    assert texts(path, Request(skip_bad_rows=True), skipped) == ["a\nb", "c"]
    assert [where for where, _ in skipped] == [f"{path}:{line}" for line in (5, 6, 7, 9)]


def test_a_quote_that_is_not_closed_does_not_read_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "STREAMED_CELL", 1000)
    path = tmp_path / "a.csv"
    path.write_text('text\na\n"b\n' + "x" * 98 + "\n" + ("y" * 98 + "\n") * 100)
    skipped = list[tuple[str, str]]()
    found = texts(path, Request(skip_bad_rows=True), skipped)
    assert found[0] == "a" and 80 < len(found) < 95
    assert [where for where, _ in skipped] == [f"{path}:3"] and "limit" in skipped[0][1]


@pytest.mark.parametrize("text", ["text,text\na,b\n", "text,\na,b\n", "\n\n", "text\n"])
def test_a_csv_file_without_names_or_rows(tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "a.csv") in str(failure(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"text": "a"},]', 1),
        ('[{"text": "a"},\n{"text": "b"}', 2),
        ('[{"text": "a"}]\n x', 1),
        ('[{"text": "a"}\n{"text": "b"}]', 2),
        ('[{"text": "a"},\n\n {"text": "a", "text": "b"}]', 3),
        ('[{"text": "a"},\n {"text": b}]', 2),
        ("[1]", 1),
        ("[{}, {}]", 1),
    ],
)
def test_invalid_json_lists(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "a.json"
    assert failure(path, text).where == f"{path}:{line}"


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_json_lists_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(json_list, "READ_BYTES", size)
    path = tmp_path / "a.json"
    path.write_text(' [ {"text": "狐 ] \\" }"} ,\n{"text":"b"}\n, {"text": "😀"}] \n', encoding="utf-8")
    stream = open_stream([str(path)], Request())
    found = list(stream.rows(Place()))
    assert texts(path) == ['狐 ] " }', "b", "😀"]
    assert [row.start.line for row in found] == [1, 2, 3]
    assert [list(stream.rows(row.start)) for row in found] == [found, found[1:], found[2:]]
    path.write_text("[ ]")
    with pytest.raises(DataError, match="no rows"):
        texts(path)


def test_an_element_that_does_not_end_does_not_read_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(json_list, "READ_BYTES", 100)
    path = tmp_path / "a.json"
    error = failure(path, '[{"text": "a"},\n{"text": "b\n' + "x" * 10_000 + '"}]')
    assert error.where == f"{path}:2"


def test_objects_in_lines_under_the_suffix_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert texts(path) == ["a", "b"]
