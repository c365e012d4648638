"""Open data files and Hub data sets, and read them as a whole, keeping only the positions of their rows, or as a
stream.

A stream indexes nothing and reads no row twice. Error messages give the file, line and field, the invalid value, and
the allowed values.

Python's language reference serves as training text that needs no download: the standard library includes it for
`help()` as `pydoc_data.topics`, with about 80 topics and half a million characters of prose.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.data import columnar
from lorakit.data.messages import BadRow
from lorakit.data.records import KEY_BYTES, Document, Record, Records
from lorakit.data.shapes import Layout, Request, checked_row, recognize
from lorakit.data.sources import (
    TABLES,
    Content,
    HubSource,
    Place,
    check_kind,
    expand,
    file_error,
    unreadable,
)
from lorakit.data.splitting import Split, split
from lorakit.data.stored import DataFile, StoredRecords
from lorakit.data.text_files import open_text
from lorakit.durable import JsonValue, write_text
from lorakit.errors import DataError
from lorakit.tables import format_count
from lorakit.terminal import working

DEFAULT_HELD_OUT = 0.1
"""Default fraction of the Python language reference topics to hold out."""


@working("reading data")
def read_records(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], request: Request | None = None
) -> StoredRecords:
    """Read files, directories, glob patterns or Hub data sets (`lorakit.data.sources`) in the given order.

    Formats may be mixed. Each record is reread from its file on access.

    Raises:
        DataError: A file is missing, empty, binary or not UTF-8, or a row does not fit the file's shape.
        ConfigError: `request` maps a column that the data does not have.
        MissingExtra: A format needs the package `datasets`.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    request = request or Request()
    files, notes = list[DataFile](), list[str]()
    for source in expand(names):
        file, noted = collect(open_source(source, request, whole=True), request)
        files.append(file)
        notes += noted
    return StoredRecords(files, notes)


def read_split(
    train: Iterable[str],
    held_out: Iterable[str] | None,
    fraction: float | None,
    seed: int,
    request: Request,
) -> Split:
    """Read training and evaluation data; without evaluation data, hold out some of the training data.

    Raises:
        DataError: The data cannot be read; see `read_records`.
        ConfigError: The fraction is outside [0, 1).
    """
    records = read_records(train, request)
    if held_out is None:
        return split(records, fraction, seed)
    names = list(held_out)
    return Split(records, read_records(names, replace(request, group=None)), f"Evaluation data: {', '.join(names)}.")


def open_source(source: Path | HubSource, request: Request, *, whole: bool) -> Content:
    """Open a source, to be read as a whole or as a stream.

    Raises:
        DataError: The source is missing, empty, damaged or of an unknown format.
        UsageError: A Hub data set cannot be read as a stream.
        MissingExtra: A format needs the package `datasets`.
    """
    if isinstance(source, HubSource):
        return columnar.map_hub(source) if whole else columnar.stream_hub(source)
    try:
        check_kind(source)
        if source.suffix.lower() in TABLES:
            return columnar.open_table(source)
        with source.open("rb") as file:
            return open_text(source, file, request, whole=whole)
    except FileNotFoundError:
        raise DataError.missing(source) from None
    except OSError as cause:
        raise unreadable(source, cause) from cause


