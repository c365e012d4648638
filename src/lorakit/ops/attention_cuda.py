"""Attention by PyTorch's flash kernel for CUDA: whole batches as they are, packs by the bounds of their sequences.

The kernel takes heads beside each other as a projection gives them, shares heads of k and v by itself, and knows
windows. It may be given what no stream waits for: bounds and lengths come from Python's numbers.
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
"""Numbers of a head that the kernel takes, in multiples of 8."""


def takes(q: Tensor, v: Tensor, pattern: Pattern) -> bool:
    """Whether the kernel computes this pattern: fp16 or bf16, no cap, no dropout, no bias, one width of q and v.

    q (B, H, T, D), v (B, KV, T, E).
    """
    width = q.shape[3]
    plain = pattern.softcap is None and pattern.bias is None and pattern.dropout == 0
    fits = q.dtype in (torch.float16, torch.bfloat16) and width == v.shape[3] and width % 8 == 0 and width <= WIDEST
    return plain and fits and q.device.type == "cuda" and q.numel() > 0 and _has_kernel(q.device)


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, D), stored as (B, T, H, D), and log Σ exp of the rows' scores in fp32.

    q (B, H, T, D), k and v (B, KV, T, D) with a contiguous D. The sums are (B, H, T), or (H, B·T) of a pack.
    """
    call = _call(q, pattern)
    operands = (_laid(t, call) for t in (q, k, v))
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
    """The gradients of q (B, H, T, D), k and v (B, KV, T, D), written `into` tensors of their shapes.

    dout (B, H, T, D); saved: what `forward` gave.
    """
    call = _call(operands[0], pattern)
    dy, q, k, v, out = (_laid(t, call) for t in (dout, *operands, saved[0]))
    never_read = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout's generator
    grads = aten._flash_attention_backward(
        dy, q, k, v, out, saved[1], call.bounds, call.bounds, call.longest, call.longest, 0.0, pattern.causal,
        never_read, never_read.new_empty(()), **call.words,
    )  # fmt: skip
    for written, grad in zip(into, grads, strict=True):
        by_token = written.transpose(1, 2)
        by_token.copy_(grad.view(by_token.shape))


class _Call(NamedTuple):
    bounds: Tensor | None  # of the sequences of a pack, (sequences + 1,) int32
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


def _laid(x: Tensor, call: _Call) -> Tensor:
    """The operand (B, H, T, D) as (B, T, H, D), or as (B·T, H, D) of a pack."""
    by_token = x.transpose(1, 2)
    by_token = by_token if by_token.stride(-1) == 1 else by_token.contiguous()
    return by_token if call.bounds is None else by_token.flatten(0, 1)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Whether this PyTorch and this device have it: NVIDIA's from Ampere on."""
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
