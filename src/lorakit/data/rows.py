"""Check the rows of a source and keep their positions, from which their records are read again."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorakit.data.messages import BadRow
from lorakit.data.places import Content, Place, file_error
from lorakit.data.records import KEY_BYTES, Document
from lorakit.data.shapes import Request, checked_row, recognize
from lorakit.data.stored import DataFile
from lorakit.durable import JsonValue
from lorakit.errors import DataError
from lorakit.tables import format_count


def collect(content: Content, request: Request) -> tuple[DataFile, list[str]]:
    """Check every row of a source, find the shape from the first valid row, and return the positions and messages.

    Raises:
        DataError: A row does not fit and is not to be skipped, or no row fits.
    """
    source, noun = content.label, "row" if content.counts_rows else "line"
    starts, lines, bad = array("q"), array("q"), array("q")
    layout, reason, groups = None, "", bytearray()
    unused = Counter[str]()
    for row, place in content.read(Place()):
        try:
            if isinstance(row, BadRow):
                raise row
            assert not isinstance(row, Document)  # a whole text file has no rows
            layout = layout or recognize(list(checked_row(row)), request)
            layout.record(row, source, place.line, unused)
            groups += group_key(row, request)
        except BadRow as cause:
            bad.append(place.line)
            reason = reason or str(cause)
        else:
            starts.append(place.offset)
            lines.append(place.line)
    if bad and not (request.skip_bad_rows and lines):
        raise DataError(_bad_rows_message(source, reason, bad, noun), where=f"{source}:{bad[0]}")
    if layout is None:
        raise file_error(Path(source), "the data file has no rows.")
    notes = [f"{source}: {layout.text()}."] if layout.is_notable() else []
    if bad:
        notes.append(f"{source}: {format_count(len(bad), 'row')} skipped; the first is {noun} {bad[0]}: {reason}")
    if request.group is not None:
        del unused[request.group]
    if unused:
        names = ", ".join(f"'{name}' ({count:,} of {len(lines):,} rows)" for name, count in sorted(unused.items()))
        notes.append(f"{source}: unused columns: {names}.")
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
    given = columns[request.group]
    if isinstance(given, float) and given.is_integer():  # integers in a column with nulls
        given = int(given)
    if isinstance(given, int | float) and not isinstance(given, bool):  # text in CSV
        given = str(given)
    value = json.dumps(given, sort_keys=True, default=str)
    return hashlib.sha256(value.encode()).digest()[:KEY_BYTES]


def check_no_group(path: Path, request: Request) -> None:
    """Raise a DataError if a group column was requested for a text file, which has no columns."""
    if request.group is not None:
        raise DataError(
            f"{path}: a text file has no column '{request.group}'; omit --group.",
            what=request.group,
            where=path,
            field="group",
        )


def _bad_rows_message(source: str, reason: str, lines: Sequence[int], noun: str) -> str:
    """Return a message that describes the first invalid row of a file and lists the lines of the others."""
    first, *rest = lines
    message = f"{source}:{first}: {reason}"
    if not rest:
        return message
    listed = ", ".join(map(str, rest[:5])) + (", ..." if len(rest) > 5 else "")
    return f"{message} Other invalid rows in this file: {len(rest)} ({noun}s {listed})."
