"""Dropout at the cost of what it drops: the dropped positions are drawn, not a decision for every number.

Nothing of them is kept but a seed: a backward draws them again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.ops.kernels.choosing import kernels_for

FEW = 1e-3  # below this share single precision is too coarse for the gaps, and there are few of them


def reference(x: Tensor, p: float, keep: Tensor) -> Tensor:
    """Dropout of x (any shape) with the numbers to keep given, `keep` of the same shape (1 or 0)."""
    return x * keep / (1 - p) if p < 1 else x * 0


def zeroed(count: int, p: float, device: torch.device | str) -> Tensor:
    """Sorted positions below `count`, each in it with probability p and independently, as int64 (dropped,).

    They follow from a seed that torch's default generator gives. A probability is exact to 2⁻²⁴.

    Raises:
        ValueError: p is no probability.
    """
    return positions(_seed(device), count, p, device)


def draw(like: Tensor, p: float) -> Tensor:
    """What to drop of a tensor like this (any shape), as a record to keep for a backward.

    On a CPU, and where there are kernels, it is a seed, (1,) of uint64: the positions follow from it. Elsewhere, and
    under a compiler, which cannot have sizes that depend on data, it is the Boolean mask (numbers,).
    """
    return draw_of(like.numel(), p, like.device)


def draw_of(count: int, p: float, device: torch.device) -> Tensor:
    """`draw` for so many numbers: the record, (1,) or (count,)."""
    if torch.compiler.is_compiling() or (device.type != "cpu" and kernels_for(torch.empty(0, device=device)) is None):
        return torch.rand(count, device=device) < p
    return _seed(device)


def zero_(owned: Tensor, record: Tensor, p: float) -> Tensor:
    """A contiguous tensor (any shape), zero from now on where the record says."""
    return without(owned, record, p, out=owned)


def without(x: Tensor, record: Tensor, p: float, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """A contiguous scale·x (any shape) without what the record drops; in `out`, which may be x, or a new tensor."""
    if out is None:
        x = x.contiguous()
        out = torch.empty_like(x)
    kernels = kernels_for(x, out) if record.dtype == torch.uint64 else None
    if kernels is not None:
        kernels.drop(x, p, record, scale, out)
        return out
    if scale != 1.0:
        torch.mul(x, scale, out=out)
    elif out is not x:
        out.copy_(x)
    if record.dtype == torch.bool:
        return out.masked_fill_(record.view(out.shape), 0)
    out.view(-1).index_fill_(0, positions(record, out.numel(), p, out.device), 0)
    return out


def positions(record: Tensor, count: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """The positions that a record drops of so many numbers, sorted, int64 (dropped,).   [docs/math.md (70)]

    The distance from one to the next is geometric, so there are p·count draws instead of count. Kernels and PyTorch
    draw others from one seed.

    Raises:
        ValueError: p is no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(_not_a_probability(p))
    if record.dtype == torch.bool:
        return record.view(-1).nonzero().squeeze(1)
    if p in (0, 1):
        return torch.arange(int(p) * count, device=device)
    ones = torch.ones(count, device=device)
    kernels = kernels_for(ones)
    if kernels is None:
        return _gaps(count, p, torch.Generator(device).manual_seed(int(record.item())))
    kernels.drop(ones, p, record, 1.0, ones)
    return (ones == 0).nonzero().squeeze(1)


def join(owned: Tensor, x: Tensor | None, p: float) -> tuple[Tensor, Tensor | None]:
    """The sum x + dropout(owned), written to owned, and the record of what was dropped: the end of a branch.

    owned, x (N, d) contiguous; x may be None. The record is None where p = 0.
    """
    if p == 0:
        return owned if x is None else owned.add_(x), None
    record = draw(owned, p)
    without(owned, record, p, 1 / (1 - p), out=owned)
    return owned if x is None else owned.add_(x), record


def join_backward(dy: Tensor, record: Tensor | None, p: float) -> Tensor:
    """The gradient of `join`'s owned input from that of its output dy (N, d): dy itself where nothing was dropped."""
    return dy if record is None else without(dy, record, p, 1 / (1 - p))


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """The numbers of x (any shape), each zero with probability p and divided by 1 − p otherwise.

    The law of `torch.nn.functional.dropout` [docs/math.md (70)]; it is that function under a compiler, and off the CPU
    where there are no kernels. For its backward it saves the record of `draw`.

    Raises:
        ValueError: p is no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(_not_a_probability(p))
    if not training or p == 0:
        return x
    plain = torch.compiler.is_compiling() or p == 1
    if plain or (x.device.type != "cpu" and kernels_for(x, strided=True) is None):
        return F.dropout(x, p, training=True)
    result: Tensor = _Dropout.apply(x, p)
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        record = draw(x, p)
        ctx.save_for_backward(record)
        ctx.p = p
        return without(x, record, p, 1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (record,) = ctx.saved_tensors
        return without(dy, record, ctx.p, 1 / (1 - ctx.p)), None


def _seed(device: torch.device | str) -> Tensor:
    """The next seed of torch's default generator of the device, (1,) of uint64, which stays there."""
    return torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.uint64)


def _gaps(count: int, p: float, generator: torch.Generator) -> Tensor:
    """The dropped positions, from the distances that a generator gives."""
    expected = count * p
    draws = int(expected + 4 * math.sqrt(expected)) + 8  # past the end but for once in thousands
    exact, whole = (torch.float32, torch.int32) if p >= FEW else (torch.float64, torch.int64)
    steps = torch.empty(0, dtype=whole, device=generator.device)
    while True:
        more = torch.rand(draws, dtype=exact, device=generator.device, generator=generator)
        more = more.neg_().log1p_().mul_(1 / math.log1p(-p)).to(whole)
        more[0 if len(steps) else 1 :].add_(1)
        steps = torch.cat([steps, more]) if len(steps) else more
        found = steps.cumsum(0)
        within = int(torch.searchsorted(found, count))
        if within < len(found):
            return found[:within]


def _not_a_probability(p: float) -> str:
    return f"dropout is the share of numbers that become zero, 0 to 1; got {p}"
