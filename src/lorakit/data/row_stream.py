"""Read the rows of large files one after another, from any position; nothing is indexed and no row is read twice.

JSON Lines files contain one row per line. A text file is divided into parts of at most `PART_BYTES` bytes that end at a
line break, so that reading can resume in the middle of a large file. Each part is tokenized on its own, but only the
beginning and the end of the file are marked with special tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lorakit.data.messages import BadRow
from lorakit.data.records import Record
from lorakit.data.rows import check_no_group, group_key, parse_row
from lorakit.data.shapes import Layout, Request, checked_row, recognize
from lorakit.data.sources import LINES, TEXT, HubSource, expand
from lorakit.data.stored import DocumentPart, file_error, line_of, open_unchanged
from lorakit.durable import JsonValue
from lorakit.errors import DataError, UsageError

PART_BYTES = 1 << 17
"""Maximum size in bytes of a part of a text file."""

STREAMED = (*TEXT, *LINES)
"""Suffixes of files that can be read as streams."""

PARTIAL = "partial:"
"""Prefix of the identity of a file whose content was hashed only in part."""

_ENDS_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A position between two rows.

    Attributes:
        file: Index of the file.
        offset: Byte offset in the file.
        line: Line number at this offset, starting at 1.
    """

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row and its position.

    Attributes:
        record: The row's record.
        start: Position from which the row is read.
        end: Position after the row.
        group: Key of the row's group, or b"" if no group column was requested.
    """

    record: Record
    start: Place
    end: Place
    group: bytes = b""


@dataclass(frozen=True)
class StreamedFile:
    """A large data file, with the size and modification time that it had when it was opened first.

    Attributes:
        path: The file.
        size: Size in bytes.
        changed_ns: Modification time in nanoseconds.
        layout: Shape and columns of the rows; None for a text file.
    """

    path: Path
    size: int
    changed_ns: int
    layout: Layout | None = None

    def open(self) -> IO[bytes]:
        """Open the file for reading.

        Raises:
            DataError: The file cannot be read, or has changed since it was opened first.
        """
        return open_unchanged(self.path, self.size, self.changed_ns)

    def identity(self) -> str:
        """Return `PARTIAL` and a SHA-256 of the size, the modification time, and the first and last MiB of the file."""
        with self.open() as file:
            digest = hashlib.sha256(f"{self.size} {self.changed_ns}\n".encode())
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, self.size - _ENDS_BYTES))
            digest.update(file.read(_ENDS_BYTES))
        return PARTIAL + digest.hexdigest()


class RowStream:
    """The rows of several files, in order.

    Args:
        files: The files, at least one.
        request: The user's choices about columns and invalid rows.
        skipped: Function that receives the location of each invalid row that is left out, and the reason.

    Attributes:
        files: The files.
        unused: Counts of unused columns in the rows read so far, keyed by name.
    """

    def __init__(
        self, files: Iterable[StreamedFile], request: Request, skipped: Callable[[str, str], None] | None = None
    ) -> None:
        self.files = tuple(files)
        self.unused = Counter[str]()
        self._request = request
        self._skipped = skipped or (lambda where, reason: None)
        self._before = [sum(file.size for file in self.files[:number]) for number in range(len(self.files))]

    @property
    def total_bytes(self) -> int:
        """The total size of the files in bytes."""
        return sum(file.size for file in self.files)

    def bytes_before(self, place: Place) -> int:
        """Return the number of bytes of all files before a position."""
        return self._before[place.file] + place.offset

    def rows(self, start: Place, last_file: int | None = None) -> Iterator[StreamedRow]:
        """Yield the rows from a position to the end of the last file.

        Args:
            start: The position, from `StreamedRow` or `Place()`.
            last_file: Index of the last file to read; None means all files.

        Raises:
            DataError: A file cannot be read or has changed, or a row does not fit and is not to be skipped.
        """
        end = len(self.files) if last_file is None else last_file + 1
        for number in range(start.file, end):
            at = start if number == start.file else Place(number)
            with self.files[number].open() as file:
                file.seek(at.offset)
                yield from self._rows(self.files[number], file, at)

    def _rows(self, source: StreamedFile, file: IO[bytes], at: Place) -> Iterator[StreamedRow]:
        read = _parts if source.layout is None else _lines
        for row, line, start, end in read(source, file, at):
            try:
                if isinstance(row, BadRow):
                    raise row
                if isinstance(row, DocumentPart):
                    yield StreamedRow(row, start, end)
                elif source.layout is not None:
                    record = source.layout.record(row, str(source.path), line, self.unused)
                    yield StreamedRow(record, start, end, group_key(row, self._request))
            except BadRow as cause:
                where = f"{source.path}:{line}"
                if not self._request.skip_bad_rows:
                    raise DataError(f"{where}: {cause}", where=where, field="on_bad_row") from None
                self._skipped(where, str(cause))


_Read = Iterator[tuple[JsonValue | BadRow | DocumentPart, int, Place, Place]]
"""A row or the reason why it cannot be parsed, its line number, and the positions before and after it."""


def _lines(source: StreamedFile, file: IO[bytes], at: Place) -> _Read:
    for number, raw in enumerate(file, start=at.line):
        end = Place(at.file, at.offset + len(raw), number + 1)
        row = _parsed(raw, is_first=at.offset == 0)
        if row is not None:
            yield row, number, at, end
        at = end


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


def _parts(source: StreamedFile, file: IO[bytes], at: Place) -> _Read:
    while raw := file.read(PART_BYTES):
        raw = raw[: _cut(raw)]
        offset = at.offset + len(raw)
        file.seek(offset)
        end = Place(at.file, offset, at.line + raw.count(b"\n"))
        yield _part(source, raw, at), at.line, at, end
        at = end


def _part(source: StreamedFile, raw: bytes, at: Place) -> BadRow | DocumentPart:
    if b"\0" in raw:
        return BadRow("the data file looks binary (null byte); data files must be UTF-8 text.")
    try:
        text = raw.decode("utf-8-sig" if at.offset == 0 else "utf-8")
    except UnicodeDecodeError as cause:
        return BadRow(f"not valid UTF-8 (byte 0x{raw[cause.start]:02x}); convert the file first.")
    return DocumentPart(text, str(source.path), at.line, at.offset == 0, at.offset + len(raw) >= source.size)


def _cut(raw: bytes) -> int:
    """Return where to end a part: after its last line, else after its last word, else before its last character."""
    if len(raw) < PART_BYTES:
        return len(raw)
    end = raw.rfind(b"\n") + 1 or raw.rfind(b" ") + 1
    last = next((at for at in range(len(raw) - 1, len(raw) - 5, -1) if raw[at] & 0xC0 != 0x80), 0)
    return end or last or len(raw)


def open_stream(names: Iterable[str], request: Request, skipped: Callable[[str, str], None] | None = None) -> RowStream:
    """Open files as a stream; the shape of each file is found in its first valid row.

    Args:
        names: Files, directories or glob patterns.
        request: The user's choices about columns and invalid rows.
        skipped: Function that receives the location of each invalid row that is left out, and the reason.

    Raises:
        UsageError: A file or data set cannot be read as a stream.
        DataError: A file is missing or empty, or its first row does not fit any shape.
    """
    found = expand(names)
    odd = [str(source) for source in found if isinstance(source, HubSource) or source.suffix.lower() not in STREAMED]
    if odd:
        raise UsageError(
            f"{odd[0]}: cannot be streamed; only {', '.join(STREAMED)} can. Convert the data to JSON Lines, or pass "
            "--streaming off.",
            what=odd[0],
            field="streaming",
            allowed=STREAMED,
        )
    return RowStream([_opened(source, request) for source in found if isinstance(source, Path)], request, skipped)


def streamable_bytes(names: Iterable[str]) -> int:
    """Return the total size of the data in bytes if all of it can be read as streams, else 0."""
    found = expand(names)
    paths = [source for source in found if isinstance(source, Path) and source.suffix.lower() in STREAMED]
    return sum(path.stat().st_size for path in paths if path.is_file()) if len(paths) == len(found) else 0


def _opened(path: Path, request: Request) -> StreamedFile:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            is_text = path.suffix.lower() in TEXT
            if is_text:
                check_no_group(path, request)
            if not file.read(len(_BOM) + 1).removeprefix(_BOM):
                raise file_error(path, "the data file is empty.")
            file.seek(0)
            layout = None if is_text else _layout(path, file, request)
    except FileNotFoundError:
        raise file_error(path, "data file not found.") from None
    except OSError as cause:
        raise file_error(path, f"the data file cannot be read ({cause.strerror}).") from cause
    return StreamedFile(path, status.st_size, status.st_mtime_ns, layout)


def _layout(path: Path, file: IO[bytes], request: Request) -> Layout:
    at = 0
    for number, raw in enumerate(file, start=1):
        try:
            row = _parsed(raw, is_first=at == 0)
            if isinstance(row, BadRow):
                raise row
            if row is not None:
                layout = recognize(list(checked_row(row)), request)
                layout.record(row, str(path), number, Counter())
                return layout
        except BadRow as cause:
            if not request.skip_bad_rows:
                raise DataError(f"{path}:{number}: {cause}", where=f"{path}:{number}", field="on_bad_row") from None
        at += len(raw)
    raise file_error(path, "the data file has no rows that fit.")
