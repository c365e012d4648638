"""Open data files and Hub data sets, and read them as a whole, keeping only the positions of their rows.

Error messages give the file, line and field, the invalid value, and the allowed values.

Python's language reference serves as training text that needs no download: the standard library includes it for
`help()` as `pydoc_data.topics`, with about 80 topics and half a million characters of prose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

from lorakit.data import columnar
from lorakit.data.places import Content, StreamedContent, check_kind, file_error, unreadable
from lorakit.data.records import Document, Records
from lorakit.data.rows import collect
from lorakit.data.shapes import Request
from lorakit.data.sources import HUB, SUFFIXES, TABLES, HubSource, expand
from lorakit.data.splitting import STRATIFIED, Split, SplitRule, split
from lorakit.data.stored import RecordFile, StoredRecords, WholeText
from lorakit.data.text_files import open_text
from lorakit.durable import write_text
from lorakit.errors import DataError, nearest
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
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    request = request or Request()
    files, notes = list[RecordFile](), list[str]()
    for source in expand(given):
        file, noted = _read(source, request)
        files.append(file)
        notes += noted
    return StoredRecords(files, notes)


def read_split(
    train: Iterable[str],
    held_out: Iterable[str] | None,
    fraction: float | None,
    seed: int,
    request: Request,
    rule: SplitRule = STRATIFIED,
) -> Split:
    """Read training and evaluation data; without evaluation data, hold out some of the training data.

    Raises:
        DataError: The data cannot be read; see `read_records`.
        ConfigError: The fraction is outside [0, 1).
    """
    records = read_records(train, request)
    if held_out is None:
        return split(records, fraction, seed, rule)
    names = list(held_out)
    return Split(records, read_records(names, replace(request, group=None)), f"Evaluation data: {', '.join(names)}.")


def _read(source: Path | HubSource, request: Request) -> tuple[RecordFile, list[str]]:
    """Check a source without keeping its text in memory; return its records and notes about it."""
    content = open_source(source, request, whole=True)
    return (content, []) if isinstance(content, WholeText) else collect(content, request)


@overload
def open_source(source: Path | HubSource, request: Request, *, whole: Literal[True]) -> Content | WholeText: ...
@overload
def open_source(source: Path | HubSource, request: Request, *, whole: Literal[False]) -> StreamedContent: ...
def open_source(source: Path | HubSource, request: Request, *, whole: bool) -> Content | WholeText:
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
        raise file_error(source, f"data file not found.{_neighbors(source)}") from None
    except OSError as cause:
        raise unreadable(source, cause) from cause


def _neighbors(path: Path) -> str:
    if not path.suffix and len(path.parts) == 2:
        return f" For a data set on the Hub, write {HUB}{path}."
    if not path.parent.is_dir():
        return f" The directory {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in SUFFIXES]
    near = nearest(path.name, names)
    return f" Similar: {', '.join(near)}." if near else ""


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
