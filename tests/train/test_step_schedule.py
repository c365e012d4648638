"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from lorakit.train.step import schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.05), (1, 0.0), (7, 0.0), (100, 0.05), (10, 1.0)])
def test_every_step_of_a_run_moves_and_none_passes_the_peak(kind: str, total: int, ratio: float) -> None:
    rates = [schedule(0.5, total, ratio, kind).rate(step) for step in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert max(rates) == 0.5


def test_the_warm_up_rises_evenly_and_the_rest_falls() -> None:
    course = schedule(1.0, 100, 0.1, "cosine")
    rates = [course.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2)


def test_linear_and_constant() -> None:
    assert [schedule(1.0, 4, 0.0, "linear").rate(s) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule(1.0, 4, 0.0, "constant").rate(s) for s in range(4)] == [1.0] * 4


def test_past_the_end_the_rate_is_zero_not_negative() -> None:
    assert schedule(1.0, 4, 0.0, "linear").rate(9) == 0.0
    assert schedule(1.0, 4, 0.0, "cosine").rate(9) == 0.0
