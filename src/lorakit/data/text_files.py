"""Read the rows of text files one after another, from any position, in memory that does not depend on the file's size.

JSON Lines files contain one row per line. A row of a CSV or TSV file, or of a JSON file with a list, may extend over
several lines. A stream divides a text file into parts of at most `PART_BYTES` bytes that end at a line break, so that
reading can resume in the middle. Each part is tokenized on its own, but only the beginning and the end of the file are
marked with special tokens.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, ClassVar, TypeAlias

from lorakit.data.json_list import ListText
from lorakit.data.messages import BadRow
from lorakit.data.records import Document
from lorakit.data.shapes import Request
from lorakit.data.sources import DELIMITED, LINES, TEXT, CheckedFile, Place, Read, file_error, unreadable
from lorakit.data.stored import READ_BYTES, whole_text
from lorakit.durable import JsonValue, parse_json
from lorakit.errors import DataError
from lorakit.file_hashes import FileStatus
from lorakit.tables import format_count

PART_BYTES = 1 << 17
"""Maximum size in bytes of a part of a text file."""

MOST_CHARACTERS = 1 << 26
"""Maximum number of characters that are read to find the end of a row in a JSON list."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile(CheckedFile):
    """A text, JSON or CSV file whose `reader` reads the rows from a position; an offset is a number of bytes."""

    counts_rows: ClassVar[bool] = False
    reader: Reader

    def bytes_before(self, offset: int) -> int:
        """Return the offset, which is in bytes."""
        return offset

    def read(self, at: Place) -> Read:
        """Yield the rows from a position to the end of the file.

        Raises:
            DataError: The file cannot be read, has changed, or has an error after which the next row cannot be found.
        """
        with self.open() as file:
            file.seek(at.offset)
            try:
                yield from self.reader(self, file, at)
            except OSError as cause:
                raise unreadable(self.path, cause) from cause


Reader: TypeAlias = Callable[[TextFile, IO[bytes], Place], Read]


def open_text(path: Path, file: IO[bytes], request: Request, *, whole: bool) -> TextFile:
    """Open a text file by its suffix; `whole` checks all text, allows rows of any size, and makes a text one document.

    Raises:
        DataError: The file is empty or not text, or the first row of a CSV file does not name the columns.
    """
    suffix, status = path.suffix.lower(), FileStatus.of(file.fileno())
    if suffix in TEXT:
        _check_no_group(path, request)
    if whole:
        _check_text(path, file)
    elif not file.read(len(_BOM) + 1).removeprefix(_BOM):
        raise file_error(path, "the data file is empty.")
    if suffix in TEXT:
        return TextFile(path, status, _document if whole else _parts)
    file.seek(0)
    return TextFile(path, status, _reader(path, file, whole=whole))


def _check_no_group(path: Path, request: Request) -> None:
    """Raise a DataError if a group column was requested for a text file, which has no columns."""
    if request.group is not None:
        text = f"{path}: a text file has no column '{request.group}'; omit --group."
        raise DataError(text, what=request.group, where=path, field="group")


def _reader(path: Path, file: IO[bytes], *, whole: bool) -> Reader:
    suffix = path.suffix.lower()
    if suffix in DELIMITED:
        return partial(_rows_of_cells, *_header(path, file), _LONGEST_CELL if whole else STREAMED_CELL)
    if suffix in LINES:
        return _lines
    if _begins_list(file):
        return partial(_elements, None if whole else MOST_CHARACTERS)
    if whole:
        _check_lines(path, file)
    return _lines


def _begins_list(file: IO[bytes]) -> bool:
    while piece := file.read(READ_BYTES):
        if text := piece.decode("utf-8-sig", "ignore").lstrip():
            return text.startswith("[")
    return False


