"""Dropout by sampled gaps: the exact distribution, a small record, and the same dropped elements in the backward."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorakit.ops.dropout import apply_dropout, draw, draw_record, dropout, positions, zero_
from lorakit.ops.kernels import kernels_for
from lorakit.ops.reference import dropout as reference


def positions_of(count: int, p: float) -> torch.Tensor:
    """Draw the positions of `count` elements that are dropped."""
    return positions(draw_record(count, p, torch.device("cpu")), count, p)


def test_gaps_draw_each_position_with_its_probability() -> None:
    """Formula (70): mean and variance of the count, uniform positions, independent neighbors and lags."""
    torch.manual_seed(0)
    for p in (0.05, 0.5, 0.9):
        n, rounds = 256, 2000
        masks = torch.zeros(rounds, n)
        for row in masks:
            row[positions_of(n, p)] = 1
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
        index = positions_of(count, p)
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
    monkeypatch.setattr("lorakit.ops.dropout.kernels_for", lambda *_: None)
    torch.manual_seed(2)
    index = positions_of(1000, 0.1)
    assert len(draws) > 5
    assert 60 < len(index) < 140
    assert index[-1] > 900
    assert (index.diff() > 0).all()


def test_it_is_seeded_by_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = positions_of(1000, 0.1), positions_of(1000, 0.1)
    torch.manual_seed(3)
    assert torch.equal(first, positions_of(1000, 0.1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.5, 0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_record_is_a_seed_from_which_the_positions_follow(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.ones(3_000_000, dtype=dtype)
    record = draw(x, p)
    assert (record.dtype, record.shape) == (torch.uint64, (1,))
    expected = positions(record, len(x), p)
    assert torch.equal((apply_dropout(x, record, p, 2.0) == 0).nonzero().flatten(), expected)
    assert torch.equal((zero_(x, record, p) == 0).nonzero().flatten(), expected)
    assert abs(len(expected) - p * len(x)) < 6 * (p * len(x)) ** 0.5 + 1


def test_a_record_may_be_a_mask() -> None:
    mask = torch.tensor([True, False, False, True])
    assert zero_(torch.ones(2, 2), mask, 0.5).tolist() == [[0, 1], [1, 0]]
    assert positions(mask, 4, 0.5).tolist() == [0, 3]


def test_a_tensor_in_any_strides_is_taken_as_it_reads() -> None:
    x = torch.arange(1.0, 13.0).view(3, 4).t()
    torch.manual_seed(7)
    record = draw(x, 0.4)
    out = apply_dropout(x, record, 0.4)
    kept = torch.ones(12)
    kept[positions(record, 12, 0.4)] = 0
    assert torch.equal(out, x * kept.view(4, 3))
    assert x.min() == 1


@pytest.mark.costly
@pytest.mark.parametrize("p", [0.05, 0.5, 5e-4])
def test_without_kernels_the_law_is_the_same(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count and gaps of both: a mean distance of (1 − p)/p between neighbors, and its variance (1 − p)/p²."""
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr("lorakit.ops.dropout.kernels_for", lambda *_: None)
        torch.manual_seed(8)
        count = int(40_000 / p)
        index = torch.cat([positions_of(count, p) + i * count for i in range(3)])
        gaps = (index.diff() - 1).double()
        assert abs(len(index) - 3 * count * p) < 5 * (3 * count * p * (1 - p)) ** 0.5
        assert abs(gaps.mean() / ((1 - p) / p) - 1) < 0.03
        assert abs(gaps.var() / ((1 - p) / p**2) - 1) < 0.06
        ahead, behind = gaps[1:] - gaps.mean(), gaps[:-1] - gaps.mean()
        assert abs((ahead * behind).mean() / gaps.var()) < 0.02


def test_threads_do_not_change_what_is_dropped() -> None:
    if kernels_for(torch.ones(1)) is None:
        pytest.skip("no C compiler")
    torch.manual_seed(9)
    x = torch.ones(300_000)
    record, before = draw(x, 0.1), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(apply_dropout(x, record, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_is_its_reference_in_value_and_gradient(dtype: torch.dtype) -> None:
    base = torch.randn(7, 5, dtype=dtype, generator=torch.Generator().manual_seed(5)).add_(3).requires_grad_()
    x = base.t()
    weights = torch.randn(5, 7, dtype=dtype)
    torch.manual_seed(6)
    y = dropout(x, 0.3, training=True)
    torch.manual_seed(6)
    keep = torch.ones(35, dtype=dtype)
    keep[positions_of(35, 0.3)] = 0
    expected = reference(x, 0.3, keep.view(5, 7))
    (grad,) = torch.autograd.grad((y * weights).sum(), base)
    (true,) = torch.autograd.grad((expected * weights).sum(), base)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad, true, rtol=tolerance, atol=0)


def test_dropout_saves_a_seed() -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        dropout(x, 0.25, training=True)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint64, 1)]


def test_dropout_without_training_is_the_input() -> None:
    x = torch.randn(4)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert dropout(x, 1.0, training=True).tolist() == [0, 0, 0, 0]


def test_a_share_outside_0_to_1_is_refused() -> None:
    for call in (lambda: positions_of(4, 1.5), lambda: dropout(torch.ones(2), -0.1, training=True)):
        with pytest.raises(ValueError, match=r"dropout must be .*; got (1\.5|-0\.1)"):
            call()
