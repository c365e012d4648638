"""Reads data files strictly: text and Markdown as one document each, JSON Lines as one record a row.

What is wrong is said with file, line, field, what came and what is allowed. Knows nothing of tokens.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakit.data.records import ROLES, Completion, Conversation, Document, Message, Record, Records
from lorakit.durable import parse_json
from lorakit.errors import DataError, nearest

TEXT_SUFFIXES = (".txt", ".md")
"""Files that are one document each."""

ROWS_SUFFIX = ".jsonl"
"""Files that hold one JSON object a line."""

SHAPES = (("text",), ("prompt", "completion"), ("messages",))
"""The sets of fields that a row may have; exactly one of them."""

_FIELDS = tuple(field for shape in SHAPES for field in shape)
_ALLOWED = "'text', or 'prompt' and 'completion', or 'messages'"
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class _BadRow(Exception):
    """What is wrong with a row, without its place."""


def read_records(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Records:
    """Read data files, in the order given; kinds may be mixed.

    Args:
        paths: One path or several, ending in `.txt`, `.md` or `.jsonl`.

    Returns:
        The records in order, with notes about columns that are not used.

    Raises:
        DataError: A file is missing, empty, binary or not UTF-8, or a row is not one of the allowed shapes.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise DataError("No data file was given; give at least one that ends in .txt, .md or .jsonl.")
    records = Records()
    for name in given:
        path = Path(name)
        text = _read_text(path)
        if path.suffix.lower() == ROWS_SUFFIX:
            rows, notes = _read_rows(path, text)
            records.extend(rows)
            records.notes.extend(notes)
        else:
            records.append(Document(text, str(path)))
    return records


def _read_text(path: Path) -> str:
    _check_kind(path)
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise DataError(f"{path}: the data file cannot be read ({cause.strerror}).") from cause
    if not data.strip():
        raise DataError(f"{path}: the data file is empty; there is nothing to learn from.")
    return _decode(path, data)


def _check_kind(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such data file.{_neighbours(path)}") from None
    except OSError as cause:
        raise DataError(f"{path}: the data file cannot be read ({cause.strerror}).") from cause
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: is a directory; give the data files in it, each by its name.")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is not a regular file; write the data to a file first.")
    if path.suffix.lower() not in (*TEXT_SUFFIXES, ROWS_SUFFIX):
        hint = " A .json file becomes .jsonl by writing one object a line." if path.suffix.lower() == ".json" else ""
        raise DataError(f"{path}: data files end in .txt, .md or .jsonl, not in '{path.suffix}'.{hint}")


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    kept = (*TEXT_SUFFIXES, ROWS_SUFFIX)
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in kept]
    near = nearest(path.name, names)
    return f" Near it: {', '.join(near)}." if near else ""


def _decode(path: Path, data: bytes) -> str:
    mark = _BYTE_ORDER_MARKS.get(data[:2])
    if mark:
        raise DataError(f"{path}: the data file is {mark}; save it as UTF-8.")
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path}: looks binary (a zero byte at offset {zero}); data files are UTF-8 text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise DataError(
            f"{path}: is not UTF-8: the byte 0x{data[cause.start]:02x} at offset {cause.start} (line {line}) "
            "begins no character. Convert the file to UTF-8 first."
        ) from None


def _read_rows(path: Path, text: str) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    bad: list[tuple[int, str]] = []
    unused: Counter[str] = Counter()
    rows = 0
    # only \n ends a row: str.splitlines would also cut inside strings, at U+2028 and its like
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        rows += 1
        try:
            records.append(_row(line, str(path), number, unused))
        except _BadRow as reason:
            bad.append((number, str(reason)))
    if bad:
        raise DataError(_bad_rows(path, bad))
    return records, [_unused_note(path, unused, rows)] if unused else []


def _bad_rows(path: Path, bad: list[tuple[int, str]]) -> str:
    first, reason = bad[0]
    message = f"{path}:{first}: {reason}"
    if len(bad) == 1:
        return message
    lines = ", ".join(str(number) for number, _ in bad[1:6])
    more = ", ..." if len(bad) > 6 else ""
    return f"{message} {len(bad) - 1} more rows of this file are bad (lines {lines}{more})."


def _unused_note(path: Path, unused: Counter[str], rows: int) -> str:
    names = ", ".join(f"'{name}' ({count:,} of {rows:,} rows)" for name, count in sorted(unused.items()))
    return f"{path}: these columns are not used: {names}."


def _row(line: str, source: str, number: int, unused: Counter[str]) -> Record:
    try:
        row = parse_json(line)
    except RecursionError:
        raise _BadRow("not valid JSON (nested too deeply).") from None
    except ValueError as cause:
        raise _BadRow(f"not valid JSON ({cause}).") from None
    if not isinstance(row, dict):
        raise _BadRow(f"a row is a JSON object, not {_named(row)}.")
    shape = _shape(row)
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
        raise _BadRow(f"a row has {_ALLOWED}; this one has {names}.")
    if not present:
        names = ", ".join(f"'{name}'" for name in list(row)[:8]) or "no fields"
        hints = [f"'{field}' for '{name}'" for name in row for field in nearest(name.lower(), list(_FIELDS), 1)]
        hint = f" Perhaps {', '.join(hints[:2])}?" if hints else ""
        raise _BadRow(f"a row has {_ALLOWED}; this one has {names}.{hint}")
    for field in present[0]:
        if field not in row:
            raise _BadRow(f"the field '{field}' is missing; a row has {_ALLOWED}.")
    return present[0]


def _string(row: dict[str, Any], field: str, where: str = "") -> str:
    value = row[field]
    if not isinstance(value, str):
        raise _BadRow(f"the field '{where}{field}' is {_named(value)}; a string is needed.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise _BadRow(
            f"the field '{where}{field}' holds half of a surrogate pair (\\u{ord(value[cause.start]):04x}) at "
            f"character {cause.start}, which is no character."
        ) from None
    return value


def _messages(value: Any, unused: Counter[str]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        came = "an empty list" if value == [] else _named(value)
        raise _BadRow(f"the field 'messages' is {came}; a list of objects with 'role' and 'content' is needed.")
    return tuple(_message(item, f"messages[{index}]", unused) for index, item in enumerate(value))


def _message(item: Any, where: str, unused: Counter[str]) -> Message:
    if not isinstance(item, dict):
        raise _BadRow(f"the field '{where}' is {_named(item)}; an object with 'role' and 'content' is needed.")
    for field in ("role", "content"):
        if field not in item:
            raise _BadRow(f"the field '{where}.{field}' is missing; a message has 'role' and 'content'.")
    role = _string(item, "role", f"{where}.")
    if role not in ROLES:
        near = nearest(role, list(ROLES), 1)
        hint = f" Perhaps '{near[0]}'?" if near else ""
        raise _BadRow(f"the field '{where}.role' is '{role}'; allowed: {', '.join(ROLES)}.{hint}")
    unused.update(f"messages[].{name}" for name in item if name not in ("role", "content"))
    return Message(role, _string(item, "content", f"{where}."))


def _named(value: Any) -> str:
    """What a JSON value is, in words, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value[:30]!r}"
    return "a list" if isinstance(value, list) else "an object"
