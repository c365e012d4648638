"""Activations with or without a factor, and their gradients, [docs/math.md (78)] and (79): one pass, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def value(x, ACT: tl.constexpr):
    """f(x) of numbers in fp32."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(ACT == "relu", "this activation has no kernel")
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    return y


@triton.jit
def slope(x, ACT: tl.constexpr):
    """f'(x) of numbers in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        y = s + x * (s * (1.0 - s)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    else:
        tl.static_assert(ACT == "relu", "this activation has no kernel")
        y = tl.where(x <= 0.0, 0.0, 1.0)
    return y


@triton.jit
def gate(first, up, out, count, ACT: tl.constexpr, HAS_UP: tl.constexpr, BLOCK: tl.constexpr):
    """Write f(first)·up, or f(first), of so many numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = value(tl.load(first + at, mask=inside, other=0.0).to(tl.float32), ACT)
    if HAS_UP:
        y = y * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=inside)


@triton.jit
def gate_backward(da, first, up, dfirst, dup, count, ACT: tl.constexpr, HAS_UP: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of `gate`: dfirst, which may be da, and dup."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(da + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_UP:
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dup + at, g * value(x, ACT), mask=inside)
        g = g * u
    tl.store(dfirst + at, g * slope(x, ACT), mask=inside)
