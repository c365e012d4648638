"""Dropout by gaps: the exact law, a record small enough to keep, and the same numbers dropped in the backward."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorakit.ops.dropout import draw, dropout, dropped, reference, where, zero_, zeroed


def test_gaps_draw_each_position_with_its_probability() -> None:
    """Formula (70): mean and variance of the count, each position alike, neighbours and lags independent."""
    torch.manual_seed(0)
    for p in (0.05, 0.5, 0.9):
        n, rounds = 256, 2000
        masks = torch.zeros(rounds, n)
        for row in masks:
            row[zeroed(n, p, "cpu")] = 1
        q = p * (1 - p)
        assert abs(masks.mean() - p) < 5 * (q / n / rounds) ** 0.5
        by_position = (masks.mean(0) - p) / (q / rounds) ** 0.5
        assert by_position.abs().max() < 5
        assert abs(by_position.var() - 1) < 0.45
        counts = masks.sum(1)
        assert abs(counts.var() / (n * q) - 1) < 0.2
        for lag in (1, 2, 7):
            both = (masks[:, :-lag] * masks[:, lag:]).mean()
            assert abs(both - p * p) < 6 * (p * p / n / rounds) ** 0.5


@pytest.mark.parametrize("p", [0.0, 1e-5, 1e-3, 0.05, 0.999, 1.0])
def test_positions_are_sorted_within_bounds_and_whole(p: float) -> None:
    torch.manual_seed(1)
    for count in (0, 1, 2, 100_000):
        index = zeroed(count, p, "cpu")
        assert index.dtype == torch.int64
        assert (index.diff() > 0).all()
        assert ((index >= 0) & (index < count)).all()
        assert abs(len(index) - p * count) <= 6 * (count * p * (1 - p)) ** 0.5 + (0 < p < 1)


def test_the_last_positions_are_drawn_where_the_first_draws_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    short, draws = torch.rand, []

    def few(count: int, **options: object) -> torch.Tensor:
        draws.append(count)
        return short(min(count, 5), **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "rand", few)
    torch.manual_seed(2)
    index = zeroed(1000, 0.1, "cpu")
    assert len(draws) > 5
    assert 60 < len(index) < 140
    assert index[-1] > 900
    assert (index.diff() > 0).all()


def test_it_is_seeded_by_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = zeroed(1000, 0.1, "cpu"), zeroed(1000, 0.1, "cpu")
    torch.manual_seed(3)
    assert torch.equal(first, zeroed(1000, 0.1, "cpu"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("p", "dtype"), [(0.5, torch.uint8), (1e-3, torch.int16), (1e-6, torch.int32)])
def test_a_record_has_the_least_integers_that_hold_it(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.ones(3_000_000)
    positions, record = draw(x, p)
    assert record.dtype == dtype
    assert torch.equal(where(record), positions)
    zero_(x, positions)
    assert torch.equal((x == 0).nonzero().flatten(), positions)


def test_a_record_may_be_a_mask() -> None:
    mask = torch.tensor([True, False, False, True])
    assert zero_(torch.ones(2, 2), mask).tolist() == [[0, 1], [1, 0]]


def test_dropped_is_a_copy() -> None:
    x = torch.arange(1.0, 13.0).view(3, 4).t()
    out = dropped(x, torch.tensor([0, 4, 11]))
    assert out.view(-1).nonzero().flatten().tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert x.min() == 1
    assert torch.equal(out.view(-1)[1:4], x.reshape(-1)[1:4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_is_its_reference_in_value_and_gradient(dtype: torch.dtype) -> None:
    base = torch.randn(7, 5, dtype=dtype, generator=torch.Generator().manual_seed(5)).add_(3).requires_grad_()
    x = base.t()
    weights = torch.randn(5, 7, dtype=dtype)
    torch.manual_seed(6)
    y = dropout(x, 0.3, training=True)
    torch.manual_seed(6)
    keep = torch.ones(35, dtype=dtype)
    keep[zeroed(35, 0.3, "cpu")] = 0
    expected = reference(x, 0.3, keep.view(5, 7))
    (grad,) = torch.autograd.grad((y * weights).sum(), base)
    (true,) = torch.autograd.grad((expected * weights).sum(), base)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad, true, rtol=tolerance, atol=0)


def test_dropout_saves_a_byte_for_each_number_that_it_drops() -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = dropout(x, 0.25, training=True)
    assert [t.dtype for t in saved] == [torch.uint8]
    assert saved[0].numel() == (y == 0).sum()


def test_dropout_without_training_is_the_input() -> None:
    x = torch.randn(4)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert dropout(x, 1.0, training=True).tolist() == [0, 0, 0, 0]


def test_a_share_outside_0_to_1_is_refused() -> None:
    for call in (lambda: zeroed(4, 1.5, "cpu"), lambda: dropout(torch.ones(2), -0.1, training=True)):
        with pytest.raises(
            ValueError, match=r"dropout is the share of numbers that become zero, 0 to 1; got (1.5|-0.1)"
        ):
            call()