def _check_text(path: Path, file: IO[bytes]) -> None:
    """Check in one pass that a file contains text, is not binary, and is valid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = lines = 0
    empty, piece = True, b" "
    while piece:
        piece = file.read(READ_BYTES)
        if at == 0:
            _check_beginning(path, piece)
        zero = piece.find(b"\0")
        if zero >= 0:
            raise file_error(
                path, f"the data file looks binary (null byte at offset {at + zero}); data files must be UTF-8 text."
            )
        rest = len(decoder.getstate()[0])  # the first bytes of a character that is split across pieces
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as cause:
            line = 1 + lines + cause.object[: cause.start].count(b"\n")
            raise file_error(
                path,
                f"not valid UTF-8: invalid byte 0x{cause.object[cause.start]:02x} at offset {at - rest + cause.start} "
                f"(line {line}). Convert the file to UTF-8 first.",
            ) from None
        empty = empty and not piece.strip()
        at, lines = at + len(piece), lines + piece.count(b"\n")
    if empty:
        raise file_error(path, "the data file is empty.")


_SIGNATURES = {
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8",
    b"\x89PNG": "a PNG image; training data must be text",
    b"\xff\xd8\xff": "a JPEG image; training data must be text",
    b"GIF8": "a GIF image; training data must be text",
    b"%PDF": "a PDF; save its text as UTF-8",
    b"PK\x03\x04": "a ZIP archive or an Office document; unpack it, or save it as CSV",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it",
    b"PAR1": "a Parquet file; give it the suffix .parquet",
    b"ARROW1": "an Arrow file; give it the suffix .arrow",
}
"""First bytes of a file -> what it is and what to do about it."""


def _check_beginning(path: Path, piece: bytes) -> None:
    """Reject a file whose first bytes are those of another format."""
    for signature, problem in _SIGNATURES.items():
        if piece.startswith(signature):
            raise file_error(path, f"the data file is {problem}.")


def _check_lines(path: Path, file: IO[bytes]) -> None:
    """Reject a file that is a single object, and say which of its fields contains rows."""
    file.seek(0)
    text = file.read().decode("utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return  # one object per line, or not valid JSON, which the check of the lines reports
    lists = [name for name, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    if lists and "\n" in text.strip():
        raise file_error(path, f"the file is a single object; write its list {lists[0]!r} to a file of its own.")


def _lines(source: TextFile, file: IO[bytes], at: Place) -> Read:
    # only \n ends a row; str.splitlines would also split JSON strings at characters such as U+2028
    for number, raw in enumerate(file, start=at.line):
        row = _parsed(raw, is_first=at.offset == 0)
        if row is not _BLANK:
            yield row, Place(at.file, at.offset, number)
        at = Place(at.file, at.offset + len(raw))


_BLANK = BadRow("the line is blank.")


def _parsed(raw: bytes, *, is_first: bool) -> JsonValue | BadRow:
    """Return the value of a line, `_BLANK`, or the reason why it cannot be parsed."""
    try:
        text = raw.decode("utf-8-sig" if is_first else "utf-8").removesuffix("\n")
    except UnicodeDecodeError as cause:
        return BadRow(f"not valid UTF-8 (byte 0x{raw[cause.start]:02x}).")
    return _value(text) if text.strip() else _BLANK


def _value(text: str) -> JsonValue | BadRow:
    """Return the value of a JSON text, or the reason why it cannot be parsed."""
    try:
        value: JsonValue = parse_json(text)
    except RecursionError:
        return BadRow("not valid JSON (nested too deeply).")
    except ValueError as cause:
        return BadRow(f"not valid JSON ({cause}).")
    return value


def _document(source: TextFile, file: IO[bytes], at: Place) -> Read:
    yield whole_text(source), at


def _parts(source: TextFile, file: IO[bytes], at: Place) -> Read:
    while raw := file.read(PART_BYTES):
        raw = raw[: _cut(raw)]
        offset = at.offset + len(raw)
        file.seek(offset)
        yield _part(source, raw, at), at
        at = Place(at.file, offset, at.line + raw.count(b"\n"))


def _part(source: TextFile, raw: bytes, at: Place) -> BadRow | Document:
    if b"\0" in raw:
        return BadRow("the data file looks binary (null byte); data files must be UTF-8 text.")
    try:
        text = raw.decode("utf-8-sig" if at.offset == 0 else "utf-8")
    except UnicodeDecodeError as cause:
        return BadRow(f"not valid UTF-8 (byte 0x{raw[cause.start]:02x}); convert the file first.")
    return Document(text, str(source.path), at.line, at.offset == 0, at.offset + len(raw) >= source.size)


def _cut(raw: bytes) -> int:
    """Return where to end a part: after its last line, else after its last word, else before its last character."""
    if len(raw) < PART_BYTES:
        return len(raw)
    end = raw.rfind(b"\n") + 1 or raw.rfind(b" ") + 1
    last = next((at for at in range(len(raw) - 1, len(raw) - 5, -1) if raw[at] & 0xC0 != 0x80), 0)
    return end or last or len(raw)


STREAMED_CELL = 1 << 24
"""Maximum number of characters of a CSV cell in a stream; a quote that is not closed would otherwise read all rows."""

_LONGEST_CELL = min(sys.maxsize, 2**31 - 1)
_DELIMITERS = ",;\t|"


def _header(path: Path, file: IO[bytes]) -> tuple[list[str], str]:
    """Return the distinct names of the columns of a CSV or TSV file, or a DataError, and the delimiter."""
    first = file.readline(STREAMED_CELL).decode("utf-8-sig", "replace")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first.count)
    file.seek(0)
    header, _ = next(_cells(file, delimiter, STREAMED_CELL, Place()), (BadRow("the file is empty."), None))
    names = [name.strip() for name in header] if isinstance(header, list) else []
    if not all(names) or not names or len(set(names)) < len(names):
        shown = ", ".join(map(repr, names)) or (str(header) if isinstance(header, BadRow) else "nothing")
        text = f"{path}:1: the first row must contain a distinct name for each column, not {shown}."
        raise DataError(text, where=f"{path}:1")
    return names, delimiter


def _cells(file: IO[bytes], delimiter: str, longest: int, at: Place) -> Iterator[tuple[list[str] | BadRow, Place]]:
    """Yield the cells of each row that is not blank, or why it has none, from the row at a position on."""
    source = _DecodedLines(file, at.offset)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        place = Place(at.file, source.offset, at.line + reader.line_num)
        try:
            row = _next_row(reader, longest)
        except csv.Error as cause:
            yield source.problem() or BadRow(f"not valid CSV ({cause})."), place
            continue
        if row is None:
            return
        problem = source.problem()
        if row or problem is not None:
            yield problem or row, place


class _DecodedLines(Iterator[str]):
    """The lines of a file; a line that is not UTF-8 is decoded with replacements, and the problem is kept."""

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
        problem, self._problem = self._problem, None
        return problem


def _next_row(reader: Iterator[list[str]], longest: int) -> list[str] | None:
    """Return the next row of a CSV reader, or None at the end; the limit of `csv` applies to the whole process."""
    before = csv.field_size_limit(longest)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _named_cells(names: Sequence[str], row: list[str] | BadRow) -> JsonValue | BadRow:
    """Return a row as a dict from column to cell, or the reason why it has none."""
    if isinstance(row, BadRow) or len(row) == len(names):
        return row if isinstance(row, BadRow) else dict(zip(names, row, strict=True))
    return BadRow(f"the row has {format_count(len(row), 'cell')}, but there are {format_count(len(names), 'column')}.")


def _rows_of_cells(
    names: list[str], delimiter: str, longest: int, source: TextFile, file: IO[bytes], at: Place
) -> Read:
    rows = _cells(file, delimiter, longest, at)
    if at.offset == 0:
        next(rows, None)  # the names of the columns
    return ((_named_cells(names, row), place) for row, place in rows)


def _elements(longest: int | None, source: TextFile, file: IO[bytes], at: Place) -> Read:
    """Yield the elements of a JSON list; a position other than the beginning of the file is that of an element."""
    begin = len(_BOM) if at.offset == 0 and file.read(len(_BOM)) == _BOM else at.offset
    file.seek(begin)
    text = ListText(source.path, file, begin, at.line, longest)
    following = "[" if at.offset == 0 else ""
    while (element := text.element(following)) is not None:
        yield _value(element), Place(at.file, text.offset, text.line)
        following = ","
