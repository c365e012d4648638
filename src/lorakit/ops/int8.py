"""W8A8: matmuls with a frozen weight in int8, in both directions, from a single int8 copy of the weight.

A weight W (out, in) is stored as W ≈ diag(s)·Q·diag(g), where Q is int8, s has one scale per output channel and g one
scale per input channel. Input channels with large values can be left out of Q; their columns keep the dtype of W. Rows
of activations are quantized when they are used, with one scale per row:

    y = t·(q(x·g)·Qᵀ)·s + x_K·W_Kᵀ        t: scale per row of x·g; K: channels that are left out
    dx = u·(q(dy·s)·Q)·g,  dx_K = dy·W_K   u: scale per row of dy·s

Folding g into x and s into dy lets one copy Q serve both directions (SwitchBack, arXiv:2304.13013, keeps two). Choosing
g from the values of x moves outliers from x to W, which has a scale per row (SmoothQuant, arXiv:2211.10438).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.machine import INT8_UNITS, this_machine
from lorakit.ops.autograd import Context, rows

LEVELS = 127
"""Largest absolute value of a quantized element; −128 is not used, so that the range is symmetric."""

KEPT_CHANNELS = 16
"""Default number of input channels of a weight that keep their dtype."""

SMOOTHING = 0.5
"""Default exponent of the activations' maximum in the input scales; 1 moves outliers to the weight entirely."""


IntegerMatmul = Callable[[Tensor, Tensor], Tensor]
"""int8 matrices (N, k) and (k, n) -> their exact product, int32 (N, n)."""


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A frozen weight (out, in), W ≈ diag(s)·Q·diag(g), except for columns that keep their dtype.

    Attributes:
        q: Q, int8 (out, in), contiguous; zero in the columns that are left out.
        scale: s, fp32 (out,).
        gain: g, fp32 (in,). Weights that share an input share this tensor.
        kept: Positions K of the columns that keep their dtype, int64 (k,), ascending. Weights that share an input share
            this tensor.
        columns: W_K (out, k), in the dtype of the original weight.
    """

    q: Tensor
    scale: Tensor
    gain: Tensor
    kept: Tensor
    columns: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the original weight, in which the outputs are."""
        return self.columns.dtype


def input_scales(
    absmax: Tensor, weights: Sequence[Tensor], kept: int = KEPT_CHANNELS, smoothing: float = SMOOTHING
) -> tuple[Tensor, Tensor]:
    """Return g (in,) and K (k,) for weights that share an input.

    g_i = (w_i^(1−a) / c_i^a) with c_i = `absmax`, the largest |x_i| seen, w_i the largest |W_oi| of all weights, and a
    = `smoothing`. After that, x·g and W/g have the same largest value in each channel if a is 0.5, (c_i·w_i)^½, and the
    channels with the largest are left out. A channel without values, c_i = 0 or w_i = 0, gets g_i = 1.

    Args:
        absmax: Largest absolute value of each input channel, (in,).
        weights: Weights (out, in), each with its own number of outputs.
        kept: Number of channels to leave out.
        smoothing: Exponent a, from 0 to 1.
    """
    seen = absmax.detach().float()
    widest = torch.stack([W.detach().abs().amax(0).float() for W in weights]).amax(0)
    has_values = (seen > 0) & (widest > 0)
    gain = torch.where(has_values, widest ** (1 - smoothing) / seen**smoothing, 1.0)
    left_out = torch.topk(seen * widest, min(kept, len(seen))).indices.sort().values
    return gain, left_out


def quantize_weight(W: Tensor, gain: Tensor, kept: Tensor) -> Int8Weight:
    """Return the int8 form of a weight W (out, in), given g (in,) and K (k,) from `input_scales`."""
    scaled = W.detach().float() / gain
    scaled[:, kept] = 0
    q, scale = quantize_rows(scaled)
    return Int8Weight(q, scale, gain, kept, W.detach()[:, kept].contiguous())


