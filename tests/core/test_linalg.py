"""Algebra on factors against the dense matrices that it does not compute."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.core.linalg import (
    Product,
    RankLimit,
    cosines,
    cut,
    dense_spectrum,
    factors_of,
    inner,
    padded,
    product_of,
    rank_for,
    significant,
    spectrum,
    stacked,
    truncated,
)
from lorakit.errors import ConfigError

QUICK = settings(max_examples=30, deadline=None)
SIZES = st.integers(1, 9)


def drawn(groups: int, out: int, size: int, r: int, seed: int = 0) -> Product:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(groups, r, size, generator=g, dtype=torch.float64)
    return Product(A, torch.randn(groups, out, r, generator=g, dtype=torch.float64))


def dense(product: Product) -> Tensor:
    return product.B @ product.A


@QUICK
@given(groups=st.integers(1, 3), out=SIZES, size=SIZES, r=SIZES, seed=st.integers(0, 9))
def test_the_spectrum_is_that_of_the_dense_product(groups: int, out: int, size: int, r: int, seed: int) -> None:
    product = drawn(groups, out, size, r, seed)
    found = spectrum(product)
    torch.testing.assert_close(found.U @ (found.S[:, :, None] * found.Vh), dense(product))
    expected = torch.linalg.svdvals(dense(product))
    smaller = min(expected.shape[1], found.S.shape[1])
    torch.testing.assert_close(found.S[:, :smaller], expected[:, :smaller])
    for basis in (found.U, found.Vh.mT):
        unit = torch.eye(basis.shape[2], dtype=torch.float64).expand(groups, -1, -1)
        torch.testing.assert_close(basis.mT @ basis, unit)


@QUICK
@given(out=SIZES, size=SIZES, r=st.integers(1, 5), q=st.integers(1, 5), rank=st.integers(1, 4))
def test_a_truncated_sum_is_the_nearest_of_its_rank(out: int, size: int, r: int, q: int, rank: int) -> None:
    total = stacked([drawn(1, out, size, r, 1), drawn(1, out, size, q, 2)], [0.7, -1.5])
    whole = 0.7 * dense(drawn(1, out, size, r, 1)) - 1.5 * dense(drawn(1, out, size, q, 2))
    torch.testing.assert_close(dense(total), whole)
    U, S, Vh = torch.linalg.svd(whole[0], full_matrices=False)
    expected = U[:, :rank] * S[:rank] @ Vh[:rank]
    torch.testing.assert_close(dense(truncated(spectrum(total), rank))[0], expected, atol=1e-8, rtol=1e-8)


@QUICK
@given(out=SIZES, size=SIZES, r=st.integers(1, 5), energy=st.floats(0.05, 1.0))
def test_a_share_of_the_energy_takes_the_smallest_rank_that_holds_it(
    out: int, size: int, r: int, energy: float
) -> None:
    product = drawn(1, out, size, r)
    found = spectrum(product)
    smaller, lost = cut(found, RankLimit(energy=energy))
    whole = float(dense(product).square().sum())
    kept = 1 - float((dense(product) - dense(smaller)).square().sum()) / whole
    assert lost == pytest.approx(1 - kept, abs=1e-9)
    assert kept >= energy - 1e-9
    if smaller.rank > 1:
        less = dense(truncated(found, smaller.rank - 1))
        assert 1 - float((dense(product) - less).square().sum()) / whole < energy


def test_nothing_has_rank_one_and_loses_nothing() -> None:
    nothing = Product(torch.zeros(1, 3, 4).double(), torch.zeros(1, 5, 3).double())
    smaller, lost = cut(spectrum(nothing), RankLimit(energy=0.9))
    assert (smaller.rank, lost, significant(spectrum(nothing))) == (1, 0.0, (0,))


@QUICK
@given(out=SIZES, size=SIZES, r=st.integers(1, 5), q=st.integers(1, 5))
def test_inner_product_and_cosines_of_subspaces(out: int, size: int, r: int, q: int) -> None:
    one, other = drawn(1, out, size, r, 1), drawn(1, out, size, q, 2)
    assert inner(one, other) == pytest.approx(float((dense(one) * dense(other)).sum()), rel=1e-9, abs=1e-9)
    ours = cosines(spectrum(one).U, spectrum(other).U)
    assert ours.shape[1] == min(spectrum(one).U.shape[2], spectrum(other).U.shape[2])
    P, Q = (spectrum(p).U[0] for p in (one, other))
    projected = torch.linalg.svdvals((P @ P.T) @ (Q @ Q.T))[: ours.shape[1]]
    torch.testing.assert_close(ours[0], projected, atol=1e-7, rtol=1e-7)


def test_factors_of_any_form_come_back() -> None:
    for A_shape, B_shape in (((4, 7), (5, 4)), ((4, 3, 2, 2), (6, 4, 1, 1)), ((4, 3, 3), (6, 2, 1)), ((1, 1), (3, 1))):
        A, B = torch.randn(A_shape), torch.randn(B_shape)
        product = product_of(A, B)
        assert product.A.shape[0] == A_shape[0] // B_shape[1] and product.rank == B_shape[1]
        back = factors_of(product, A, B)
        assert torch.equal(back[0], A) and torch.equal(back[1], B)
        wider = factors_of(padded(product, product.A.shape[1] + 1), A, B)
        assert wider[0].shape[1:] == A.shape[1:] and wider[1].shape[2:] == B.shape[2:]
        torch.testing.assert_close(dense(product_of(*wider)), dense(product))


def test_a_grouped_convolution_is_products_side_by_side() -> None:
    A, B = torch.randn(4, 3, 3), torch.randn(6, 2, 1)
    x = torch.randn(2, 3, 9)
    direct = torch.nn.functional.conv1d(torch.nn.functional.conv1d(x, A), B, groups=2)
    product = product_of(A, B)
    delta = dense(product).reshape(6, 3, 3).float()
    torch.testing.assert_close(torch.nn.functional.conv1d(x, delta), direct)


def test_a_sketch_finds_the_largest_part_and_knows_what_it_lacks() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(400, 300, generator=g) * 0.01 + dense(drawn(1, 400, 300, 4)).float()[0]
    found, energy = dense_spectrum(base, 4)
    whole, _ = dense_spectrum(base)
    assert found.S.shape[1] == 4 + 16 and whole.S.shape[1] == 300
    torch.testing.assert_close(found.S[0, :4], whole.S[0, :4], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dense(truncated(found, 4)), dense(truncated(whole, 4)), rtol=1e-3, atol=1e-3)
    assert energy == pytest.approx(float(base.square().sum()), rel=1e-5)
    assert rank_for(whole.S, 1.0) == 300


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "either a rank or a fraction of the energy"),
        ({"rank": 2, "energy": 0.5}, "either a rank or a fraction of the energy"),
        ({"rank": 0}, "rank is 0; it must be an integer >= 1"),
        ({"rank": True}, "rank is True"),
        ({"energy": 1.5}, r"energy is 1.5; it must be a fraction in \(0, 1\]"),
        ({"energy": math.nan}, "energy is nan"),
    ],
)
def test_a_cut_is_one_of_two(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RankLimit(**fields)  # type: ignore[arg-type]
