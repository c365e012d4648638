"""Reading as a whole and as a stream give the records and positions that json, csv and pyarrow find on their own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorakit.data import Document, Request, read_records
from lorakit.data.reading import open_stream
from lorakit.data.sources import Place
from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
LINES = st.sampled_from(["", " ", "{", "null", "[1]", '{"text": 1}', '{"text": "a", "text": "b"}'])
CELLS = st.sampled_from(["", "1,2", "a,b,c", '"x"y,z'])
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@dataclass(frozen=True)
class Content:
    """The contents of a file: texts, lines between them that are not rows, and how it is written."""

    texts: list[str]
    between: list[str]
    end: str
    bom: bytes
    is_long: bool
    invalid: bytes

    def rows(self) -> Iterator[tuple[str, str | None]]:
        """Yield each text with the line after it, or None; the first text may have more bytes than are read at once."""
        for at, text in enumerate(self.texts):
            long = "狐 ä" * 40_000 if self.is_long and at == 0 else ""
            yield long + text, self.between[at] if at < len(self.between) else None


def contents(between: st.SearchStrategy[str]) -> st.SearchStrategy[Content]:
    return st.builds(
        Content,
        st.lists(TEXTS, min_size=1, max_size=6),
        st.lists(between, max_size=4),
        st.sampled_from(["\n", "\r\n"]),
        st.sampled_from([b"", b"\xef\xbb\xbf"]),
        st.booleans(),
        st.sampled_from([b"", b"", b"\xff"]),
    )


def written(path: Path, content: Content) -> None:
    """Write a file of the format that its suffix names, without code of lorakit."""
    rows, end = list(content.rows()), content.end
    if path.suffix in (".parquet", ".arrow"):
        pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        values = [value for text, after in rows for value in ([text] if after is None else [text, None])]
        table = pyarrow.table({"text": pyarrow.array(values, pyarrow.string())})
        if path.suffix == ".parquet":
            tables.write_table(table, path, row_group_size=2)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return
    if path.suffix == ".json":
        elements = [json.dumps({"text": text}, ensure_ascii=False) for text, _ in rows]
        whole = "[" + f" {end},{end}{end}".join(elements) + f"{end}]{end}"
    elif path.suffix == ".txt":
        whole = end.join(text for text, _ in rows)
    else:
        lines = ["id,text"] if path.suffix == ".csv" else []
        for text, after in rows:
            quoted = text.replace('"', '""')
            lines.append(f'1,"{quoted}"' if path.suffix == ".csv" else json.dumps({"text": text}, ensure_ascii=False))
            lines += [] if after is None else [after]
        whole = "".join(line + end for line in lines)
    path.write_bytes(content.bom + whole.encode() + content.invalid)


def expected(path: Path) -> list[tuple[str, int, int]]:
    """Return the text, offset and line (or number) of each valid row, found by json, csv or pyarrow."""
    if path.suffix == ".parquet":
        tables = pytest.importorskip("pyarrow.parquet")
        return numbered(tables.read_table(path).to_pylist())
    if path.suffix == ".arrow":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.ipc.open_file(path) as reader:
            return numbered(reader.read_all().to_pylist())
    raw = path.read_bytes()
    mark = 3 * raw.startswith(b"\xef\xbb\xbf")
    if path.suffix == ".json":
        return list(elements_of(raw, json.loads(raw[mark:]), mark + 1))
    if path.suffix == ".csv":
        return list(cells_of(raw[mark:].decode(), mark))
    found, at = [], 0
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            pairs = json.loads(line.decode("utf-8-sig" if at == 0 else "utf-8"), object_pairs_hook=list)
        except ValueError:
            pairs = []
        if isinstance(pairs, list) and len(pairs) == 1 and isinstance(pairs[0], tuple) and isinstance(pairs[0][1], str):
            found.append((pairs[0][1], at, number))
        at += len(line) + 1
    return found


def numbered(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(row["text"], at, at + 1) for at, row in enumerate(rows) if row["text"] is not None]


def elements_of(raw: bytes, rows: list[dict[str, str]], at: int) -> Iterator[tuple[str, int, int]]:
    for row in rows:
        at = raw.index(b"{", at)
        yield row["text"], at, 1 + raw.count(b"\n", 0, at)
        at += len(json.dumps(row, ensure_ascii=False).encode())


def cells_of(text: str, mark: int) -> Iterator[tuple[str, int, int]]:
    """Yield the rows of two cells; the csv module reads each line on its own behalf, so lines are counted."""
    lines = io.StringIO(text, newline="\n").readlines()  # as the module wants them: only \n ends a line
    reader, begin = csv.reader(iter(lines), strict=True), 0
    ends = [mark, *(mark + len("".join(lines[:count]).encode()) for count in range(1, len(lines) + 1))]
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = []
        if len(row) == 2 and begin:
            yield row[1], ends[begin], begin + 1
        begin = reader.line_num


@pytest.mark.costly
@pytest.mark.parametrize("suffix", SUFFIXES[:-1])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whole_and_streamed_rows_are_those_of_other_readers(suffix: str, tmp_path: Path, data: st.DataObject) -> None:
    if suffix in (".parquet", ".arrow"):
        pytest.importorskip("datasets")
    content = data.draw(contents(CELLS if suffix == ".csv" else LINES))
    path = tmp_path / f"a{suffix}"
    written(path, content)
    request = Request(skip_bad_rows=True)
    if content.invalid and suffix not in (".parquet", ".arrow"):
        with pytest.raises(DataError):
            read_records(path, request)
        if suffix != ".json":  # what follows the list is not a row
            valid = Content(content.texts, content.between, content.end, content.bom, content.is_long, b"")
            rows = list(open_stream([str(path)], request).rows(Place()))
            written(path, valid)
            assert [(row.start.offset, row.start.line) for row in rows] == [row[1:] for row in expected(path)]
        return
    rows = expected(path)
    stream = open_stream([str(path)], request)
    streamed = list(stream.rows(Place()))
    records = read_records(path, request)
    assert [(row.record.text, row.start.offset, row.start.line) for row in streamed] == rows  # type: ignore[union-attr]
    assert [(record.text, record.line) for record in records] == [(text, line) for text, _, line in rows]  # type: ignore[union-attr]
    assert [row.record for row in streamed] == list(records) == [records[at] for at in range(len(records))]
    assert list(records.some(range(0, len(records), 2))) == list(records)[::2]
    at = data.draw(st.integers(0, len(rows) - 1))
    assert list(stream.rows(streamed[at].start)) == streamed[at:]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents(LINES))
@example(content=Content(["\x85"], [], "\n", b"", False, b""))
def test_a_text_is_the_same_whole_and_in_parts(tmp_path: Path, content: Content) -> None:
    path = tmp_path / "a.txt"
    written(path, content)
    text = path.read_bytes().removesuffix(content.invalid).decode("utf-8-sig")
    request = Request()
    if not path.read_bytes().strip() or content.invalid:
        with pytest.raises(DataError):
            read_records(path, request)
        return
    (whole,) = read_records(path, request)
    assert isinstance(whole, Document) and whole.text == text
    if not text:
        with pytest.raises(DataError):
            open_stream([str(path)], request)
        return
    parts = list(open_stream([str(path)], request).rows(Place()))
    assert "".join(part.record.text for part in parts) == text  # type: ignore[union-attr]
    raw = path.read_bytes()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        begin, end = part.start.offset, None if following is None else following.start.offset
        assert raw[begin:end].decode("utf-8-sig" if begin == 0 else "utf-8") == part.record.text  # type: ignore[union-attr]
        assert part.start.line == 1 + raw.count(b"\n", 0, begin)