def dequantize(weight: Int8Weight) -> Tensor:
    """Return diag(s)·Q·diag(g) with the columns that kept their dtype, in fp32 (out, in)."""
    W = weight.q.float() * weight.scale[:, None] * weight.gain
    W[:, weight.kept] = weight.columns.float()
    return W


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x (N, d), fp32, to the nearest of 255 levels.

    Returns:
        int8 values (N, d) and fp32 scales (N,): x ≈ scale·q. Both are zero for a row of zeros.
    """
    largest = x.abs().amax(1)
    inverse = torch.where(largest > 0, LEVELS / largest, 0.0)
    return (x * inverse[:, None]).round().to(torch.int8), largest / LEVELS


def reference_integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact product of int8 matrices (N, k) and (k, n) as int32 (N, n)."""
    return (a.double() @ b.double()).to(torch.int32)  # exact: no sum exceeds 2^53


def reference_forward(x: Tensor, weight: Int8Weight, plus: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ, plus `plus` (out,) or (N, out), for x (N, in), rounded once to the dtype of x."""
    return _forward(x, weight, plus, reference_integer_matmul)


def reference_backward(dy: Tensor, weight: Int8Weight, plus: Tensor | None = None) -> Tensor:
    """Return dy·W, plus `plus` (N, in), for dy (N, out), rounded once to the dtype of dy."""
    return _backward(dy, weight, plus, reference_integer_matmul)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b for x (…, in); gradients flow to x, through int8 matmuls too, and not to the bias (out,)."""
    y: Tensor = _Int8Linear.apply(x, weight, bias)
    return y


def _forward(x: Tensor, weight: Int8Weight, plus: Tensor | None, matmul: IntegerMatmul) -> Tensor:
    wide = x.float()
    scaled = wide * weight.gain
    scaled[:, weight.kept] = 0
    q, t = quantize_rows(scaled)
    y = matmul(q, weight.q.t()).float() * t[:, None] * weight.scale
    y += wide[:, weight.kept] @ weight.columns.float().t()
    return (y if plus is None else y + plus.float()).to(x.dtype)


def _backward(dy: Tensor, weight: Int8Weight, plus: Tensor | None, matmul: IntegerMatmul) -> Tensor:
    wide = dy.float()
    q, u = quantize_rows(wide * weight.scale)
    dx = matmul(q, weight.q).float() * u[:, None] * weight.gain
    dx[:, weight.kept] = wide @ weight.columns.float()
    return (dx if plus is None else dx + plus.float()).to(dy.dtype)


@functools.cache
def why_no_int8_matmuls() -> str:
    """Return why int8 matmuls are not fast or not exact on this machine's processor, or "" if they are both.

    Without int8 units, PyTorch multiplies in a loop that is slower than bf16 matmuls, and some older versions returned
    wrong results. One product in each direction is therefore compared with its exact result, once per process.
    """
    units = [unit for unit in INT8_UNITS if unit in this_machine().features]
    if not units:
        return f"the processor has no int8 units ({' or '.join(INT8_UNITS)})"
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-LEVELS, LEVELS + 1, shape, generator=g).to(torch.int8) for shape in ((33, 577), (577, 70)))
    for right in (b, b.t().contiguous().t()):
        if not torch.equal(torch._int_mm(a, right), reference_integer_matmul(a, right)):
            return f"PyTorch {torch.__version__} returns wrong int8 products on this processor"
    return ""


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[tuple[Int8Weight, torch.Size]], x: Tensor, weight: Int8Weight, bias: Tensor | None
    ) -> Tensor:
        ctx.state = weight, x.shape
        return _forward(rows(x), weight, bias, torch._int_mm).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[tuple[Int8Weight, torch.Size]], dy: Tensor) -> tuple[Tensor, None, None]:
        weight, shape = ctx.state
        return _backward(rows(dy), weight, None, torch._int_mm).view(shape), None, None
