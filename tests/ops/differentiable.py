"""Attention with autograd, for tests: in lorakit, attention is a part of the attention block's autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.ops.attention import backward, forward
from lorakit.ops.attention_pattern import Pattern


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None) -> Tensor:
    """Compute attention (B, H, T, E) for q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E)."""
    out: Tensor = _Attention.apply(q, k, v, Pattern() if pattern is None else pattern)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        out, lse, record = forward(q, k, v, pattern)
        ctx.pattern = pattern
        ctx.save_for_backward(q, k, v, None if lse is None else out, lse, record)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        return *backward(dout, (q, k, v), tuple(saved), ctx.pattern), None
