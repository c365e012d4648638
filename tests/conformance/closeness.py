"""Comparison of two sets of named tensors within tolerances."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDINGS = 4e-6
"""Some thirty roundings of fp32: processors take the sums of a small model in other orders, and 1e-6 was once missed."""


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = ROUNDINGS) -> None:
    """The same names, and numbers within `rtol` of the largest of their tensor.

    A tensor that is zero but for rounding (the gradient of a key's bias) has no magnitude for a relative
    by, so a hundredth of `rtol` of the largest number of all is allowed everywhere.

    Args:
        found: Name -> tensor.
        expected: Name -> tensor.
        rtol: Relative tolerance.
    """
    assert set(found) == set(expected)
    largest = max((float(tensor.detach().abs().max()) for tensor in expected.values()), default=0.0)
    for name, tensor in expected.items():
        allowed = rtol * max(float(tensor.detach().abs().max()), largest / 100)
        difference = float((found[name] - tensor).detach().abs().max())
        assert difference <= allowed, f"{name}: differs by {difference:.3g}, {allowed:.3g} is allowed"


def assert_differs(found: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Far from the other in some tensor: without it, a comparison of two idle adapters would pass."""
    assert any(float((found[name] - other[name]).detach().abs().max()) > 1e-3 for name in other)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert set(found) == set(expected)
    different = [name for name in expected if not _equal(found[name], expected[name])]
    assert not different, different


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
