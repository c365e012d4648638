"""Records that stay in their files: a place per record is held, the text is read when it is asked for.

Knows files and places; how a row is parsed is the caller's. Knows nothing of tokens.
"""

from __future__ import annotations

import codecs
import itertools
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

from lorakit.data.records import Document, Record, Records
from lorakit.errors import DataError

READ_BYTES = 1 << 17
"""Bytes of a file that are held at once."""


class LongDocument(Document):
    """A text file that is read in pieces; `text` reads it whole."""

    __slots__ = ("_file",)
    _file: DataFile

    def __init__(self, file: DataFile) -> None:
        object.__setattr__(self, "_file", file)
        object.__setattr__(self, "source", str(file.path))
        object.__setattr__(self, "line", None)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """Return the text in pieces.

        Raises:
            DataError: The file cannot be read, or has changed.
        """
        with self._file.open() as file:
            yield from decoded(file)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file as it was when it was checked.

    Attributes:
        path: The file.
        size: Its bytes.
        changed_ns: Its time of change.
        row: Makes a record of a line and its number; None if the file is one document.
        starts: Offset of each row.
        lines: Line of each row.
    """

    path: Path
    size: int
    changed_ns: int
    row: Callable[[str, int], Record] | None = None
    starts: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return 1 if self.row is None else len(self.starts)

    def bytes_of(self, index: int) -> int:
        """Return the bytes on disk from the beginning of a record to that of the next."""
        if self.row is None:
            return self.size
        following = self.starts[index + 1] if index + 1 < len(self.starts) else self.size
        return following - self.starts[index]

    def open(self) -> IO[bytes]:
        """Open the file for reading.

        Raises:
            DataError: It cannot be read, or is not as it was when it was checked.
        """
        try:
            file = self.path.open("rb")
        except OSError as cause:
            raise DataError(
                f"{self.path}: the data file cannot be read ({cause.strerror}).", where=self.path
            ) from cause
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self.changed_ns):
            file.close()
            raise DataError(
                f"{self.path}: the data file changed while it was being read; start again.", where=self.path
            )
        return file

    def records(self, indexes: Iterable[int]) -> Iterator[tuple[Record, int]]:
        """Return records in the order given, each with its bytes on disk.

        Raises:
            DataError: As `open`.
        """
        if self.row is None:
            for _ in indexes:
                yield self._document(), self.size
            return
        with self.open() as file:
            for index in indexes:
                file.seek(self.starts[index])
                line = line_of(file.readline(), first=self.starts[index] == 0)
                yield self.row(line, self.lines[index]), self.bytes_of(index)

    def _document(self) -> Document:
        document = LongDocument(self)
        return document if self.size > READ_BYTES else Document(document.text, document.source)


class StoredRecords(Sequence[Record]):
    """Records of files, or some of them; each is read again whenever it is asked for.

    Args:
        files: The files, in order.
        notes: As `Records` has them.
        chosen: Which of the records, ascending; None for all.

    Attributes:
        notes: Sentences to print.
    """

    def __init__(self, files: Sequence[DataFile], notes: Iterable[str] = (), chosen: array[int] | None = None) -> None:
        self.notes = list(notes)
        self._files = list(files)
        self._begins = [0, *itertools.accumulate(len(file) for file in files)]
        self._chosen = chosen

    def __len__(self) -> int:
        return self._begins[-1] if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        wanted: Any = (range(len(self)) if self._chosen is None else self._chosen)[index]
        found = [record for record, _ in self._read(wanted if isinstance(index, slice) else [wanted])]
        return found if isinstance(index, slice) else found[0]

    def __iter__(self) -> Iterator[Record]:
        return (record for record, _ in self.sized())

    def sized(self) -> Iterator[tuple[Record, int]]:
        """Return the records, each with its bytes on disk.

        Raises:
            DataError: A file cannot be read, or has changed.
        """
        return self._read(range(len(self)) if self._chosen is None else self._chosen)

    def some(self, positions: Iterable[int], notes: Iterable[str] = ()) -> StoredRecords:
        """Return the records at some ascending positions.

        Args:
            positions: Positions in these records.
            notes: Sentences of the new records.
        """
        chosen = positions if self._chosen is None else (self._chosen[at] for at in positions)
        return StoredRecords(self._files, notes, array("q", chosen))

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of all these records."""
        if self._chosen is None:
            return sum(file.size for file in self._files)
        return sum(self._files[number].bytes_of(index) for number, index in map(self._place, self._chosen))

    def _place(self, position: int) -> tuple[int, int]:
        """The file of a record, by its position among all, and its number there."""
        number = bisect_right(self._begins, position) - 1
        return number, position - self._begins[number]

    def _read(self, positions: Iterable[int]) -> Iterator[tuple[Record, int]]:
        places = map(self._place, positions)
        for number, group in itertools.groupby(places, key=lambda place: place[0]):
            yield from self._files[number].records(index for _, index in group)


def line_of(raw: bytes, *, first: bool) -> str:
    """Return a line of a file as text, without its end.

    Args:
        raw: The bytes.
        first: Whether it is the first of the file, which may begin with a byte order mark.

    Raises:
        UnicodeDecodeError: It is not UTF-8.
    """
    return raw.decode("utf-8-sig" if first else "utf-8").removesuffix("\n")


def decoded(file: IO[bytes]) -> Iterator[str]:
    """Return the text of a UTF-8 file in pieces, without its byte order mark.

    Raises:
        UnicodeDecodeError: The bytes are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while raw := file.read(READ_BYTES):
        yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)


def sized(records: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """Return records, each with its bytes on disk; 0 for those that were not read from files."""
    return records.sized() if isinstance(records, StoredRecords) else ((record, 0) for record in records)


AnyRecords = Records | StoredRecords
"""Records in memory or in files; both have notes."""
