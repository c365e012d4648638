"""fp32 images of narrow tensors: the dtype that is wide enough for a sum, and few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLAB = 1 << 18
"""Numbers that are widened to fp32 at a time: their images stay near the cache and take little memory."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed and rounded from: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def slabs(x: Tensor) -> Iterator[slice]:
    """Rows of x (N, d) that are worked on at a time: about SLAB numbers on a CPU, all of them elsewhere."""
    many = max(_many(x), 1)
    yield from (slice(begin, begin + many) for begin in range(0, len(x), many))


def room(x: Tensor) -> Tensor:
    """Scratch in the wide dtype for one slab of x (N, d), (rows, d)."""
    return x.new_empty(_many(x), x.shape[1], dtype=wide(x.dtype))


def room_to_widen(x: Tensor) -> Tensor | None:
    """The same (rows, d), or None where x (N, d) is wide already and needs no image."""
    return None if x.dtype == wide(x.dtype) else room(x)


def _many(x: Tensor) -> int:
    return min(max(SLAB // max(x.shape[1], 1), 1), len(x)) if x.device.type == "cpu" else len(x)
