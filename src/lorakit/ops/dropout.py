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
    return _gaps(count, p, device)[0]


def draw(like: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """What to drop of a tensor like this (any shape): where, for `zero_`, and a record of it to save for a backward.

    On a CPU, where is (dropped,) sorted positions, and the record the steps between them in the least integer type that
    holds them, a byte each at usual shares. Elsewhere, and under a compiler, which cannot have sizes that depend on
    data, both are one Boolean mask (numbers,). `where` gives the first of them from the second.
    """
    return draw_of(like.numel(), p, like.device)


def draw_of(count: int, p: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`draw` for so many numbers: where (dropped,) or a mask (count,), and the record of it."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        mask = torch.rand(count, device=device) < p
        return mask, mask
    positions, steps = _gaps(count, p, device)
    longest = int(steps.max()) if len(steps) else 0
    return positions, steps.to(next(dtype for dtype in _INTEGERS if longest <= torch.iinfo(dtype).max))


def where(record: Tensor) -> Tensor:
    """The dropped positions, int64 (dropped,), or the mask (any shape), that a record of `draw` stands for."""
    return record if record.dtype == torch.bool else record.cumsum(0, dtype=torch.int64)


def zero_(owned: Tensor, dropped: Tensor) -> Tensor:
    """A contiguous tensor (any shape), zero from now on at these positions of it laid flat (dropped,), or in a mask."""
    if dropped.dtype == torch.bool:
        return owned.masked_fill_(dropped.view(owned.shape), 0)
    owned.view(-1).index_fill_(0, dropped, 0)
    return owned


def dropped(x: Tensor, index: Tensor) -> Tensor:
    """Contiguous copy of x (any shape) with zero at the positions `index` (dropped,) of x laid flat; not rescaled."""
    return zero_(x.clone(memory_format=torch.contiguous_format), index)


def join(owned: Tensor, x: Tensor | None, p: float) -> tuple[Tensor, Tensor | None]:
    """The sum x + dropout(owned), written to owned, and the record of what was dropped: the end of a branch.

    owned, x (N, d) contiguous; x may be None. The record is None where p = 0.
    """
    if p == 0:
        return owned if x is None else owned.add_(x), None
    zeros, record = draw(owned, p)
    zero_(owned, zeros)
    share = 1 / (1 - p)
    return owned.mul_(share) if x is None else torch.add(x, owned, alpha=share, out=owned), record


def join_backward(dy: Tensor, record: Tensor | None, p: float) -> Tensor:
    """The gradient of `join`'s owned input from that of its output dy (N, d): dy itself where nothing was dropped."""
    return dy if record is None else zero_(_scaled(dy, 1 / (1 - p)), where(record))


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
        positions, record = draw(x, p)
        ctx.save_for_backward(record)
        ctx.scale = 1 / (1 - p)
        return zero_(_scaled(x, ctx.scale), positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (record,) = ctx.saved_tensors
        return zero_(_scaled(dy, ctx.scale), where(record)), None


def _scaled(x: Tensor, scale: float) -> Tensor:
    """Contiguous scale·x: the copy that is needed anyway."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _gaps(count: int, p: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The dropped positions, and from each to the next; the first from position 0."""
    if not 0 <= p <= 1:
        raise ValueError(_not_a_probability(p))
    if p in (0, 1):
        positions = torch.arange(int(p) * count, device=device)
        return positions, positions.diff(prepend=positions[:1])
    expected = count * p
    draws = int(expected + 4 * math.sqrt(expected)) + 8  # past the end but for once in thousands
    exact, whole = (torch.float32, torch.int32) if p >= FEW else (torch.float64, torch.int64)
    steps = torch.empty(0, dtype=whole, device=device)
    while True:
        more = torch.rand(draws, dtype=exact, device=device).neg_().log1p_().mul_(1 / math.log1p(-p)).to(whole)
        more[0 if len(steps) else 1 :].add_(1)
        steps = torch.cat([steps, more]) if len(steps) else more
        positions = steps.cumsum(0)
        within = int(torch.searchsorted(positions, count))
        if within < len(positions):
            return positions[:within], steps[:within]


_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _not_a_probability(p: float) -> str:
    return f"dropout is the share of numbers that become zero, 0 to 1; got {p}"
