"""Streaming moments compared with the whole data."""

from __future__ import annotations

import pytest
import torch

from lorakit.core.statistics.moments import InputStatistics
from lorakit.errors import DataError


def data(rows: int = 90, width: int = 12) -> torch.Tensor:
    """Rows off the origin whose variances fall by half from one direction to the next."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return torch.randn(rows, width, generator=generator) * 0.5 ** torch.arange(width) @ mixing + 2


def counted(x: torch.Tensor, size: int = 10) -> InputStatistics:
    statistics = InputStatistics()
    for part in x.split(size):
        statistics.add(part)
    return statistics


def test_principal_directions_are_those_of_the_whole_data() -> None:
    x = data()
    found = counted(x).principal(3)
    centred = x - x.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.values, values[:3], rtol=1e-3, atol=1e-4)
    assert ((found.vectors * vectors[:3]).sum(1).abs() > 0.9999).all()
    torch.testing.assert_close(found.ratios, values[:3] ** 2 / centred.square().sum(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3), rtol=0, atol=1e-5)
    assert (found.vectors.gather(1, found.vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_order_and_merging_change_nothing() -> None:
    x = data()
    whole, parted, other = counted(x), counted(x[:40]), counted(x[40:])
    parted.merge(other)
    parted.merge(InputStatistics())
    assert parted.rows == 90
    torch.testing.assert_close(parted.second_moment(), whole.second_moment())
    torch.testing.assert_close(other.second_moment(), x[40:].T @ x[40:] / 50)  # it was only read


def test_low_precision_is_added_up_in_fp32() -> None:
    x = data(4000).to(torch.bfloat16)
    torch.testing.assert_close(counted(x).second_moment(), x.double().T.float() @ x.double().float() / 4000)


def test_too_little_data() -> None:
    empty = InputStatistics()
    empty.add(torch.empty(0, 4))
    with pytest.raises(DataError, match="No batch reached this site"):
        empty.principal(1)
    with pytest.raises(DataError, match="no second moment"):
        empty.second_moment()
    one = counted(torch.ones(1, 4)).principal(2)  # one row has no variance
    assert one.ratios.tolist() == [0, 0]
    assert torch.isfinite(one.vectors).all()
