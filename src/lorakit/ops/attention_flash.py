"""Attention with PyTorch's flash kernels, forward and backward.

On a CPU, the kernel is called once per packed sequence. It does not support sinks, so its results are corrected with
[docs/math.md (86)]; its backward pass is exact if it is given the corrected results. On CUDA, one call handles a dense
or packed batch. Lengths and offsets are Python integers, so no call synchronizes the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Operands, Pattern, pieces


class _Part(NamedTuple):
    batch: slice | int
    tokens: slice


WIDEST = 256
"""Largest head width that the CUDA kernel supports; widths must be multiples of 8."""


def takes(q: Tensor, v: Tensor, pattern: Pattern) -> bool:
    """Return whether the device of q (B, H, T, D) has a flash kernel that supports the pattern; v is (B, KV, T, E)."""
    width = q.shape[3]
    if pattern.softcap is not None or pattern.dropout > 0 or width != v.shape[3]:
        return False
    if q.device.type != "cuda":
        return q.device.type == "cpu" and not pattern.windowed(q.shape[2])
    fits = q.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= WIDEST
    return pattern.bias is None and pattern.sinks is None and fits and q.numel() > 0 and _has_kernel(q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D), stored as (B, T, H, D), and each row's log-sum-exp (B, H, T) in fp32 or wider.
    Both include the sinks. Shapes: q (B, H, T, D), k and v (B, KV, T, D). Only the last dimension must be contiguous.
    """
    batch, heads, tokens, width = q.shape
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for part in _parts(q, k, pattern):
        operands = _operands(q, k, v, part)
        bias = _bias(q, k, pattern, part)
        o, sums = kernel(*operands, 0.0, pattern.causal, attn_mask=bias, scale=pattern.scale_for(width))
        sums, sinks = sums.unsqueeze(3), _sinks(q, k, pattern, part)
        if sinks is not None:
            # exp(lse − logaddexp(lse, sink)), without the rounding errors of large log-sum-exps
            o, sums = o * torch.sigmoid(sums - sinks), torch.logaddexp(sums, sinks)
        _grouped(out, k, part).copy_(o)
        _grouped(lse.unsqueeze(3), k, part).copy_(sums)
    return out, lse


def backward(dout: Tensor, operands: Operands, saved: tuple[Tensor, Tensor], into: Operands, pattern: Pattern) -> None:
    """Write the gradients of q (B, H, T, D), k and v (B, KV, T, D) to `into`; dout is (B, H, T, D)."""
    q, k, v = operands
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for part in _parts(q, k, pattern):
        dy, out, lse = (_grouped(t, k, part) for t in (dout, saved[0], saved[1].unsqueeze(3)))
        cut = _operands(q, k, v, part)
        rest = (lse.squeeze(3).contiguous(), 0.0, pattern.causal)
        bias = _bias(q, k, pattern, part)
        dq, *others = kernel(dy, *cut, out, *rest, attn_mask=bias, scale=pattern.scale_for(q.shape[3]))
        _grouped(into[0], k, part).copy_(dq)
        for written, grad in zip(into[1:], others, strict=True):
            shared = grad if k.shape[1] == q.shape[1] else grad.sum(1)
            written[part.batch, :, part.tokens].copy_(shared)


def _parts(q: Tensor, k: Tensor, pattern: Pattern) -> Iterator[_Part]:
    """Yield one part per sequence for all batch rows or, if heads of q share a head of k, for each batch row."""
    for piece in pieces(q.shape[0], q.shape[2], pattern, rows_at_once=q.shape[0], join=0):
        if q.shape[1] == k.shape[1]:
            yield _Part(piece.batch, piece.tokens)
        else:
            yield from (_Part(row, piece.tokens) for row in range(q.shape[0]))


def _grouped(x: Tensor, k: Tensor, part: _Part) -> Tensor:
    """Return a part of x (B, H, T, D) as a view (b, H, t, D), or (KV, G, t, D) if G heads of q share each head of k."""
    cut = x[part.batch, :, part.tokens]
    return cut.unflatten(0, (k.shape[1], -1)) if isinstance(part.batch, int) else cut


