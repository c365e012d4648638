"""PyTorch's flash attention kernel for CUDA: dense batches, and packs as variable-length sequences.

The kernel reads heads in the layout of the projections, supports grouped heads and windows. Lengths and offsets come
from Python integers, so no call synchronizes the device.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Pattern

aten = torch.ops.aten

WIDEST = 256
"""Largest head width of the kernel, in multiples of 8."""


def takes(q: Tensor, v: Tensor, pattern: Pattern) -> bool:
    """Return whether the kernel supports the pattern: fp16 or bf16, no softcap, dropout or bias, equal widths of q and
    v.

    Shapes: q (B, H, T, D), v (B, KV, T, E).
    """
    width = q.shape[3]
    plain = pattern.softcap is None and pattern.bias is None and pattern.dropout == 0
    fits = q.dtype in (torch.float16, torch.bfloat16) and width == v.shape[3] and width % 8 == 0 and width <= WIDEST
    return plain and fits and q.device.type == "cuda" and q.numel() > 0 and _has_kernel(q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D), stored as (B, T, H, D), and the log-sum-exp of the rows in fp32.

    Shapes: q (B, H, T, D), k and v (B, KV, T, D) with a contiguous D. The log-sum-exp is (B, H, T), or (H, B·T) for a
    pack.
    """
    call = _call(q, pattern)
    operands = (_by_token(t, call) for t in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        *operands, call.bounds, call.bounds, call.longest, call.longest, 0.0, pattern.causal, False, **call.words
    )
    return out.contiguous().view(q.transpose(1, 2).shape).transpose(1, 2), lse


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
    call = _call(operands[0], pattern)
    dy, q, k, v, out = (_by_token(t, call) for t in (dout, *operands, saved[0]))
    never_read = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout RNG state, unused
    grads = aten._flash_attention_backward(
        dy, q, k, v, out, saved[1], call.bounds, call.bounds, call.longest, call.longest, 0.0, pattern.causal,
        never_read, never_read.new_empty(()), **call.words,
    )  # fmt: skip
    for written, grad in zip(into, grads, strict=True):
        by_token = written.transpose(1, 2)
        by_token.copy_(grad.view(by_token.shape))


class _Call(NamedTuple):
    bounds: Tensor | None  # offsets of a pack's sequences, (sequences + 1,) int32
    longest: int
    words: dict[str, Any]


def _call(q: Tensor, pattern: Pattern) -> _Call:
    batch, _, tokens, width = q.shape
    words: dict[str, Any] = {"scale": pattern.scale_for(width)}
    if pattern.windowed(tokens) and pattern.window is not None:
        before, after = (pattern.window - 1, 0) if pattern.causal else (pattern.window, pattern.window)
        words |= {"window_size_left": before, "window_size_right": after}
    if pattern.segments is None:
        return _Call(None, tokens, words)
    bounds = torch.tensor([0, *itertools.accumulate(pattern.segments * batch)], dtype=torch.int32)
    return _Call(bounds.to(q.device, non_blocking=True), max(pattern.segments), words)


def _by_token(x: Tensor, call: _Call) -> Tensor:
    """Return the operand (B, H, T, D) as (B, T, H, D), or as (B·T, H, D) for a pack."""
    by_token = x.transpose(1, 2)
    by_token = by_token if by_token.stride(-1) == 1 else by_token.contiguous()
    return by_token if call.bounds is None else by_token.flatten(0, 1)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Return whether this PyTorch build and device have the kernel: NVIDIA Ampere or newer."""
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
