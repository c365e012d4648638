"""PyTorch's flash attention kernel for CPUs, called per sequence of a pack, with its own backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Pattern, pieces


class _Part(NamedTuple):
    batch: slice | int
    tokens: slice


def takes(q: Tensor, v: Tensor, pattern: Pattern) -> bool:
    """Return whether the kernel supports the pattern: no window, softcap or dropout, a CPU, and equal widths of q and
    v.

    Shapes: q (B, H, T, D), v (B, KV, T, E).
    """
    plain = pattern.softcap is None and pattern.dropout == 0 and not pattern.windowed(q.shape[2])
    return plain and q.device.type == "cpu" and q.shape[3] == v.shape[3]


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D), stored as (B, T, H, D), and the log-sum-exp of each row (B, H, T), fp32 or wider.

    Shapes: q (B, H, T, D), k and v (B, KV, T, D), any strides with a contiguous D; repeated heads are expanded by
    strides, not copied.
    """
    batch, heads, tokens, width = q.shape
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for part in _parts(q, k, pattern):
        operands = _operands(q, k, v, part)
        bias = _bias(q, k, pattern, part)
        o, sums = kernel(*operands, 0.0, pattern.causal, attn_mask=bias, scale=pattern.scale_for(width))
        _grouped(out, k, part).copy_(o)
        _grouped(lse.unsqueeze(3), k, part).copy_(sums.unsqueeze(3))
    return out, lse


def backward(
    dout: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    into: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
) -> None:
    """Write the gradients of q (B, H, T, D), k and v (B, KV, T, D) `into` tensors of these shapes.

    dout is (B, H, T, D); `saved` is from `forward`.
    """
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
    """Yield one sequence of one batch row, or of all rows if no head is shared."""
    for piece in pieces(q.shape[0], q.shape[2], pattern, rows_at_once=q.shape[0], join=0):
        if q.shape[1] == k.shape[1]:
            yield _Part(piece.batch, piece.tokens)
        else:
            yield from (_Part(row, piece.tokens) for row in range(q.shape[0]))


def _grouped(x: Tensor, k: Tensor, part: _Part) -> Tensor:
    """Return a part of x (B, H, T, D) as (b, H, t, D), or (KV, G, t, D) if G heads share one of k; always a view."""
    cut = x[part.batch, :, part.tokens]
    return cut.unflatten(0, (k.shape[1], -1)) if isinstance(part.batch, int) else cut


def _bias(q: Tensor, k: Tensor, pattern: Pattern, part: _Part) -> Tensor | None:
    """Return the bias of a part's scores, a view (b, H, t, t) or (KV, G, t, t), or None."""
    if pattern.bias is None:
        return None
    tokens = q.shape[2]
    every = pattern.bias.to(q.dtype).expand(q.shape[0], q.shape[1], tokens, tokens)
    return _grouped(every[..., part.tokens], k, part)


def _operands(q: Tensor, k: Tensor, v: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    queries = _grouped(q, k, part)
    if not isinstance(part.batch, int):
        return queries, k[part.batch, :, part.tokens], v[part.batch, :, part.tokens]
    keys, values = (t[part.batch, :, part.tokens].unsqueeze(1).expand(-1, queries.shape[1], -1, -1) for t in (k, v))
    return queries, keys, values
