"""Token sequences: one row with its labels, and many rows in flat arrays.

Knows nothing of records and tokenizers.
"""

from __future__ import annotations

import collections.abc
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

import numpy as np

IGNORED = -100
"""The label of a token that the loss is not taken on."""

_NARROW, _WIDE = "H", "i"
_NARROW_IDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens and labels of one row of a batch.

    Attributes:
        input_ids: Token ids, shape (length,), four bytes each.
        labels: The same ids where the loss is taken, -100 elsewhere; shape (length,); the first is -100.
    """

    input_ids: array[int]
    labels: array[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a causal loss."""
        return len(self.labels) - self.labels.count(IGNORED)


class Sequences(collections.abc.Sequence[Sequence]):
    """Rows in flat arrays: two or four bytes per token for its id, one for whether it is trained, eight per row.

    A row becomes a `Sequence` when it is asked for.
    """

    def __init__(self) -> None:
        self._ids = array(_NARROW)
        self._trained = bytearray()
        self._ends = array("q", [0])

    def add(self, ids: collections.abc.Sequence[int], trained: collections.abc.Sequence[bool] | bytes) -> None:
        """Append a row; its first token is never trained, because no token comes before it.

        Args:
            ids: Token ids, at least one.
            trained: Whether the loss is taken on each.
        """
        if self._ids.typecode == _NARROW and max(ids) >= _NARROW_IDS:
            self._ids = array(_WIDE, self._ids)
        self._ids.extend(array(self._ids.typecode, ids))
        self._trained += bytes(trained)
        self._trained[self._ends[-1]] = 0
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        begin, end = self._ends[at], self._ends[at + 1]
        ids = np.array(self._ids[begin:end], dtype=np.int32)
        marks = np.frombuffer(bytes(self._trained[begin:end]), dtype=np.bool_)
        labels = np.where(marks, ids, np.int32(IGNORED))
        return Sequence(array(_WIDE, ids.tobytes()), array(_WIDE, labels.tobytes()))

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self._ids)

    @property
    def trained_tokens(self) -> int:
        """Positions of all rows that a causal loss trains."""
        return self._trained.count(1)

    def lengths(self) -> array[int]:
        """Return the tokens of each row."""
        return array("q", np.diff(np.array(self._ends, dtype=np.int64)).tobytes())


def lengths(sequences: Iterable[Sequence]) -> array[int]:
    """Return the tokens of each sequence, without making those that are stored flat."""
    return sequences.lengths() if isinstance(sequences, Sequences) else array("q", map(len, sequences))
