"""Records that are read from their files on access; only each record's position is kept in memory."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.records import Document, ReadOnAccess, Record, Records, content_key, keys_of
from lorakit.data.shapes import Layout, common_layout
from lorakit.data.sources import CHANGED, CheckedFile, Content, Place, file_error
from lorakit.durable import JsonObject

READ_BYTES = 1 << 17
"""Maximum number of bytes read from a file at a time."""


class PiecewiseDocument(Document):
    """A document that is read in pieces by a function; the `text` property joins them."""

    __slots__ = ("_read",)
    _read: Callable[[], Iterator[str]]

    def __init__(self, source: str, line: int | None, read: Callable[[], Iterator[str]], *, is_last: bool) -> None:
        values = {"source": source, "line": line, "is_first": True, "is_last": is_last, "_read": read}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces; a DataError if the file cannot be read, or has changed."""
        return self._read()


def whole_text(file: CheckedFile) -> Document:
    """Return a text file as one document, whose text is in memory if it is short."""
    document = PiecewiseDocument(file.label, None, partial(_decoded, file), is_last=True)
    return document if file.size > READ_BYTES else Document(document.text, document.source)


def _decoded(checked: CheckedFile) -> Iterator[str]:
    """Decode a UTF-8 file and yield its text in pieces, without the byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with checked.open() as file:
        while raw := file.read(READ_BYTES):
            yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)


def _range(whole: Document, begin: int, end: int | None) -> Iterator[str]:
    """Yield the characters of a document from `begin` to `end` in pieces."""
    at = 0
    for piece in whole.pieces():
        part = piece[max(0, begin - at) : None if end is None else max(0, end - at)]
        at += len(piece)
        if part:
            yield part


@dataclass(frozen=True)
class DataFile:
    """The rows of a file, table or Hub data set that fit its shape; only their positions are kept.

    Attributes:
        layout: Shape and columns of the rows; None if the file is one document.
        starts: Offset of each row.
        lines: Line or row number of each row.
        groups: Key of the group of each row, `KEY_BYTES` bytes each, or nothing without a group column.
        begin: Character of each document from which it is used.
        end: Character up to which it is used, or None; after a cut, the text begins again, but it does not end.
        fraction: Fraction of the characters that are used, for sizes in bytes.
    """

    content: Content
    layout: Layout | None
    starts: array[int]
    lines: array[int]
    groups: bytes | bytearray
    begin: int = 0
    end: int | None = None
    fraction: float = 1.0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def size(self) -> int:
        """Size in bytes, approximate if only a part of each document is used."""
        return round(self.content.size * self.fraction)

    def bytes_of(self, index: int) -> int:
        """Return the bytes from a row's start to that of the next row; in a table, the mean size of a row."""
        if self.content.counts_rows:
            return self.size // len(self)
        following = self.starts[index + 1] if index + 1 < len(self) else self.content.size
        return round((following - self.starts[index]) * self.fraction)

    def records(self, indexes: Iterable[int]) -> Iterator[tuple[Record, int]]:
        """Yield the records at the given indices with their size on disk in bytes; a DataError if they changed."""
        rows, following = self.content.read(Place()), 0
        for index in indexes:
            place = Place(0, self.starts[index], self.lines[index])
            if index != following and not (self.content.counts_rows and 0 < following < index):
                rows = self.content.read(place)
            row = next((row for row, at in rows if at.offset == place.offset), None)
            if not isinstance(row, dict | Document):  # it was one when it was checked
                raise file_error(Path(self.content.label), CHANGED)
            following = index + 1
            yield self._used(row, place.line), self.bytes_of(index)

    def _used(self, row: JsonObject | Document, line: int) -> Record:
        """Return the record of a row, or the part of a document that is used."""
        record: Record
        if isinstance(row, Document):
            record = row
        else:
            assert self.layout is not None  # the rows of a file without one are documents
            record = self.layout.record(row, self.content.label, line)
        if not isinstance(record, Document) or self.fraction == 1:
            return record
        read = partial(_range, record, self.begin, self.end)
        return PiecewiseDocument(record.source, record.line, read, is_last=self.end is None)

    def digest(self) -> tuple[str, str]:
        """Return the path or name, and a SHA-256 of the file, or of the content keys of a data set's records."""
        if isinstance(self.content, CheckedFile):
            return self.content.digest()
        digest = hashlib.sha256()
        for record, _ in self.records(range(len(self))):
            digest.update(content_key(record))
        return self.content.label, digest.hexdigest()


