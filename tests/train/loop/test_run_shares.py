"""Rows of a step are divided among processes by tokens; each row is given out once."""

from __future__ import annotations

import random
from array import array

import pytest

from lorakit.data import Sequence
from lorakit.train.loop.run import share_of


def row(length: int) -> Sequence:
    return Sequence(array("i", range(length)), array("i", range(length)))


def groups(*sizes: list[int]) -> list[list[Sequence]]:
    return [[row(length) for length in group] for group in sizes]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("is_whole", [False, True])
def test_each_row_is_given_out_once_within_the_usual_batches(processes: int, is_whole: bool) -> None:
    drawn = random.Random(processes)
    made = groups(*([drawn.randrange(1, 50) for _ in range(4)] for _ in range(6)), [7])
    shares = [share_of(made, rank, processes, is_whole) for rank in range(processes)]
    given = [id(one) for share in shares for batch in share for one in batch]
    assert sorted(given) == sorted(id(one) for group in made for one in group)
    for share in shares:
        assert len(share) <= -(-len(made) // processes)
        assert all(1 <= len(batch) <= 4 for batch in share)
    if is_whole:
        assert all(any(batch is group for group in made) for share in shares for batch in share)


def test_processes_get_about_the_same_number_of_tokens() -> None:
    drawn = random.Random(0)
    made = groups(*([drawn.randrange(1, 100) for _ in range(8)] for _ in range(4)))
    totals = [sum(len(one) for batch in share_of(made, rank, 4) for one in batch) for rank in range(4)]
    assert max(totals) - min(totals) <= 100


def test_a_step_with_fewer_rows_than_processes() -> None:
    made = groups([5])
    assert [share_of(made, rank, 3) for rank in range(3)] == [made, [], []]
