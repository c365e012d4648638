"""Read the rows of large data one after another, from any position; nothing is indexed and no row is read twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.data.messages import BadRow
from lorakit.data.places import Place, StreamedContent, file_error
from lorakit.data.reading import open_source
from lorakit.data.records import Document, Record
from lorakit.data.rows import group_key
from lorakit.data.shapes import Layout, Request, checked_row, recognize
from lorakit.data.sources import TEXT, HubSource, expand
from lorakit.errors import DataError


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row and the position from which it is read; `group` is b"" if no group column was requested."""

    record: Record
    start: Place
    group: bytes = b""


@dataclass(frozen=True)
class StreamedSource:
    """A file, table or Hub data set that is read as a stream; a text file has no layout."""

    content: StreamedContent
    layout: Layout | None = None


class RowStream:
    """The rows of several files and data sets, in order.

    `skipped` receives the location of each invalid row that is left out, and the reason; counts of unused columns in
    the rows read so far are in `unused`.
    """

    def __init__(
        self, sources: Iterable[StreamedSource], request: Request, skipped: Callable[[str, str], None] | None = None
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

    def _rows(self, source: StreamedSource, at: Place) -> Iterator[StreamedRow]:
        label = source.content.label
        for row, place in source.content.read(at):
            try:
                if isinstance(row, BadRow):
                    raise row
                if isinstance(row, Document):
                    yield StreamedRow(row, place)
                elif source.layout is not None:
                    record = source.layout.record(row, label, place.line, self.unused)
                    yield StreamedRow(record, place, group_key(row, self._request))
            except BadRow as cause:
                if not self._request.skip_bad_rows:
                    raise _bad_row(label, place, cause) from None
                self._skipped(f"{label}:{place.line}", str(cause))


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


def _opened(source: Path | HubSource, request: Request) -> StreamedSource:
    content = open_source(source, request, whole=False)
    is_text = isinstance(source, Path) and source.suffix.lower() in TEXT
    return StreamedSource(content, None if is_text else _layout(content, request))


def _layout(content: StreamedContent, request: Request) -> Layout:
    for row, place in content.read(Place()):
        try:
            if isinstance(row, BadRow):
                raise row
            assert not isinstance(row, Document)  # text files have no layout
            layout = recognize(list(checked_row(row)), request)
            layout.record(row, content.label, place.line, Counter())
            return layout
        except BadRow as cause:
            if not request.skip_bad_rows:
                raise _bad_row(content.label, place, cause) from None
    raise file_error(Path(content.label), "the data has no rows that fit.")
