"""Read data files with strict checks: text and Markdown as one document per file, JSON Lines as one record per line.

Error messages give the file, line and field, the invalid value, and the allowed values. This module does not depend
on tokenizers.

Python's language reference serves as training text that needs no download. The standard library includes it for
`help()` as `pydoc_data.topics`, with about 80 topics and half a million characters of prose.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from lorakit.data.loader import split
from lorakit.data.records import ROLES, Completion, Conversation, Document, Message, Record, Records
from lorakit.data.stored import READ_BYTES, DataFile, StoredRecords, file_error, line_of
from lorakit.durable import JsonValue, parse_json, write_text
from lorakit.errors import DataError, did_you_mean, nearest

TEXT_SUFFIXES = (".txt", ".md")
"""Suffixes of files that are read as one document each."""

ROWS_SUFFIX = ".jsonl"
"""Suffix of files with one JSON object per line."""

SHAPES = (("text",), ("prompt", "completion"), ("messages",))
"""The allowed sets of fields; each row must have exactly one of them."""

_FIELDS = tuple(field for shape in SHAPES for field in shape)
_ALLOWED = "'text', or 'prompt' and 'completion', or 'messages'"

DEFAULT_HELD_OUT = 0.1
"""Default fraction of the Python language reference topics to hold out."""


class _BadRow(Exception):
    """An invalid row; the message describes the problem but not the row's location."""


