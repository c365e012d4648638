"""Read data files with strict checks, each in one pass that keeps only the positions of its rows.

Text and Markdown files are one document each. The other formats contain rows: `lorakit.data.rows` parses JSON Lines,
JSON, CSV and TSV, and `lorakit.data.columnar` reads Parquet, Arrow and Hub data sets. Error messages give the file,
line and field, the invalid value, and the allowed values. This module does not depend on tokenizers.

Python's language reference serves as training text that needs no download. The standard library includes it for
`help()` as `pydoc_data.topics`, with about 80 topics and half a million characters of prose.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO

from lorakit.data import columnar
from lorakit.data.records import Document, Records
from lorakit.data.rows import PARSERS, check_no_group
from lorakit.data.shapes import Request
from lorakit.data.sources import HUB, SUFFIXES, TABLES, TEXT, HubSource, expand
from lorakit.data.splitting import STRATIFIED, Split, SplitRule, split
from lorakit.data.stored import READ_BYTES, DataFile, RecordFile, StoredRecords, check_kind, file_error
from lorakit.durable import write_text
from lorakit.errors import DataError, nearest
from lorakit.file_hashes import FileStatus
from lorakit.terminal import working

DEFAULT_HELD_OUT = 0.1
"""Default fraction of the Python language reference topics to hold out."""


@working("reading data")
def read_records(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], request: Request | None = None
) -> StoredRecords:
    """Read data in the given order; formats may be mixed.

    Args:
        paths: Files, directories, glob patterns or Hub data sets (see `lorakit.data.sources`).
        request: The user's choices about columns and invalid rows.

    Returns:
        The records in order, with notes about columns and skipped rows. Each record is reread from its file on access.

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

    Args:
        train: Names of the training data; see `read_records`.
        held_out: Names of the evaluation data, or None.
        fraction: Fraction of the training data to hold out if `held_out` is None; see `split`.
        seed: Seed that determines which records are held out.
        request: The user's choices about columns and invalid rows.
        rule: How records are selected.

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
    """Check a source without keeping its text in memory; return the source and notes about it."""
    if isinstance(source, HubSource):
        return columnar.read_hub(source, request)
    try:
        check_kind(source)
        if source.suffix.lower() in TABLES:
            return columnar.read_table(source, request)
        with source.open("rb") as file:
            status = FileStatus.of(file.fileno())
            _check_text(source, file)
            if source.suffix.lower() in TEXT:
                check_no_group(source, request)
                return DataFile(source, status), []
            file.seek(0)
            found, row = PARSERS[source.suffix.lower()](source, file, request)
    except FileNotFoundError:
        raise file_error(source, f"data file not found.{_neighbors(source)}") from None
    except OSError as cause:
        raise file_error(source, f"the data file cannot be read ({cause.strerror}).") from cause
    data = DataFile(source, status, row, found.starts, found.lines, found.layout, found.groups)
    return data, found.notes


def _neighbors(path: Path) -> str:
    if not path.suffix and len(path.parts) == 2:
        return f" For a data set on the Hub, write {HUB}{path}."
    if not path.parent.is_dir():
        return f" The directory {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in SUFFIXES]
    near = nearest(path.name, names)
    return f" Similar: {', '.join(near)}." if near else ""


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
        held = len(decoder.getstate()[0])  # the first bytes of a character that is split across pieces
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as cause:
            line = 1 + lines + cause.object[: cause.start].count(b"\n")
            raise file_error(
                path,
                f"not valid UTF-8: invalid byte 0x{cause.object[cause.start]:02x} at offset {at - held + cause.start} "
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


def python_reference() -> Records:
    """Return Python's language reference as one document per topic, sorted by topic name.

    Returns:
        The documents; each has the source `python-reference/<topic>`.

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
    """Write Python's language reference to two JSON Lines files: one for training, and one with the held-out topics.

    Args:
        directory: Directory for `train.jsonl` and `eval.jsonl`; created if it does not exist.
        held_out_fraction: Fraction of the topics to write to `eval.jsonl`.
        seed: Seed that determines which topics are held out.

    Returns:
        The paths of `train.jsonl` and `eval.jsonl`.

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
