"""Read Parquet and Arrow files and Hub data sets with the packages `datasets` and `pyarrow`.

Rows are read one after another, from any position: of a Parquet file from the position's row group on, of an Arrow file
and a streamed Hub data set from the beginning, without converting the rows before the position. A Hub data set that is
read as a whole is mapped. The cache of `datasets` finds local files by path and modification time, so it is not used
for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from lorakit.data.messages import BadRow
from lorakit.data.sources import PARTIAL, CheckedFile, HubSource, Place, Read, file_error
from lorakit.durable import JsonObject
from lorakit.errors import DataError, MissingExtra, UsageError
from lorakit.file_hashes import FileStatus
from lorakit.hub_cache import offline

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset, Features, IterableDataset
    from pyarrow import RecordBatch

_AT_ONCE = 1000
_STREAMED_AT_ONCE = 256
_STREAM_BYTES = 1 << 20


@dataclass(frozen=True)
class HubRows:
    """The rows of a Hub data set, mapped into memory or streamed; an offset is a number of rows.

    Attributes:
        size: Size in bytes; of a stream, estimated, or 0 if the data set does not record its number of rows.
        version: Hash of the revision and the names of its files, of a stream.
        row_bytes: Mean size of one of its first rows as JSON, of a stream.
    """

    source: HubSource
    data: Dataset | IterableDataset
    size: int = 0
    version: str = ""
    row_bytes: float = 0.0
    counts_rows: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The name."""
        return str(self.source)

    def identity(self) -> str:
        """Return `PARTIAL` and a SHA-256 of the name and the version."""
        return PARTIAL + hashlib.sha256(f"{self.label}\n{self.version}".encode()).hexdigest()

    def bytes_before(self, offset: int) -> int:
        """Return the estimated number of bytes before a row."""
        return int(offset * self.row_bytes)

    def read(self, at: Place) -> Read:
        """Yield the rows from a position to the end; a DataError if the data set cannot be read."""
        with _raised_as(partial(_not_found, self.source)), _quiet():
            data = self.data.skip(at.offset) if at.offset else self.data
            rows: Iterable[JsonObject | BadRow] = data  # without features, the types of a column may differ
            if data.features is not None:
                tables = data.with_format("arrow").iter(batch_size=_AT_ONCE)
                rows = (row for table in tables for one in table.to_batches() for row in _values(one, data.features))
            for number, row in enumerate(rows, start=at.offset):
                yield row, Place(at.file, number, number + 1)


def map_hub(source: HubSource) -> HubRows:
    """Load a data set from the Hub; network access can be disabled if the data set is in the cache.

    Raises:
        DataError: The data set is not found or cannot be read.
        MissingExtra: The package `datasets` is not installed.
    """
    _check_installed(str(source))
    import datasets

    options = {"split": source.split, "revision": source.revision}
    with _raised_as(partial(_not_found, source)), _quiet(), contextlib.ExitStack() as stack:
        if Path(source.name).exists():  # a directory, whose rows stay mapped without their file
            options["cache_dir"] = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        data = datasets.load_dataset(source.name, source.config, **options)
        data = data.select_columns(_kept(data.features))
        return HubRows(source, data, int(data.data.nbytes))


@contextlib.contextmanager
def _raised_as(error: Callable[[str], DataError]) -> Iterator[None]:
    """Return a context manager that raises errors of `datasets` and `pyarrow` as those that a function returns."""
    try:
        yield
    except DataError:  # about a row; it is a ValueError too
        raise
    except LOADING_ERRORS as cause:
        raise error(" ".join(str(cause).split())) from cause


def _damaged(path: Path, reason: str) -> DataError:
    return file_error(path, f"not a valid {path.suffix.lower().removeprefix('.').capitalize()} file ({reason}).")


def _not_found(source: HubSource, reason: str) -> DataError:
    variable = offline("HF_DATASETS_OFFLINE")
    where = f"in the cache (network access is off: {variable} is set)" if variable else "on the Hub"
    remedy = f"unset {variable}" if variable else "check the name and the network connection"
    text = f"{source}: not a file or directory, and no such data set {where} ({reason})."
    return DataError(f"{text} To use it, {remedy}, or pass files.", where=str(source), field="data")


LOADING_ERRORS = (OSError, ValueError, RuntimeError)
"""Base classes of the errors that `datasets` and `pyarrow` raise for missing or damaged data."""


def _check_installed(label: str) -> None:
    try:
        import datasets  # noqa: F401 - it depends on pyarrow
    except ImportError as cause:
        text = f"{label}: reading this data needs the package datasets: pip install 'lorakit[data]'"
        raise MissingExtra(text, what="datasets") from cause


def _kept(features: Features) -> list[str]:
    """Return the columns without images and sound, whose decoding is slow, and which no shape uses."""
    import datasets

    return [name for name, kind in features.items() if not isinstance(kind, datasets.Image | datasets.Audio)]


def _classes(features: Features) -> dict[str, ClassLabel]:
    """Return a dict from each column of class numbers, or of lists of them, to the feature that has their names."""
    import datasets

    class_features = dict[str, Any]()
    for column, kind in features.items():
        while not isinstance(kind, datasets.ClassLabel) and kind is not None:
            kind = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
        if kind is not None:
            class_features[column] = kind
    return class_features


def _named(columns: dict[str, Any], classes: Mapping[str, ClassLabel]) -> dict[str, Any]:
    """Return columns of one row or of several, with the names of classes in place of their numbers."""
    return {name: _name(value, classes[name]) if name in classes else value for name, value in columns.items()}


