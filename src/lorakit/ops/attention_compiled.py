"""Attention in one pass of a compiled kernel, for patterns that consist of whole or causal sequences.

The kernel computes the scores of a few queries at a time and saves nothing. Its backward pass computes them again. For
all other patterns, and on processors without the kernel, `lorakit.ops.attention_products` computes the same results.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Operands, Pattern
from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.protocol import SequenceAttention


def kernel_for(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> SequenceAttention | None:
    """Return the kernel for q (B, H, T, D), k (B, KV, T, D) and v (B, KV, T, E), or None if it must not be used.

    It is not used if there is less than one sequence and head of k for each thread.
    """
    kernels = kernels_for(q, strided=True)
    attention = None if kernels is None else kernels.attention
    if attention is None or q.numel() == 0 or not attention.supports(q, k, v):
        return None
    extra = (pattern.softcap, pattern.bias, pattern.sinks)
    if any(each is not None for each in extra) or pattern.dropout or pattern.windowed(q.shape[2]):
        return None
    tasks = len(q) * k.shape[1] * len(pattern.lengths(q.shape[2]))
    return attention if tasks >= torch.get_num_threads() else None


def forward(kernel: SequenceAttention, operands: Operands, pattern: Pattern) -> Tensor:
    """Return softmax(scores)·v (B, H, T, D), stored as (B, T, H, D)."""
    q, *_ = operands
    batch, heads, tokens, width = q.shape
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    kernel.attend(operands, _ends(pattern.lengths(tokens)), pattern.scale_for(width), pattern.causal, out)
    return out


def backward(kernel: SequenceAttention, dout: Tensor, operands: Operands, into: Operands, pattern: Pattern) -> None:
    """Write the gradients of q, k and v to `into`, as `lorakit.ops.attention_products.backward` does."""
    *_, tokens, width = operands[0].shape
    dout = dout if dout.stride(3) == 1 and min(dout.stride()) >= 0 else dout.contiguous()
    ends, scale = _ends(pattern.lengths(tokens)), pattern.scale_for(width)
    kernel.attend_backward(operands, dout, ends, scale, pattern.causal, into)


@functools.lru_cache(maxsize=64)  # all layers of a model request the same ends
def _ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int64)
