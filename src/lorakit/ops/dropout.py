"""Dropout at the cost of what it drops: the dropped positions are drawn, not a decision for every number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEW = 1e-3  # below this share single precision is too coarse for the gaps, and there are few of them


def reference(x: Tensor, p: float, keep: Tensor) -> Tensor:
    """Dropout of x (any shape) with the numbers to keep given, `keep` of the same shape (1 or 0)."""
    return x * keep / (1 - p) if p < 1 else x * 0


def zeroed(count: int, p: float, device: torch.device | str) -> Tensor:
    """Sorted positions below `count`, each in it with probability p and independently, as int64 (dropped,).

        The distance from one dropped position to the next is geometric, so there are p·count draws instead of count
    [docs/math.md (70)]. They come from torch's default generator of the device. A probability is exact to 2⁻²⁴.

    """
    return _positions(_steps(count, p, device))


def draw(like: Tensor, p: float) -> Tensor:
    """What to drop of a tensor like this (any shape): a record for `zero_`, small enough to be saved for a backward.

    On a CPU it is (dropped,), the steps from each dropped position to the next in the least integer type that holds
    them; elsewhere, and under a compiler, which cannot have sizes that depend on data, a Boolean mask of like's shape.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand(like.shape, device=like.device) < p
    return _steps(like.numel(), p, like.device)


def zero_(owned: Tensor, record: Tensor) -> Tensor:
    """Set to zero, in place, what a record of `draw` names of a contiguous tensor of the same count (any shape)."""
    if record.dtype == torch.bool:
        return owned.masked_fill_(record.view(owned.shape), 0)
    owned.view(-1).index_fill_(0, _positions(record), 0)
    return owned


def dropped(x: Tensor, index: Tensor) -> Tensor:
    """Contiguous copy of x (any shape) with zero at the positions `index` (dropped,) of x laid flat; not rescaled."""
    copy = x.clone(memory_format=torch.contiguous_format)
    copy.view(-1).index_fill_(0, index, 0)
    return copy


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """The numbers of x (any shape), each zero with probability p and divided by 1 − p otherwise.

    The law of `torch.nn.functional.dropout` [docs/math.md (70)]; off the CPU and under a compiler it is that function.
    For its backward it saves the record of `draw`.

    Raises:
        ValueError: p is no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(_not_a_probability(p))
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or p == 1:
        return F.dropout(x, p, training=True)
    result: Tensor = _Dropout.apply(x, p)
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        record = draw(x, p)
        ctx.save_for_backward(record)
        ctx.scale = 1 / (1 - p)
        return zero_(_scaled(x, 1 / (1 - p)), record)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (record,) = ctx.saved_tensors
        return zero_(_scaled(dy, ctx.scale), record), None


def _scaled(x: Tensor, scale: float) -> Tensor:
    """Contiguous scale·x: the copy that is needed anyway."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _steps(count: int, p: float, device: torch.device | str) -> Tensor:
    """From each dropped position to the next; the first from position 0."""
    if not 0 <= p <= 1:
        raise ValueError(_not_a_probability(p))
    if p in (0, 1):
        return torch.ones(int(p) * count, dtype=torch.uint8, device=device).index_fill_(
            0, torch.arange(min(1, int(p) * count), device=device), 0
        )
    expected = count * p
    draws = int(expected + 4 * math.sqrt(expected)) + 8  # past the end but for once in thousands
    steps = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        more = torch.rand(draws, dtype=torch.float32 if p >= FEW else torch.float64, device=device)
        more = more.neg_().log1p_().mul_(1 / math.log1p(-p)).long().add_(1)  # 1 + floor(log(1 − u)/log(1 − p))
        if not len(steps):
            more[0] -= 1
        steps = torch.cat([steps, more]) if len(steps) else more
        ends = steps.cumsum(0)
        if ends[-1] >= count:
            break
    steps = steps[: int(torch.searchsorted(ends, count))]
    longest = int(steps.max()) if len(steps) else 0
    return steps.to(next(dtype for dtype in _INTEGERS if longest <= torch.iinfo(dtype).max))


_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _positions(steps: Tensor) -> Tensor:
    return steps.cumsum(0, dtype=torch.int64)


def _not_a_probability(p: float) -> str:
    return f"dropout is the share of numbers that become zero, 0 to 1; got {p}"