def _name(value: Any, kind: ClassLabel) -> Any:
    if isinstance(value, list):
        return [_name(one, kind) for one in value]
    return None if value is None or value < 0 else kind.int2str(value)  # -1 marks a row without a label


def _values(batch: RecordBatch, features: Features) -> Iterator[JsonObject | BadRow]:
    """Yield the values of each row, with the names of classes, or the reason why they cannot be read."""
    classes = _classes(features)
    try:
        rows: Iterable[JsonObject | BadRow] = batch.to_pylist()
    except UnicodeDecodeError:  # neither format checks strings when it is read
        rows = (_row(batch, at) for at in range(batch.num_rows))
    for row in rows:
        yield row if isinstance(row, BadRow) else _named(features.decode_example(row), classes)


def _row(batch: RecordBatch, at: int) -> JsonObject | BadRow:
    row: JsonObject = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[at].as_py()
        except UnicodeDecodeError as cause:
            return BadRow(f"the field '{name}' is not valid UTF-8 (byte 0x{cause.object[cause.start]:02x}).")
    return row


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Return a context manager that turns off the progress bars and messages of `datasets`."""
    import logging

    import datasets

    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised too
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


@dataclass(frozen=True)
class TableFile(CheckedFile):
    """A Parquet or Arrow file that is read row by row; an offset is a number of rows.

    `row_bytes` is the mean size of a row in the file; for an Arrow file, of a row in its first batch.
    """

    row_bytes: float = 0.0
    counts_rows: ClassVar[bool] = True

    def bytes_before(self, offset: int) -> int:
        """Return the estimated number of bytes before a row."""
        return min(self.size, int(offset * self.row_bytes))

    def read(self, at: Place) -> Read:
        """Yield the rows from a position to the end; a DataError if the file is damaged or has changed."""
        import datasets

        with self.open() as file, _raised_as(partial(_damaged, self.path)):
            features = None
            for begin, batch in _batches(self.path, file, at.offset):
                if features is None:
                    features = datasets.Features.from_arrow_schema(batch.schema)
                    kept = _kept(features)
                first = max(begin, at.offset)
                rows = _values(batch.select(kept).slice(first - begin), features)
                yield from ((row, Place(at.file, number, number + 1)) for number, row in enumerate(rows, start=first))


def open_table(path: Path) -> TableFile:
    """Open a Parquet or Arrow file.

    Raises:
        DataError: The file is damaged.
        OSError: The file cannot be read.
        MissingExtra: The package `datasets` is not installed.
    """
    _check_installed(str(path))
    table = TableFile(path, FileStatus.of(path))
    with table.open() as file, _raised_as(partial(_damaged, path)):
        return replace(table, row_bytes=_row_bytes(path, file))


def _row_bytes(path: Path, file: IO[bytes]) -> float:
    """Return the mean size of a row in bytes, or 0 if there are no rows."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        count = parquet.read_metadata(file).num_rows
        return os.fstat(file.fileno()).st_size / count if count else 0.0
    batch = next((batch for _, batch in _batches(path, file, 0) if batch.num_rows), None)
    return 0.0 if batch is None else batch.nbytes / batch.num_rows


def _batches(path: Path, file: IO[bytes], start: int) -> Iterator[tuple[int, RecordBatch]]:
    """Yield the batches of rows of a file, each with the index of its first row, from the batch with a given row on."""
    begin = 0
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        # without a buffer or with a path, whole row groups are kept in memory
        table = parquet.ParquetFile(file, buffer_size=_STREAM_BYTES, pre_buffer=False)
        groups = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
        while groups and begin + groups[0] <= start:
            begin += groups.pop(0)
        following = range(table.num_row_groups - len(groups), table.num_row_groups)
        batches = table.iter_batches(_STREAMED_AT_ONCE, row_groups=following, use_threads=False)
    else:
        batches = _arrow_batches(file)
    for batch in batches:
        if begin + batch.num_rows > start:
            yield begin, batch
        begin += batch.num_rows


def _arrow_batches(file: IO[bytes]) -> Iterator[RecordBatch]:
    """Yield the batches of an Arrow file, which is in the stream format or in the file format."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_stream(file)
    except (OSError, pyarrow.ArrowInvalid):
        file.seek(0)
        random = pyarrow.ipc.open_file(file)
        yield from (random.get_batch(number) for number in range(random.num_record_batches))
        return
    yield from reader


def stream_hub(source: HubSource) -> HubRows:
    """Open a data set on the Hub as a stream; its rows are loaded when they are needed.

    Raises:
        UsageError: The name contains a slice of a split.
        DataError: The data set is not found or cannot be read.
        MissingExtra: The package `datasets` is not installed.
    """
    _check_installed(str(source))
    import datasets

    if "[" in source.split:
        text = f"{source}: a slice of a split cannot be streamed; omit the slice, or pass --streaming off."
        raise UsageError(text, what=source.split, where=str(source), field="streaming")
    with _raised_as(partial(_not_found, source)), _quiet():
        builder = datasets.load_dataset_builder(source.name, source.config, revision=source.revision)
        data = builder.as_streaming_dataset(split=source.split)
        if data.features is not None:
            data = data.select_columns(_kept(data.features))
    rows = HubRows(source, data, version=builder.hash or "")
    first = [len(json.dumps(row, default=str)) for row, _ in itertools.islice(rows.read(Place()), _STREAMED_AT_ONCE)]
    row_bytes = sum(first) / max(1, len(first))
    splits = builder.info.splits or {}
    counts = [splits[name].num_examples if name in splits else None for name in source.split.split("+")]
    known = sum(count for count in counts if count) if all(counts) else 0
    return replace(rows, size=int(known * row_bytes), row_bytes=row_bytes)