def python_reference() -> Records:
    """Return Python's language reference as one document per topic, `python-reference/<topic>`, sorted by topic.

    Raises:
        DataError: This Python installation does not include the language reference.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as cause:
        raise DataError(
            "This Python installation lacks pydoc_data.topics, the language reference that help() shows; "
            "install the full standard library.",
            what="pydoc_data.topics",
        ) from cause
    return Records(Document(topics[name], f"python-reference/{name}") for name in sorted(topics))


def write_python_reference(
    directory: str | os.PathLike[str], held_out_fraction: float = DEFAULT_HELD_OUT, seed: int = 0
) -> tuple[Path, Path]:
    """Write Python's language reference to `train.jsonl` and `eval.jsonl` in a directory, and return their paths.

    Raises:
        ConfigError: The fraction is outside [0, 1).
        DataError: This Python installation does not include the language reference.
        DiskError: A file cannot be written.
    """
    parts = split(python_reference(), held_out_fraction, seed)
    paths = Path(directory) / "train.jsonl", Path(directory) / "eval.jsonl"
    for path, records in zip(paths, (parts.train, parts.held_out), strict=True):
        rows = [record for record in records if isinstance(record, Document)]
        write_text(path, "".join(json.dumps({"text": row.text}) + "\n" for row in rows))
    return paths


def collect(content: Content, request: Request) -> tuple[DataFile, list[str]]:
    """Check every row of a source, find the shape from the first valid row, and return the positions and messages.

    Raises:
        DataError: A row does not fit and is not to be skipped, or no row fits.
    """
    source, label, noun = RowSource(content, request), content.label, "row" if content.counts_rows else "line"
    starts, lines, bad = array("q"), array("q"), array("q")
    reason, groups = "", bytearray()
    unused = Counter[str]()
    for row, place in source.rows(Place(), unused):
        if isinstance(row, BadRow):
            bad.append(place.line)
            reason = reason or str(row)
        else:
            starts.append(place.offset)
            lines.append(place.line)
            groups += row.group
    if bad and not (request.skip_bad_rows and lines):
        raise DataError(_bad_rows_message(label, reason, bad, noun), where=f"{label}:{bad[0]}")
    if not lines:
        raise file_error(Path(label), "the data file has no rows.")
    layout = source.layout
    notes = [f"{label}: {layout.text()}."] if layout is not None and layout.is_notable() else []
    if bad:
        notes.append(f"{label}: {format_count(len(bad), 'row')} skipped; the first is {noun} {bad[0]}: {reason}")
    if request.group is not None:
        del unused[request.group]
    if unused:
        names = ", ".join(f"'{name}' ({count:,} of {len(lines):,} rows)" for name, count in sorted(unused.items()))
        notes.append(f"{label}: unused columns: {names}.")
    return DataFile(content, layout, starts, lines, groups), notes


def group_key(row: JsonValue, request: Request) -> bytes:
    """Return a key of a row's group, `KEY_BYTES` bytes, or b"" if no group column was requested.

    Numbers have the keys of their texts, so that a group has the same key in all formats. Without the column: BadRow.
    """
    if request.group is None:
        return b""
    columns = checked_row(row)
    if request.group not in columns:
        raise BadRow(
            f"the column '{request.group}' for --group is missing; the columns are {', '.join(map(repr, columns))}."
        )
    group = columns[request.group]
    if isinstance(group, float) and group.is_integer():  # integers in a column with nulls
        group = int(group)
    if isinstance(group, int | float) and not isinstance(group, bool):  # text in CSV
        group = str(group)
    value = json.dumps(group, sort_keys=True, default=str)
    return hashlib.sha256(value.encode()).digest()[:KEY_BYTES]


def _bad_rows_message(source: str, reason: str, lines: Sequence[int], noun: str) -> str:
    """Return a message that describes the first invalid row of a file and lists the lines of the others."""
    first, *rest = lines
    message = f"{source}:{first}: {reason}"
    if not rest:
        return message
    listed = ", ".join(map(str, rest[:5])) + (", ..." if len(rest) > 5 else "")
    return f"{message} Other invalid rows in this file: {len(rest)} ({noun}s {listed})."


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row and the position from which it is read; `group` is b"" if no group column was requested."""

    record: Record
    start: Place
    group: bytes = b""


