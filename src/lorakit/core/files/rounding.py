"""Decide if two lists of numbers can be one list, rounded to the dtypes that models are loaded in.

Exact: the one is the other rounded, once or by way of a third dtype, or some list rounds to both. So noise of the size
of a rounding is not taken for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF, _BRAIN = torch.float16, torch.bfloat16
WAYS: tuple[tuple[torch.dtype, ...], ...] = (
    (_BRAIN,),
    (_HALF,),
    (torch.float32,),
    (_HALF, _BRAIN),
    (_BRAIN, _HALF),
)
"""Dtypes to which a base is rounded, one after the other, on the way from one of the two to the other."""

_SMALLEST, _LARGEST = -14, 65520.0
"""Exponent of the smallest normal number in fp16; smallest number that becomes infinite in it."""


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether all values are the same, (n,) each; NaN is NaN, and zeros of either sign are the same."""
    return one.shape == other.shape and bool(_same(one, other).all())


def may_be_one(one: Tensor, other: Tensor) -> bool:
    """Return whether rounding explains every difference.

    Args:
        one: Values in fp64, (n,).
        other: Likewise.
    """
    if one.shape != other.shape:
        return False
    for way in WAYS:
        if equal(_rounded(one, way), other) or equal(_rounded(other, way), one):
            return True
    return _one_source(one, other) or _one_source(other, one)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _rounded(values: Tensor, way: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in way:
        values = values.to(dtype)
    return values.double()


def _one_source(half: Tensor, brain: Tensor) -> bool:
    """Return whether some list rounds to the one in fp16 and to the other in bf16: one step apart only at a tie."""
    if not (equal(_rounded(half, (_HALF,)), half) and equal(_rounded(brain, (_BRAIN,)), brain)):
        return False
    reach = _half_step(half, 10, _SMALLEST) + _half_step(brain, 7, -126)
    overflown = half.isinf() & (brain.sign() == half.sign()) & (brain.abs() + _half_step(brain, 7, -126) >= _LARGEST)
    return bool((_same(half, brain) | ((half - brain).abs() <= reach) | overflown).all())


def _half_step(values: Tensor, digits: int, smallest: int) -> Tensor:
    """Return half the distance to the next larger number of a dtype with a number of binary digits after the point."""
    exponent = torch.frexp(values.nan_to_num(0.0, 0.0, 0.0)).exponent.double() - 1
    return torch.exp2(exponent.clamp(min=smallest) - digits - 1)