def _bias(q: Tensor, k: Tensor, pattern: Pattern, part: _Part) -> Tensor | None:
    """Return the bias for a part's scores as a view (b, H, t, t) or (KV, G, t, t), or None if there is no bias."""
    if pattern.bias is None:
        return None
    every = pattern.bias.to(q.dtype).expand(*q.shape[:3], q.shape[2])
    return _grouped(every[..., part.tokens], k, part)


def _sinks(q: Tensor, k: Tensor, pattern: Pattern, part: _Part) -> Tensor | None:
    """Return the sinks for a part's rows as a view (b, H, t, 1) or (KV, G, t, 1), in fp32 or wider, or None."""
    if pattern.sinks is None:
        return None
    every = pattern.sinks.to(torch.promote_types(q.dtype, torch.float32)).view(-1, 1, 1).expand(*q.shape[:3], 1)
    return _grouped(every, k, part)


def _operands(q: Tensor, k: Tensor, v: Tensor, part: _Part) -> Operands:
    queries = _grouped(q, k, part)
    if not isinstance(part.batch, int):
        return queries, k[part.batch, :, part.tokens], v[part.batch, :, part.tokens]
    keys, values = (t[part.batch, :, part.tokens].unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for t in (k, v))
    return queries, keys, values


# ---- CUDA

aten = torch.ops.aten


def forward_on_cuda(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D), stored as (B, T, H, D), and the log-sum-exp of each row in fp32.
    Shapes: q (B, H, T, D), k and v (B, KV, T, D). The log-sum-exp is (B, H, T), or (H, B·T) for a packed batch.
    """
    call = _call(q, pattern)
    operands = (_by_token(t, call) for t in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        *operands, call.bounds, call.bounds, call.longest, call.longest, 0.0, pattern.causal, False, **call.words
    )
    return out.contiguous().view(q.transpose(1, 2).shape).transpose(1, 2), lse


def backward_on_cuda(
    dout: Tensor, operands: Operands, saved: tuple[Tensor, Tensor], into: Operands, pattern: Pattern
) -> None:
    """Write the gradients of q (B, H, T, D), k and v (B, KV, T, D) to `into`, as `backward` does for a CPU."""
    call = _call(operands[0], pattern)
    dy, q, k, v, out = (_by_token(t, call) for t in (dout, *operands, saved[0]))
    never_read = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout random number generator
    grads = aten._flash_attention_backward(
        dy, q, k, v, out, saved[1], call.bounds, call.bounds, call.longest, call.longest, 0.0, pattern.causal,
        never_read, never_read.new_empty(()), **call.words,
    )  # fmt: skip
    for written, grad in zip(into, grads, strict=True):
        by_token = written.transpose(1, 2)
        by_token.copy_(grad.view(by_token.shape))


class _Call(NamedTuple):
    bounds: Tensor | None  # offsets of the packed sequences, (sequences + 1,) int32
    longest: int
    words: dict[str, float]


def _call(q: Tensor, pattern: Pattern) -> _Call:
    batch, _, tokens, width = q.shape
    words = {"scale": pattern.scale_for(width)}
    if pattern.windowed(tokens) and pattern.window is not None:
        before, after = (pattern.window - 1, 0) if pattern.causal else (pattern.window, pattern.window)
        words |= {"window_size_left": before, "window_size_right": after}
    if pattern.segments is None:
        return _Call(None, tokens, words)
    bounds = torch.tensor([0, *itertools.accumulate(pattern.segments * batch)], dtype=torch.int32)
    return _Call(bounds.to(q.device, non_blocking=True), max(pattern.segments), words)


def _by_token(x: Tensor, call: _Call) -> Tensor:
    """Return an operand x (B, H, T, D) as (B, T, H, D), or as (B·T, H, D) for a packed batch."""
    by_token = x.transpose(1, 2)
    by_token = by_token if by_token.stride(-1) == 1 else by_token.contiguous()
    return by_token if call.bounds is None else by_token.flatten(0, 1)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Return whether this PyTorch build has the kernel and the device (NVIDIA Ampere or newer) supports it."""
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
