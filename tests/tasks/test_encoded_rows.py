"""Rows as flat buffers are the rows from which they were made."""

from __future__ import annotations

from array import array

import pytest

from lorakit.data.encoding import Sequence
from lorakit.tasks.encoded_rows import StoredRows

IDS = array("i", [5, 6, 7])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Sequence(IDS, array("i", [2])), Sequence(IDS[:1], array("i", [0, 1]))],
        [Sequence(IDS, array("d", [0.25])), Sequence(IDS, array("d"))],
        [Sequence(IDS, array("i", [1]), types=array("i", [0, 0, 1])), Sequence(IDS, array("i", [1]))],
        [Sequence(IDS, array("d"), (IDS[:2], IDS[1:])), Sequence(IDS, array("d"), (IDS[2:],))],
    ],
)
def test_rows_as_buffers(rows: list[Sequence]) -> None:
    stored = StoredRows.of(rows)
    assert list(stored) == rows and stored[:1] == rows[:1] and len(stored) == len(rows)
    again = StoredRows({name: memoryview(bytes(part)).cast(part.format) for name, part in stored.buffers.items()})
    assert list(again) == rows
    if rows:
        assert again[-1] == rows[-1] and again[0].labels.typecode == rows[0].labels.typecode
    with pytest.raises(IndexError):
        again[len(rows)]


def test_a_missing_buffer() -> None:
    with pytest.raises(KeyError):
        StoredRows({})