@dataclass
class RowSource:
    """A file, table or Hub data set; the layout is that of the first row that fits, and a text file has none."""

    content: Content
    request: Request
    layout: Layout | None = None

    def rows(self, at: Place, unused: Counter[str]) -> Iterator[tuple[StreamedRow | BadRow, Place]]:
        """Yield the rows from a position to the end, or why they do not fit; unused columns are counted in place."""
        for row, place in self.content.read(at):
            try:
                checked: StreamedRow | BadRow = self._checked(row, place, unused)
            except BadRow as cause:
                checked = cause
            yield checked, place

    def _checked(self, row: JsonValue | BadRow | Document, place: Place, unused: Counter[str]) -> StreamedRow:
        if isinstance(row, BadRow):
            raise row
        if isinstance(row, Document):
            return StreamedRow(row, place)
        layout = self.layout or recognize(list(checked_row(row)), self.request)
        record = layout.record(row, self.content.label, place.line, unused)
        self.layout = layout
        return StreamedRow(record, place, group_key(row, self.request))


class RowStream:
    """The rows of several files and data sets, in order.

    `skipped` receives the location of each invalid row that is left out, and the reason; counts of unused columns in
    the rows read so far are in `unused`.
    """

    def __init__(
        self, sources: Iterable[RowSource], request: Request, skipped: Callable[[str, str], None] | None = None
    ) -> None:
        self.sources = tuple(sources)
        self.unused = Counter[str]()
        self._request = request
        self._skipped = skipped or (lambda where, reason: None)
        sizes = [source.content.size for source in self.sources]
        self._before = [sum(sizes[:number]) for number in range(len(sizes))]

    @property
    def total_bytes(self) -> int:
        """The total size in bytes, without data sets of unknown size."""
        return sum(source.content.size for source in self.sources)

    def bytes_before(self, place: Place) -> int:
        """Return the (estimated) number of bytes before a position, without data sets of unknown size."""
        content = self.sources[place.file].content
        return self._before[place.file] + min(content.size, content.bytes_before(place.offset))

    def rows(self, start: Place, last_source: int | None = None) -> Iterator[StreamedRow]:
        """Yield the rows from a position to the end of `last_source`, or of all files and data sets.

        Raises:
            DataError: The data cannot be read or has changed, or a row does not fit and is not to be skipped.
        """
        end = len(self.sources) if last_source is None else last_source + 1
        for number in range(start.file, end):
            yield from self._rows(self.sources[number], start if number == start.file else Place(number))

    def _rows(self, source: RowSource, at: Place) -> Iterator[StreamedRow]:
        for row, place in source.rows(at, self.unused):
            if not isinstance(row, BadRow):
                yield row
            elif not self._request.skip_bad_rows:
                raise _bad_row(source.content.label, place, row) from None
            else:
                self._skipped(f"{source.content.label}:{place.line}", str(row))


def _bad_row(label: str, place: Place, cause: BadRow) -> DataError:
    where = f"{label}:{place.line}"
    return DataError(f"{where}: {cause}", where=where, field="on_bad_row")


def open_stream(names: Iterable[str], request: Request, skipped: Callable[[str, str], None] | None = None) -> RowStream:
    """Open data as a stream; the shape of each file or data set is found in its first valid row.

    Raises:
        UsageError: A Hub data set cannot be read as a stream.
        DataError: A file is missing or empty, or its first row does not fit any shape.
        MissingExtra: A format needs the package `datasets`.
    """
    return RowStream([_opened(source, request) for source in expand(names)], request, skipped)


def streamable_bytes(names: Iterable[str]) -> int:
    """Return the total size of the data in bytes, or 0 if it is not known without the network or a file is missing."""
    sources = expand(names)
    paths = [source for source in sources if isinstance(source, Path) and source.is_file()]
    return sum(path.stat().st_size for path in paths) if len(paths) == len(sources) else 0


def _opened(source: Path | HubSource, request: Request) -> RowSource:
    opened = RowSource(open_source(source, request, whole=False), request)
    label = opened.content.label
    for row, place in opened.rows(Place(), Counter()):
        if not isinstance(row, BadRow):
            return opened
        if not request.skip_bad_rows:
            raise _bad_row(label, place, row) from None
    raise file_error(Path(label), "the data has no rows that fit.")
