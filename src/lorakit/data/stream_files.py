"""Read the rows of text files one after another, from any position, in memory that does not depend on the file's size.

JSON Lines files contain one row per line. A text file is divided into parts of at most `PART_BYTES` bytes that end at a
line break, so that reading can resume in the middle of a large file. Each part is tokenized on its own, but only the
beginning and the end of the file are marked with special tokens. CSV and TSV files, and JSON files that contain a list,
are read row by row; a row may extend over several lines.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

from lorakit.data.messages import BadRow
from lorakit.data.places import LargeFile, Place, Read
from lorakit.data.records import Document
from lorakit.data.rows import after, cells, check_no_group, header_of, named_cells, parse_row, skip_space
from lorakit.data.shapes import Request
from lorakit.data.sources import DELIMITED, LINES, TEXT
from lorakit.data.stored import READ_BYTES, file_error, line_of
from lorakit.durable import JsonValue
from lorakit.errors import DataError
from lorakit.file_hashes import FileStatus

PART_BYTES = 1 << 17
"""Maximum size in bytes of a part of a text file."""

MOST_CHARACTERS = 1 << 26
"""Maximum number of characters that are read to find the end of a row in a JSON list."""

_BEGINNING_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class StreamedFile(LargeFile):
    """A large text, JSON or CSV file; an offset is a number of bytes.

    Attributes:
        reader: Function that reads the rows of the open file from a position, to which the file has been moved.
    """

    reader: FileReader

    def bytes_before(self, offset: int) -> int:
        """Return the offset, which is in bytes."""
        return offset

    def read(self, at: Place) -> Read:
        """Yield the rows from a position to the end of the file.

        Raises:
            DataError: The file cannot be read, has changed since it was opened first, or has an error after which the
                next row cannot be found.
        """
        with self.open() as file:
            file.seek(at.offset)
            yield from self.reader(self, file, at)


FileReader: TypeAlias = Callable[[StreamedFile, IO[bytes], Place], Read]


def open_file(path: Path, request: Request) -> StreamedFile:
    """Open a text file as a stream.

    Args:
        path: The file; its suffix decides how it is read.
        request: The user's choices about columns and invalid rows.

    Raises:
        DataError: The file cannot be read or is empty, or the first row of a CSV file does not name the columns.
    """
    try:
        with path.open("rb") as file:
            status = FileStatus.of(file.fileno())
            if path.suffix.lower() in TEXT:
                check_no_group(path, request)
            if not file.read(len(_BOM) + 1).removeprefix(_BOM):
                raise file_error(path, "the data file is empty.")
            file.seek(0)
            reader = _reader(path, file)
    except OSError as cause:
        raise file_error(path, f"the data file cannot be read ({cause.strerror}).") from cause
    return StreamedFile(path, status, reader)


def _reader(path: Path, file: IO[bytes]) -> FileReader:
    suffix = path.suffix.lower()
    if suffix in TEXT:
        return _parts
    if suffix in DELIMITED:
        return partial(_rows_of_cells, *header_of(path, file))
    if suffix in LINES:
        return _lines
    begin = file.read(_BEGINNING_BYTES).decode("utf-8-sig", "ignore").lstrip()
    return _elements if begin.startswith("[") else _lines


def _lines(source: StreamedFile, file: IO[bytes], at: Place) -> Read:
    for number, raw in enumerate(file, start=at.line):
        row = _parsed(raw, is_first=at.offset == 0)
        if row is not None:
            yield row, Place(at.file, at.offset, number)
        at = Place(at.file, at.offset + len(raw))


def _parsed(raw: bytes, *, is_first: bool) -> JsonValue | BadRow:
    """Return the value of a line, the reason why it cannot be parsed, or None for a blank line."""
    try:
        text = line_of(raw, first=is_first)
    except UnicodeDecodeError as cause:
        return BadRow(f"not valid UTF-8 (byte 0x{raw[cause.start]:02x}).")
    if not text.strip():
        return None
    row = parse_row(text)
    return BadRow("a row must be a JSON object, not null.") if row is None else row


def _parts(source: StreamedFile, file: IO[bytes], at: Place) -> Read:
    while raw := file.read(PART_BYTES):
        raw = raw[: _cut(raw)]
        offset = at.offset + len(raw)
        file.seek(offset)
        yield _part(source, raw, at), at
        at = Place(at.file, offset, at.line + raw.count(b"\n"))


def _part(source: StreamedFile, raw: bytes, at: Place) -> BadRow | Document:
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


def _rows_of_cells(names: list[str], delimiter: str, source: StreamedFile, file: IO[bytes], at: Place) -> Read:
    found = cells(file, delimiter, at.offset, at.line)
    if at.offset == 0:
        next(found, None)  # the names of the columns
    for offset, line, row in found:
        yield named_cells(names, row), Place(at.file, offset, line)


def _elements(source: StreamedFile, file: IO[bytes], at: Place) -> Read:
    """Yield the elements of a JSON list; a position other than the beginning of the file is that of an element."""
    if at.offset == 0 and file.read(len(_BOM)) == _BOM:
        text = _Text(source.path, file, len(_BOM), at.line)
    else:
        file.seek(at.offset)
        text = _Text(source.path, file, at.offset, at.line)
    following = "[" if at.offset == 0 else ""
    while (element := text.element(following)) is not None:
        yield parse_row(element), Place(at.file, text.offset, text.line)
        following = ","


class _Text:
    """The text of a JSON list; only the part around the current element is kept.

    Attributes:
        offset: Byte offset of the element that was returned last.
        line: Its line number.
    """

    def __init__(self, path: Path, file: IO[bytes], offset: int, line: int) -> None:
        self.offset, self.line = offset, line
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._counted, self._is_whole = "", 0, 0, False

    def element(self, following: str) -> str | None:
        """Return the text of the next element, or None at the end of the list.

        Args:
            following: Character that must precede the element, or "".

        Raises:
            DataError: The text is not a JSON list, or an element is too long.
        """
        while True:
            begin = after(self._text, self._at, following)
            end = self._end(begin)
            if begin is not None and end is not None:
                self._count(begin)
                self._at = end
                return self._text[begin:end]
            if self._is_closed(following, begin):
                return None
            if self._is_whole or len(self._text) - self._at > MOST_CHARACTERS:
                self._count(begin or skip_space(self._text, self._at))
                limit = "" if self._is_whole else f" of at most {MOST_CHARACTERS:,} characters"
                raise self._error(
                    f"expected {following!r} and a value{limit}" if following else f"expected a value{limit}"
                )
            self._read_more()

    def _end(self, begin: int | None) -> int | None:
        """Return the end of the element at a position, or None if it is not known or not complete."""
        if begin is None:
            return None
        try:
            end = self._json.raw_decode(self._text, begin)[1]
        except (ValueError, RecursionError):
            return None
        # a number may continue in the next piece, so something must follow it
        return end if self._is_whole or skip_space(self._text, end) < len(self._text) else None

    def _is_closed(self, following: str, begin: int | None) -> bool:
        """Return whether the list ends here, and nothing follows it."""
        at = after(self._text, begin if following == "[" and begin is not None else self._at, "]")
        return at == len(self._text) and self._is_whole and (following != "[" or begin is not None)

    def _count(self, begin: int) -> None:
        """Move the offset and the line number to a position in the text."""
        passed = self._text[self._counted : begin]
        self.offset += len(passed.encode())
        self.line += passed.count("\n")
        self._counted = begin

    def _read_more(self) -> None:
        """Remove the elements that were returned, and at least double the rest, so that reading takes linear time."""
        self._count(self._at)
        rest = self._text[self._at :]
        raw = self._file.read(max(READ_BYTES, len(rest)))
        try:
            self._text = rest + self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as cause:
            raise self._error(
                f"not valid UTF-8 (byte 0x{cause.object[cause.start]:02x}) in this row or after it"
            ) from None
        self._at = self._counted = 0
        self._is_whole = not raw

    def _error(self, problem: str) -> DataError:
        where = f"{self._path}:{self.line}"
        return DataError(f"{where}: {problem}.", where=where)
