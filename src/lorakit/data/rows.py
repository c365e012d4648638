"""Find and check the rows of text files: JSON Lines, JSON, CSV and TSV.

A file is read once. For each row, only its byte offset and line number are kept, and the row is parsed again when its
record is needed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

from lorakit.data.messages import BadRow
from lorakit.data.records import KEY_BYTES, Record
from lorakit.data.shapes import Layout, Request, checked_row, recognize
from lorakit.data.sources import DELIMITED, LINES
from lorakit.data.stored import file_error, line_of
from lorakit.durable import JsonValue, parse_json
from lorakit.errors import DataError
from lorakit.tables import format_count

Parsed: TypeAlias = tuple[int, int, JsonValue | BadRow]
"""Byte offset of a row, its line number, and its value or the reason why it cannot be parsed."""

RowParser: TypeAlias = Callable[[str, int], Record]
"""Function that builds a record from the text of a row and its line number."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file that fit its shape.

    Attributes:
        layout: The shape and its columns.
        starts: Byte offset or index of each row.
        lines: Line or row number of each row, starting at 1.
        notes: Messages for the user.
        groups: Key of each row's group, `KEY_BYTES` bytes per row; empty if no group column was requested.
    """

    layout: Layout
    starts: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    notes: list[str] = field(default_factory=list)
    groups: bytearray = field(default_factory=bytearray)


def collect(source: str, rows: Iterable[Parsed], request: Request, noun: str = "line") -> Rows:
    """Check every row of a file, and find the shape from the first row that is valid.

    Args:
        source: Path of the file, or another name to show in messages.
        rows: The rows, in order.
        request: The user's choices about columns and invalid rows.
        noun: What the second element of each row counts, for messages.

    Raises:
        DataError: A row does not fit and is not to be skipped, or no row fits.
    """
    starts, lines, bad = array("q"), array("q"), array("q")
    layout, reason, groups = None, "", bytearray()
    unused = Counter[str]()
    for start, line, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            layout = layout or recognize(list(checked_row(row)), request)
            layout.record(row, source, line, unused)
            groups += group_key(row, request)
        except BadRow as cause:
            bad.append(line)
            reason = reason or str(cause)
        else:
            starts.append(start)
            lines.append(line)
    if bad and not (request.skip_bad_rows and lines):
        raise DataError(_bad_rows_message(source, reason, bad, noun), where=f"{source}:{bad[0]}")
    if layout is None:
        raise file_error(Path(source), "the data file has no rows.")
    notes = [f"{source}: {layout.text()}."] if layout.is_notable() else []
    if bad:
        notes.append(f"{source}: {format_count(len(bad), 'row')} skipped; the first is {noun} {bad[0]}: {reason}")
    if request.group is not None:
        del unused[request.group]
    if unused:
        names = ", ".join(f"'{name}' ({count:,} of {len(lines):,} rows)" for name, count in sorted(unused.items()))
        notes.append(f"{source}: unused columns: {names}.")
    return Rows(layout, starts, lines, notes, groups)


def group_key(row: JsonValue, request: Request) -> bytes:
    """Return a key of a row's group, `KEY_BYTES` bytes, or b"" if no group column was requested.

    Numbers have the keys of their texts, so that a group has the same key in all formats.

    Raises:
        BadRow: The row does not have the column.
    """
    if request.group is None:
        return b""
    columns = checked_row(row)
    if request.group not in columns:
        raise BadRow(
            f"the column '{request.group}' for --group is missing; the columns are {', '.join(map(repr, columns))}."
        )
    given = columns[request.group]
    if isinstance(given, float) and given.is_integer():  # integers in a column with nulls
        given = int(given)
    if isinstance(given, int | float) and not isinstance(given, bool):  # text in CSV
        given = str(given)
    value = json.dumps(given, sort_keys=True, default=str)
    return hashlib.sha256(value.encode()).digest()[:KEY_BYTES]


def check_no_group(path: Path, request: Request) -> None:
    """Check that no group column was requested for a text file, which has no columns.

    Raises:
        DataError: A column was requested.
    """
    if request.group is not None:
        raise DataError(
            f"{path}: a text file has no column '{request.group}'; omit --group.",
            what=request.group,
            where=path,
            field="group",
        )


def _bad_rows_message(source: str, reason: str, lines: Sequence[int], noun: str) -> str:
    """Return a message that describes the first invalid row of a file and lists the lines of the others."""
    first, *rest = lines
    message = f"{source}:{first}: {reason}"
    if not rest:
        return message
    listed = ", ".join(map(str, rest[:5])) + (", ..." if len(rest) > 5 else "")
    return f"{message} Other invalid rows in this file: {len(rest)} ({noun}s {listed})."


def _json_lines(path: Path, file: IO[bytes], request: Request) -> tuple[Rows, RowParser]:
    found = collect(str(path), _lines(file), request)
    return found, partial(_element_record, found.layout, str(path))


def _lines(file: IO[bytes]) -> Iterator[Parsed]:
    at = 0
    # only \n ends a row; str.splitlines would also split JSON strings at characters such as U+2028
    for number, raw in enumerate(file, start=1):
        line = line_of(raw, first=at == 0)
        if line.strip():
            yield at, number, parse_row(line)
        at += len(raw)


def parse_row(text: str) -> JsonValue | BadRow:
    """Return the value of a JSON text, or the reason why it cannot be parsed."""
    try:
        row: JsonValue = parse_json(text)
    except RecursionError:
        return BadRow("not valid JSON (nested too deeply).")
    except ValueError as cause:
        return BadRow(f"not valid JSON ({cause}).")
    return row


def _json(path: Path, file: IO[bytes], request: Request) -> tuple[Rows, RowParser]:
    """Read a JSON file: a list of objects, or one object per line as in JSON Lines."""
    raw = file.read()
    text = raw.decode("utf-8-sig")
    if not text.lstrip().startswith("["):
        _check_lines(path, text)
        file.seek(0)
        return _json_lines(path, file, request)
    found = collect(str(path), _elements(path, text, len(raw) - len(text.encode())), request)
    return found, partial(_element_record, found.layout, str(path))


def _check_lines(path: Path, text: str) -> None:
    """Reject a file that is a single object, and say which of its fields contains rows."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return  # one object per line, or not valid JSON, which the check of the lines reports
    lists = [name for name, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    if lists and "\n" in text.strip():
        raise file_error(path, f"the file is a single object; write its list {lists[0]!r} to a file of its own.")


_SPACE = re.compile(r"[ \t\r\n]*")


def _elements(path: Path, text: str, offset: int) -> Iterator[Parsed]:
    """Yield the elements of a JSON list, each with its byte offset; `offset` is the size of a byte order mark."""
    decoder, line = json.JSONDecoder(), 1
    at, following = 0, "["
    while True:
        begin = after(text, at, following)
        if begin is None and following == "," and (closed := after(text, at, "]")) is not None and closed == len(text):
            return
        if begin is not None and following == "[" and after(text, begin, "]") == len(text):
            return
        try:
            end = len(text) if begin is None else decoder.raw_decode(text, begin)[1]
        except (ValueError, RecursionError):
            begin = None
        line += text.count("\n", at, begin or at)
        if begin is None:
            raise DataError(
                f"{path}:{line}: not valid JSON: expected {following!r} and a value.", where=f"{path}:{line}"
            )
        offset += len(text[at:begin].encode())
        yield offset, line, parse_row(text[begin:end])
        offset += len(text[begin:end].encode())
        line += text.count("\n", begin, end)
        at, following = end, ","


def after(text: str, at: int, character: str) -> int | None:
    """Return the position after a character and the white space around it, or None if something else follows.

    Args:
        text: JSON text.
        at: Position in the text.
        character: The character, or "" for white space alone.
    """
    begin = skip_space(text, at)
    end = begin + len(character)
    return skip_space(text, end) if text[begin:end] == character else None


def skip_space(text: str, at: int) -> int:
    """Return the position after the white space at a position."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _element_record(layout: Layout, source: str, text: str, number: int) -> Record:
    text = text.lstrip()
    _, end = json.JSONDecoder().raw_decode(text)
    return layout.record(parse_json(text[:end]), source, number)


STREAMED_CELL = 1 << 24
"""Maximum number of characters of a CSV cell in a stream; a quote that is not closed would otherwise read all rows."""

_LONGEST_CELL = min(sys.maxsize, 2**31 - 1)
_DELIMITERS = ",;\t|"


def _delimited(path: Path, file: IO[bytes], request: Request) -> tuple[Rows, RowParser]:
    """Read a CSV or TSV file; every value is a string, and the first row contains the names of the columns."""
    names, delimiter = header_of(path, file)
    file.seek(0)
    rows = itertools.islice(cells(file, delimiter, longest=_LONGEST_CELL), 1, None)
    found = collect(str(path), ((start, line, named_cells(names, row)) for start, line, row in rows), request)
    return found, partial(_cells_record, found.layout, str(path), names, delimiter)


def header_of(path: Path, file: IO[bytes]) -> tuple[list[str], str]:
    """Return the names of the columns of a CSV or TSV file, and the delimiter.

    Args:
        path: The file.
        file: The open file, at its beginning.

    Raises:
        DataError: The first row does not contain a distinct name for each column.
    """
    first = file.readline(STREAMED_CELL).decode("utf-8-sig", "replace")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first.count)
    file.seek(0)
    _, _, header = next(cells(file, delimiter), (0, 1, BadRow("the file is empty.")))
    names = [name.strip() for name in header] if isinstance(header, list) else []
    if not all(names) or not names or len(set(names)) < len(names):
        shown = ", ".join(map(repr, names)) or (str(header) if isinstance(header, BadRow) else "nothing")
        raise DataError(
            f"{path}:1: the first row must contain a distinct name for each column, not {shown}.", where=f"{path}:1"
        )
    return names, delimiter


def cells(
    file: IO[bytes], delimiter: str, offset: int = 0, line: int = 1, longest: int | None = None
) -> Iterator[tuple[int, int, list[str] | BadRow]]:
    """Yield the byte offset, line number and cells of each row that is not blank.

    Args:
        file: The open file, at the beginning of a row.
        delimiter: Character between cells.
        offset: Byte offset of this row.
        line: Line number of this row.
        longest: Maximum number of characters of a cell; None means `STREAMED_CELL`.
    """
    source = _DecodedLines(file, offset)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    limit = STREAMED_CELL if longest is None else longest
    while True:
        at, number = source.offset, line + reader.line_num
        try:
            row = _next_row(reader, limit)
        except csv.Error as cause:
            yield at, number, source.problem() or BadRow(f"not valid CSV ({cause}).")
            continue
        if row is None:
            return
        problem = source.problem()
        if row or problem is not None:
            yield at, number, problem or row


class _DecodedLines(Iterator[str]):
    """The lines of a file; a line that is not UTF-8 is decoded with replacements, and the problem is kept.

    Attributes:
        offset: Byte offset of the next line.
    """

    def __init__(self, file: IO[bytes], offset: int) -> None:
        self.offset = offset
        self._file = file
        self._problem: BadRow | None = None

    def __next__(self) -> str:
        raw = next(self._file)
        encoding = "utf-8-sig" if self.offset == 0 else "utf-8"
        self.offset += len(raw)
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as cause:
            self._problem = BadRow(f"not valid UTF-8 (byte 0x{cause.object[cause.start]:02x}).")
            return raw.decode(encoding, "replace")

    def problem(self) -> BadRow | None:
        """Return the problem of the lines read since the last call, or None."""
        found, self._problem = self._problem, None
        return found


def _next_row(reader: Iterator[list[str]], longest: int) -> list[str] | None:
    """Return the next row of a CSV reader, or None at the end; the limit of `csv` applies to the whole process."""
    before = csv.field_size_limit(longest)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def named_cells(names: Sequence[str], row: list[str] | BadRow) -> JsonValue | BadRow:
    """Return a row as a dict from column to cell, or the reason why it has none."""
    if isinstance(row, BadRow) or len(row) == len(names):
        return row if isinstance(row, BadRow) else dict(zip(names, row, strict=True))
    return BadRow(f"the row has {format_count(len(row), 'cell')}, but there are {format_count(len(names), 'column')}.")


def _cells_record(layout: Layout, source: str, names: Sequence[str], delimiter: str, text: str, number: int) -> Record:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    row = _next_row(reader, _LONGEST_CELL) or []
    return layout.record(dict(zip(names, row, strict=True)), source, number)


PARSERS: dict[str, Callable[[Path, IO[bytes], Request], tuple[Rows, RowParser]]] = {
    **dict.fromkeys(LINES, _json_lines),
    ".json": _json,
    **dict.fromkeys(DELIMITED, _delimited),
}
"""Suffix -> function that checks a file and returns its rows and a parser for one row."""
