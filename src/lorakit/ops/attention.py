"""Attention over grouped heads, packs, windows and soft-caps: a forward and a backward, and a function of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import attention_cuda, attention_flash, attention_products, choices
from lorakit.ops.adapted import as_written, autocast
from lorakit.ops.attention_pattern import Pattern, mask

# Tokens of the longest sequence from which PyTorch's kernel is taken. On a CPU without matrix units the products are
# the faster way up to 4096 and more; with them, the kernel's work in cache wins earlier.
FLASH_FROM = 2048


def reference(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """Softmax of the masked scores times v, in plain PyTorch. q (B, H, T, D), k, v (B, KV, T, D) -> (B, H, T, D).

    kept (B, H, T, T): 1 for each weight that dropout keeps, 0 for the others; None where there is no dropout.
    """
    pattern.check(q, k, v)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * pattern.scale_for(q.shape[3])
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    if pattern.bias is not None:
        scores = scores + pattern.bias.to(scores.dtype)
    seen = mask(pattern, pattern.lengths(q.shape[2]), q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(q.dtype)
    return (weights if kept is None else weights * kept.to(q.dtype) / (1 - pattern.dropout)) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None) -> Tensor:
    """Softmax(scale·q·kᵀ under the pattern)·v, [docs/math.md (81)]; its gradients are [docs/math.md (82)].

    q (B, H, T, D), k (B, KV, T, D), v (B, KV, T, E), KV a divisor of H, in any strides -> (B, H, T, E), stored as
    (B, T, H, E). Kept for the backward: q, k and v; with flash also the output and a number per row. Nothing (T, T).

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. (1); Ainslie et al. 2023, arXiv:2305.13245, for shared heads;
    Rabe and Staats 2021, arXiv:2112.05682, for weights made again in the backward.

    Raises:
        ValueError: Shapes do not fit, a number of the pattern is out of range, or flash cannot compute it.
    """
    pattern = Pattern() if pattern is None else pattern
    q, k, v = (autocast(t) for t in (q, k, v))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _Attention.apply(q, k, v, pattern)
    return forward(q, k, v, pattern)[0]


def chosen(q: Tensor, v: Tensor, pattern: Pattern) -> str:
    """Which way computes this pattern over q (B, H, T, D) and v (B, KV, T, E): a `Pattern.way`, and not "auto".

    Raises:
        ValueError: Flash is asked for and has no place for what the pattern asks.
    """
    on_cuda = q.device.type == "cuda"
    possible = (attention_cuda if on_cuda else attention_flash).takes(q, v, pattern)
    if pattern.way == "flash" and not possible:
        raise ValueError(
            "way='flash' knows no window, no softcap, no dropout and no value width of its own on a CPU; on "
            "CUDA it knows windows, no bias, and takes fp16 and bf16 alone; use way='auto' or 'products'"
        )
    if pattern.way != "auto":
        return pattern.way
    if on_cuda:
        return "flash" if possible else "products"
    longest = max(pattern.lengths(q.shape[2]), default=0)
    usual = "flash" if longest >= FLASH_FROM else "products"
    way = choices.way_of_attention(q, v, pattern.causal, longest, usual)
    return way if possible or way != "flash" else "products"


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`attention` without autograd: the output (B, H, T, E), stored as (B, T, H, E), and what its backward asks.

    q (B, H, T, D), k (B, KV, T, D), v (B, KV, T, E). The second is log Σ exp of each row's scores in fp32 or wider with
    flash, as its kernel lays them, None with products; the third the record of the weights that were dropped, or None.
    """
    pattern.check(q, k, v)
    way = chosen(q, v, pattern)
    with as_written(q):
        if way == "flash":
            kernel = attention_cuda if q.device.type == "cuda" else attention_flash
            return *kernel.forward(q, k, v, pattern), None
        operands = _widened((q, k, v)) if way == "products in fp32" else (q, k, v)
        out, record = attention_products.forward(*operands, pattern)
        return out.to(q.dtype), None, record


def backward(
    dout: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
    pattern: Pattern,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the output, in `into` or in new tensors stored as (B, T, heads, width).

    dout (B, H, T, E); operands: q (B, H, T, D), k (B, KV, T, D), v (B, KV, T, E); saved: what `forward` gave; of it the
    output may be None where the second is.
    """
    if into is None:
        dq, dk, dv = (_stored_by_token(t) for t in operands)
        into = (dq, dk, dv)
    out, lse, record = saved
    with as_written(dout):
        if lse is None or out is None:
            _by_products(dout, operands, into, pattern, record)
        else:
            kernel = attention_cuda if dout.device.type == "cuda" else attention_flash
            kernel.backward(dout, operands, (out, lse), into, pattern)
    return into


def _by_products(
    dout: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    into: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    record: Tensor | None,
) -> None:
    """`backward` by products, widened where the forward's way was so."""
    if chosen(*operands[::2], pattern) != "products in fp32":
        attention_products.backward(dout, operands, into, pattern, record)
        return
    q, k, v = (_stored_by_token(t, torch.float32) for t in operands)
    attention_products.backward(dout.float(), _widened(operands), (q, k, v), pattern, record)
    for grad, wide in zip(into, (q, k, v), strict=True):
        grad.copy_(wide)


def _widened(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.float() for t in tensors)
    return q, k, v


def _stored_by_token(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of the shape of x (B, H, T, D), stored as (B, T, H, D)."""
    batch, heads, tokens, width = x.shape
    return torch.empty(batch, tokens, heads, width, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        out, lse, record = forward(q, k, v, pattern)
        ctx.pattern = pattern
        ctx.save_for_backward(q, k, v, None if lse is None else out, lse, record)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, *saved = ctx.saved_tensors
        grads = backward(dout, (q, k, v), tuple(saved), ctx.pattern)
        asked = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(grad if needed else None for grad, needed in asked), None)
