"""Read Parquet and Arrow files and Hub data sets with the package `datasets`, which maps them into memory."""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.records import Record, content_key
from lorakit.data.rows import Parsed, collect
from lorakit.data.shapes import Layout, Request
from lorakit.data.sources import HubSource
from lorakit.data.stored import file_error
from lorakit.errors import DataError, MissingExtra
from lorakit.hub_cache import offline

if TYPE_CHECKING:
    from datasets import Dataset

_AT_ONCE = 1000


@dataclass(frozen=True)
class Table:
    """A table whose rows are converted to records on access.

    Attributes:
        label: Path or name to show in messages.
        data: The table.
        layout: The shape of the rows and the columns that supply its fields.
        rows: Index of each row that fits the shape.
        size: Size of the table in bytes.
        groups: Key of each row's group, `KEY_BYTES` bytes per row, or empty.
    """

    label: str
    data: Dataset
    layout: Layout
    rows: array[int]
    size: int
    groups: bytes | bytearray = b""

    def __len__(self) -> int:
        return len(self.rows)

    def bytes_of(self, index: int) -> int:
        """Return the mean size of a row in bytes."""
        return self.size // max(1, len(self.rows))

    def digest(self) -> tuple[str, str]:
        """Return the path or name, and the SHA-256 of the records' content keys."""
        digest = hashlib.sha256()
        for record, _ in self.records(range(len(self))):
            digest.update(content_key(record))
        return self.label, digest.hexdigest()

    def records(self, indexes: Iterable[int]) -> Iterator[tuple[Record, int]]:
        """Yield the records at the given indices, each with the mean size of a row in bytes."""
        for index in indexes:
            row = self.rows[index]
            yield self.layout.record(self.data[row], self.label, row + 1), self.bytes_of(index)


def read_table(path: Path, request: Request) -> tuple[Table, list[str]]:
    """Read a Parquet or Arrow file.

    Args:
        path: The file.
        request: The user's choices about columns and invalid rows.

    Returns:
        The table, and notes for the user.

    Raises:
        DataError: The file is damaged, or a row does not fit.
        MissingExtra: The package `datasets` is not installed.
    """
    kind = path.suffix.lower().removeprefix(".")
    try:
        return _table(str(path), request, kind, data_files=str(path), split="train")
    except LOADING_ERRORS as cause:
        raise file_error(path, f"not a valid {kind.capitalize()} file ({' '.join(str(cause).split())}).") from cause


def read_hub(source: HubSource, request: Request) -> tuple[Table, list[str]]:
    """Read a data set from the Hub; network access can be disabled if the data set is in the cache.

    Args:
        source: The data set.
        request: The user's choices about columns and invalid rows.

    Returns:
        The table, and notes for the user.

    Raises:
        DataError: The data set is not found or cannot be read, or a row does not fit.
        MissingExtra: The package `datasets` is not installed.
    """
    options = {"split": source.split, "revision": source.revision}
    try:
        return _table(str(source), request, source.name, source.config, **options)
    except LOADING_ERRORS as cause:
        variable = offline("HF_DATASETS_OFFLINE")
        where = f"in the cache (network access is off: {variable} is set)" if variable else "on the Hub"
        remedy = f"unset {variable}" if variable else "check the name and the network connection"
        raise DataError(
            f"{source}: not a file or directory, and no such data set {where} ({' '.join(str(cause).split())}). To use "
            f"it, {remedy}, or pass files.",
            where=str(source),
            field="data",
        ) from cause


LOADING_ERRORS = (OSError, ValueError, RuntimeError)
"""Base classes of the errors that `datasets` and `pyarrow` raise for missing or damaged data."""


def _table(label: str, request: Request, *names: str | None, **options: Any) -> tuple[Table, list[str]]:
    try:
        import datasets
    except ImportError as cause:
        raise MissingExtra(
            f"{label}: reading this data needs the package datasets: pip install 'lorakit[data]'", what="datasets"
        ) from cause
    with _quiet():
        data = datasets.load_dataset(*names, **options)
    media = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image | datasets.Audio)]
    data = data.remove_columns(media)  # decoding them is slow, and no shape uses them
    found = collect(label, _rows(data), request, "row")
    return Table(label, data, found.layout, found.starts, int(data.data.nbytes), found.groups), found.notes


def _rows(data: Dataset) -> Iterator[Parsed]:
    at = 0
    for batch in data.iter(batch_size=_AT_ONCE):
        for cells in zip(*batch.values(), strict=True):
            yield at, at + 1, dict(zip(batch, cells, strict=True))
            at += 1


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
