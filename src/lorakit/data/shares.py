"""Divide the rows of an optimizer step among processes, so that each processes about the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TypeVar

from lorakit.data.encoding import Sequence

Row = TypeVar("Row", bound=Sequence)


def share_of(groups: Many[list[Row]], rank: int, processes: int, is_whole: bool = False) -> list[list[Row]]:
    """Return the part of a step's batches that one process computes; the parts together contain each row once.

    Rows are given out in order of length, longest first, each to the process that has the fewest tokens so far. No
    process gets more batches than it would if whole batches were given out, and no batch has more rows than before.

    Args:
        groups: The rows of each batch of the step, as one process would compute them; at least one.
        rank: Number of the process, from 0.
        processes: Number of processes.
        is_whole: Whether batches must stay whole, because the loss compares the rows of a batch.

    Returns:
        The rows of each batch of the process; empty if the step has fewer rows than there are processes.
    """
    if processes == 1:
        return list(groups)
    if is_whole:
        sizes = [sum(map(len, group)) for group in groups]
        return [groups[index] for index in _shares(sizes, processes, -(-len(groups) // processes))[rank]]
    batch_rows = max(map(len, groups))
    rows = [row for group in groups for row in group]
    most = -(-len(groups) // processes) * batch_rows
    mine = [rows[index] for index in _shares(list(map(len, rows)), processes, most)[rank]]
    return [mine[at : at + batch_rows] for at in range(0, len(mine), batch_rows)]


def _shares(sizes: Many[int], processes: int, most: int) -> list[list[int]]:
    """Divide items by size among processes, at most `most` each; return the items of each, in ascending order."""
    shares, totals = [list[int]() for _ in range(processes)], [0] * processes
    for index in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        free = (rank for rank in range(processes) if len(shares[rank]) < most)
        least = min(free, key=lambda rank: (totals[rank], rank))
        shares[least].append(index)
        totals[least] += sizes[index]
    return [sorted(share) for share in shares]