class StoredRecords(ReadOnAccess[Record]):
    """A sequence of all or some of the records in a list of files; each access rereads the record from its file.

    `chosen` are the ascending positions of the selected records within the records of all files combined; None selects
    all. The shape is None, and `columns` empty, if they differ between files.
    """

    def __init__(self, files: Sequence[DataFile], notes: Iterable[str] = (), chosen: array[int] | None = None) -> None:
        self.notes = list(notes)
        self._files = list(files)
        self._begins = [0, *itertools.accumulate(len(file) for file in files)]
        self._chosen = chosen
        self._digests: list[tuple[str, str]] = []
        self.shape, self.columns = common_layout(file.layout for file in files)

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[Record]:
        return (record for record, _ in self.sized())

    def _all(self) -> Sequence[int]:
        """Return the positions of these records within the records of all files combined."""
        return range(self._begins[-1]) if self._chosen is None else self._chosen

    def sized(self) -> Iterator[tuple[Record, int]]:
        """Yield the records, each with its size on disk in bytes; a DataError if a file has changed."""
        return self._sized(self._all())

    def some(self, positions: Iterable[int], notes: Iterable[str] = ()) -> StoredRecords:
        """Return the records at the given positions, which are in ascending order."""
        chosen = self._all()
        part = StoredRecords(self._files, notes, array("q", (chosen[at] for at in positions)))
        part._digests = self._digests
        return part

    def cut(self, at: int, fraction: float) -> tuple[StoredRecords, StoredRecords]:
        """Return all documents up to a character, and the rest of the first one."""
        files = [replace(file, end=file.begin + at, fraction=file.fraction * fraction) for file in self._files]
        first = self._files[0]
        rest = replace(first, begin=first.begin + at, fraction=first.fraction * (1 - fraction))
        return StoredRecords(files, self.notes), StoredRecords([rest], chosen=array("q", [0]))

    def digests(self) -> dict[str, str]:
        """Return a dict from the path or name of each file to a SHA-256 of its content; each file is hashed once."""
        if not self._digests:
            self._digests += [file.digest() for file in self._files]
        return dict(self._digests)

    def group_keys(self) -> np.ndarray[Any, Any] | None:
        """Return the key of each record's group, shape (records,), or None if no group column was requested."""
        joined = b"".join(bytes(file.groups) for file in self._files)
        return keys_of(joined)[np.asarray(self._all(), dtype=np.int64)] if joined else None

    def identity(self) -> str:
        """Return a SHA-256 of the names, contents and layouts of the files and of the selection of their records."""
        self.digests()
        ranges = [[file.begin, file.end] for file in self._files]
        all_layouts = [file.layout for file in self._files]
        layouts = [one and [one.shape.name, dict(one.columns), dict(one.optional)] for one in all_layouts]
        digest = hashlib.sha256(json.dumps([self._digests, self._begins, ranges, layouts]).encode())
        digest.update(np.asarray(self._all(), dtype=np.int64).tobytes())
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        """The total size of these records on disk, in bytes."""
        if self._chosen is None:
            return sum(file.size for file in self._files)
        return sum(self._files[number].bytes_of(index) for number, index in map(self._place, self._all()))

    def _place(self, position: int) -> tuple[int, int]:
        """Return the index of a record's file and the record's index in that file, given its overall position."""
        number = bisect_right(self._begins, position) - 1
        return number, position - self._begins[number]

    def _read(self, indexes: Iterable[int]) -> Iterator[Record]:
        chosen = self._all()
        return (record for record, _ in self._sized(chosen[at] for at in indexes))

    def _sized(self, positions: Iterable[int]) -> Iterator[tuple[Record, int]]:
        targets = map(self._place, positions)
        for number, group in itertools.groupby(targets, key=lambda target: target[0]):
            yield from self._files[number].records(index for _, index in group)


def sized(records: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """Yield each record with its size on disk in bytes (0 for records in memory)."""
    return records.sized() if isinstance(records, StoredRecords) else ((record, 0) for record in records)


AnyRecords = Records | StoredRecords
"""Records in memory or in files; both types carry notes."""