def read_records(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> StoredRecords:
    """Read data files in the given order; file types may be mixed.

    Args:
        paths: One or more paths, each ending in `.txt`, `.md` or `.jsonl`.

    Returns:
        The records in order, with notes about unused columns. Each record is reread from its file on access.

    Raises:
        DataError: A file is missing, empty, binary or not UTF-8, or a row is not valid JSON with one of the allowed
            sets of fields.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise DataError("No data file was given; pass at least one that ends in .txt, .md or .jsonl.")
    files, notes = [], []
    for name in given:
        file, noted = _read_file(Path(name))
        files.append(file)
        notes += noted
    return StoredRecords(files, notes)


def _read_file(path: Path) -> tuple[DataFile, list[str]]:
    """Check a file without keeping its text in memory; return the file and notes about it."""
    try:
        _check_kind(path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            _check_text(path, file)
            if path.suffix.lower() != ROWS_SUFFIX:
                return DataFile(path, status.st_size, status.st_mtime_ns), []
            file.seek(0)
            starts, lines, notes = _read_rows(path, file)
    except FileNotFoundError:
        raise file_error(path, f"data file not found.{_neighbors(path)}") from None
    except OSError as cause:
        raise file_error(path, f"the data file cannot be read ({cause.strerror}).") from cause
    return DataFile(path, status.st_size, status.st_mtime_ns, partial(_row, str(path)), starts, lines), notes


def _check_kind(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise file_error(path, "this is a directory; pass the data files in it individually.")
    if not stat.S_ISREG(mode):
        raise file_error(path, "not a regular file; write the data to a regular file first.")
    if path.suffix.lower() not in (*TEXT_SUFFIXES, ROWS_SUFFIX):
        hint = " Convert the .json file to .jsonl: one object per line." if path.suffix.lower() == ".json" else ""
        raise file_error(path, f"data files must end in .txt, .md or .jsonl, not '{path.suffix}'.{hint}")


def _neighbors(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The directory {path.parent} does not exist either."
    kept = (*TEXT_SUFFIXES, ROWS_SUFFIX)
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in kept]
    near = nearest(path.name, names)
    return f" Similar: {', '.join(near)}." if near else ""


def _check_text(path: Path, file: IO[bytes]) -> None:
    """Check in one pass that a file contains text, is not binary, and is valid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = lines = 0
    empty, piece = True, b" "
    while piece:
        piece = file.read(READ_BYTES)
        if at == 0 and piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise file_error(path, "the data file is UTF-16; save it as UTF-8.")
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


def _read_rows(path: Path, file: IO[bytes]) -> tuple[array[int], array[int], list[str]]:
    """Check every row; return each row's byte offset and line number, and notes about the file."""
    starts, lines = array("q"), array("q")
    bad, reason = array("q"), ""
    unused: Counter[str] = Counter()
    at = 0
    # only \n ends a row; str.splitlines would also split JSON strings at characters such as U+2028
    for number, raw in enumerate(file, start=1):
        line = line_of(raw, first=at == 0)
        if line.strip():
            starts.append(at)
            lines.append(number)
            try:
                _row(str(path), line, number, unused)
            except _BadRow as cause:
                bad.append(number)
                reason = reason or str(cause)
        at += len(raw)
    if bad:
        raise DataError(_bad_rows_message(path, reason, bad), where=f"{path}:{bad[0]}")
    return starts, lines, [_unused_note(path, unused, len(starts))] if unused else []


def _bad_rows_message(path: Path, reason: str, lines: Sequence[int]) -> str:
    """Return a message that describes the first invalid row of a file and lists the lines of the others."""
    first, *rest = lines
    message = f"{path}:{first}: {reason}"
    if not rest:
        return message
    listed = ", ".join(map(str, rest[:5])) + (", ..." if len(rest) > 5 else "")
    return f"{message} Other invalid rows in this file: {len(rest)} (lines {listed})."


def _unused_note(path: Path, unused: Counter[str], rows: int) -> str:
    names = ", ".join(f"'{name}' ({count:,} of {rows:,} rows)" for name, count in sorted(unused.items()))
    return f"{path}: unused columns: {names}."


def _row(source: str, line: str, number: int, unused: Counter[str] | None = None) -> Record:
    """Parse a line of a file and add its unused columns to the counts in `unused`, if given."""
    try:
        row = parse_json(line)
    except RecursionError:
        raise _BadRow("not valid JSON (nested too deeply).") from None
    except ValueError as cause:
        raise _BadRow(f"not valid JSON ({cause}).") from None
    if not isinstance(row, dict):
        raise _BadRow(f"a row must be a JSON object, not {_named(row)}.")
    shape, unused = _shape(row), Counter() if unused is None else unused
    unused.update(name for name in row if name not in shape)
    if shape == ("text",):
        return Document(_string(row, "text"), source, number)
    if shape == ("messages",):
        return Conversation(_messages(row["messages"], unused), source, number)
    return Completion(_string(row, "prompt"), _string(row, "completion"), source, number)


def _shape(row: dict[str, Any]) -> tuple[str, ...]:
    present = [shape for shape in SHAPES if any(field in row for field in shape)]
    if len(present) > 1:
        names = " and ".join(f"'{field}'" for field in _FIELDS if field in row)
        raise _BadRow(f"a row must have {_ALLOWED}; this one has {names}.")
    if not present:
        names = ", ".join(f"'{name}'" for name in list(row)[:8]) or "no fields"
        hints = [f"'{field}' instead of '{name}'" for name in row for field in nearest(name.lower(), list(_FIELDS), 1)]
        hint = f" Did you mean {', '.join(hints[:2])}?" if hints else ""
        raise _BadRow(f"a row must have {_ALLOWED}; this one has {names}.{hint}")
    for field in present[0]:
        if field not in row:
            raise _BadRow(f"the field '{field}' is missing; a row must have {_ALLOWED}.")
    return present[0]


def _string(row: dict[str, Any], field: str, where: str = "") -> str:
    value = row[field]
    if not isinstance(value, str):
        raise _BadRow(f"the field '{where}{field}' is {_named(value)}; it must be a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise _BadRow(
            f"the field '{where}{field}' contains an unpaired surrogate (\\u{ord(value[cause.start]):04x}) at "
            f"character {cause.start}; remove or replace it."
        ) from None
    return value


def _messages(value: JsonValue, unused: Counter[str]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else _named(value)
        raise _BadRow(f"the field 'messages' is {came}; it must be a list of objects with 'role' and 'content'.")
    return tuple(_message(item, f"messages[{index}]", unused) for index, item in enumerate(value))


def _message(item: JsonValue, where: str, unused: Counter[str]) -> Message:
    if not isinstance(item, dict):
        raise _BadRow(f"the field '{where}' is {_named(item)}; it must be an object with 'role' and 'content'.")
    for field in ("role", "content"):
        if field not in item:
            raise _BadRow(f"the field '{where}.{field}' is missing; a message must have 'role' and 'content'.")
    role = _string(item, "role", f"{where}.")
    if role not in ROLES:
        allowed = f"{', '.join(ROLES)}.{did_you_mean(role, ROLES)}"
        raise _BadRow(f"the field '{where}.role' is '{role}'; it must be one of {allowed}")
    unused.update(f"messages[].{name}" for name in item if name not in ("role", "content"))
    return Message(role, _string(item, "content", f"{where}."))


def _named(value: JsonValue) -> str:
    """Describe a JSON value by its type, and by the value itself if it is a scalar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value[:30]!r}"
    return "a list" if isinstance(value, list) else "an object"


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
