"""Dropout that draws the dropped positions instead of one random number per element, and saves only a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.ops.autograd import Context, Replayed, with_replay
from lorakit.ops.kernels import kernels_for

# Below this probability, gaps are computed in float64: fp32 is too coarse, and with few gaps, float64 costs little.
FEW = 1e-3


def draw(like: Tensor, p: float) -> Tensor:
    """Draw a dropout record for a tensor with the size and device of `like` (any shape).

    It is a uint64 seed (1,) on a CPU and on devices with kernels. On others, and during compilation, because compilers
    do not support data-dependent sizes, it is a boolean mask (elements,) that is true for dropped elements.
    """
    return draw_record(like.numel(), p, like.device)


def draw_record(count: int, p: float, device: torch.device) -> Tensor:
    """Draw a dropout record, (1,) or (count,), for `count` elements; see `draw`."""
    if torch.compiler.is_compiling() or (device.type != "cpu" and kernels_for(torch.empty(0, device=device)) is None):
        return torch.rand(count, device=device) < p
    return _seed(device)


def zero_(owned: Tensor, record: Tensor, p: float) -> Tensor:
    """Zero the dropped elements of a contiguous tensor (any shape) in place, according to a dropout record."""
    return apply_dropout(owned, record, p, out=owned)


def apply_dropout(x: Tensor, record: Tensor, p: float, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Write scale·x (any shape), with zeros at dropped elements, to `out`, which may be x; return `out`. If `out` is
    None, a new tensor is allocated, and x need not be contiguous.
    """
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
    """Return the sorted positions (dropped,), in int64, that a record drops among `count` elements. [docs/math.md (70)]

    The gaps between dropped positions are geometrically distributed, so about p·count draws suffice instead of `count`.
    Given the same seed, the kernels and PyTorch draw different positions. p must be in [0, 1].
    """
    _check_probability(p)
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


def dropout_add(owned: Tensor, x: Tensor | None, p: float) -> tuple[Tensor, Tensor | None]:
    """Overwrite `owned` with x + dropout(owned); return the result and the dropout record.

    Both `owned` and x are (N, d) and contiguous; x may be None. The record is None if p = 0.
    """
    if p == 0:
        return owned if x is None else owned.add_(x), None
    record = draw(owned, p)
    apply_dropout(owned, record, p, 1 / (1 - p), out=owned)
    return owned if x is None else owned.add_(x), record


def dropout_add_backward(dy: Tensor, record: Tensor | None, p: float) -> Tensor:
    """Return the gradient of `owned` in `dropout_add`, given the output gradient dy (N, d); if p was 0, return dy."""
    return dy if record is None else apply_dropout(dy, record, p, 1 / (1 - p))


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element of x (any shape) with probability p, and divide the others by 1 − p. [docs/math.md (70)]
    PyTorch's function is called during compilation, if p = 1, and on accelerators without kernels; p must be in [0, 1].
    """
    _check_probability(p)
    if not training or p == 0:
        return x
    plain = torch.compiler.is_compiling() or p == 1
    if plain or (x.device.type != "cpu" and kernels_for(x, strided=True) is None):
        return F.dropout(x, p, training=True)
    return _Dropout.apply(x, p)


def kept_elements(record: Tensor, shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """Return a mask (any shape, as given): 1 for each element that a record keeps, 0 for the others."""
    ones = torch.ones(tuple(shape), dtype=dtype, device=record.device)
    kernels = kernels_for(ones, is_new=True) if record.dtype == torch.uint64 else None
    if kernels is None:
        return zero_(ones, record, p)
    kernels.drop(ones, p, record, 1.0, ones)
    return ones


def _replay(ctx: Context[tuple[float, torch.Size, torch.dtype]], saved: Sequence[Tensor]) -> Replayed:
    (record,), (p, shape, dtype) = saved, ctx.state
    x = torch.zeros(shape, dtype=dtype, device=record.device, requires_grad=True)
    return (x, None), (x * kept_elements(record, shape, p, dtype) / (1 - p),)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[tuple[float, torch.Size, torch.dtype]], x: Tensor, p: float) -> Tensor:
        record = draw(x, p)
        ctx.save_for_backward(record)
        ctx.state = p, x.shape, x.dtype
        return apply_dropout(x, record, p, 1 / (1 - p))

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[tuple[float, torch.Size, torch.dtype]], dy: Tensor) -> tuple[Tensor, None]:
        (record,), (p, *_) = ctx.saved_tensors, ctx.state
        return apply_dropout(dy, record, p, 1 / (1 - p)), None


def _seed(device: torch.device | str) -> Tensor:
    """Draw a uint64 seed (1,) on a device, using torch's default generator for that device."""
    return torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.uint64)


def _gaps(count: int, p: float, generator: torch.Generator) -> Tensor:
    """Return the dropped positions, drawing the gaps between them from the generator."""
    expected = count * p
    # enough draws to reach the end in all but about one in several thousand calls
    draws = int(expected + 4 * math.sqrt(expected)) + 8
    exact, whole = (torch.float32, torch.int32) if p >= FEW else (torch.float64, torch.int64)
    steps = torch.empty(0, dtype=whole, device=generator.device)
    while True:
        more = torch.rand(draws, dtype=exact, device=generator.device, generator=generator)
        more = more.neg_().log1p_().mul_(1 / math.log1p(-p)).to(whole)
        more[0 if len(steps) else 1 :].add_(1)
        steps = torch.cat([steps, more]) if len(steps) else more
        ends = steps.cumsum(0)
        within = int(torch.searchsorted(ends, count))
        if within < len(ends):
            return ends[:within]


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1]; got {p}")
