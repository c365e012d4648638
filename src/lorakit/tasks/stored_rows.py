"""Encoded rows as flat buffers, which the token cache writes to files and maps into memory."""

from __future__ import annotations

import collections.abc
from array import array
from collections.abc import Iterable
from itertools import accumulate
from typing import overload

from lorakit.data.encoding import Sequence
from lorakit.data.token_cache import Buffers

_IDS, _SCORES, _ENDS = "i", "d", "q"


class StoredRows(collections.abc.Sequence[Sequence]):
    """Rows in flat buffers; a `Sequence` is created when a row is read.

    Args:
        buffers: Flat values and the end of each row in them: `ids`, `labels`, `types` (no values if a row has none) and
            `others` with `ids_ends`, `labels_ends`, `types_ends` and `others_ends`. Each text in `others` has an end of
            its own, and `others_rows` is the number of these texts up to the end of each row.

    Raises:
        KeyError: A buffer is missing.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = {name: buffers[name] for name in _NAMES}

    @classmethod
    def of(cls, rows: Iterable[Sequence]) -> StoredRows:
        """Return rows as buffers, in the same order."""
        given = list(rows)
        others = [ids for row in given for ids in row.others]
        kind = _SCORES if any(row.labels.typecode == _SCORES for row in given) else _IDS
        empty = array(_IDS)
        found = {
            **_flat("ids", [row.input_ids for row in given]),
            **_flat("labels", [row.labels for row in given], kind),
            **_flat("types", [empty if row.types is None else row.types for row in given]),
            **_flat("others", others),
            "others_rows": _ends(len(row.others) for row in given),
        }
        return cls({name: memoryview(values) for name, values in found.items()})

    def __len__(self) -> int:
        return len(self.buffers["ids_ends"])

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        others = range(*self._span("others_rows", at))
        return Sequence(
            self._part("ids", at),
            self._part("labels", at),
            tuple(self._part("others", number) for number in others),
            self._part("types", at) or None,
        )

    def _span(self, name: str, at: int) -> tuple[int, int]:
        ends = self.buffers[name]
        return (ends[at - 1] if at else 0), ends[at]

    def _part(self, name: str, at: int) -> array[int]:
        begin, end = self._span(f"{name}_ends", at)
        values = self.buffers[name]
        return array(values.format, values[begin:end].tobytes())


_NAMES = (
    *("ids", "ids_ends", "labels", "labels_ends", "types", "types_ends"),
    *("others", "others_ends", "others_rows"),
)


def _flat(name: str, parts: list[array[int]], kind: str = _IDS) -> dict[str, array[int]]:
    flat: array[int] = array(kind)
    for part in parts:
        flat.extend(part if part.typecode == kind else array(kind, part))
    return {name: flat, f"{name}_ends": _ends(map(len, parts))}


def _ends(sizes: Iterable[int]) -> array[int]:
    return array(_ENDS, accumulate(sizes))
