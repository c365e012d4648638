"""W8A8: matmuls with a frozen weight in int8, in both directions, from a single int8 copy of the weight.

A weight W (out, in) is stored as W ≈ diag(s)·Q·diag(g), where Q is int8, s has one scale per output channel and g one
scale per input channel. Input channels with large values can be left out of Q; their columns keep the dtype of W. Rows
of activations are quantized when they are used, with one scale per row:

    y = t·(q(x·g)·Qᵀ)·s + x_K·W_Kᵀ        t: scale per row of x·g; K: channels that are left out; x·g is 0 at K
    dx = u·(q(dy·s)·Q)·g,  dx_K = dy·W_K   u: scale per row of dy·s

Folding g into x and s into dy lets one copy Q serve both directions (SwitchBack, arXiv:2304.13013, keeps two). Choosing
g from the values of x moves outliers from x to W, which has a scale per row (SmoothQuant, arXiv:2211.10438).

A fused operation quantizes an input once for all of its weights (`Int8Inputs`), and adds the bias and the low-rank
result where it rounds (`output`, `input_gradient`). The integer matmuls are exact. The steps around them run in C if
there are kernels, and in PyTorch's fp32 operations otherwise. With few rows, as in decoding, one function in C does all
steps (`few_rows`), and the results have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.machine import INT8_UNITS, this_machine
from lorakit.ops.autograd import Context, rows
from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.compiled import MOST_ROWS

LEVELS = 127
"""Largest absolute value of a quantized element; −128 is not used, so that the range is symmetric."""

KEPT_CHANNELS = 16
"""Default number of input channels of a weight that keep their dtype."""

SMOOTHING = 0.5
"""Default exponent of the activations' maximum in the input scales; 1 moves outliers to the weight entirely."""


SMALLEST = 2.0**-100
"""Rows whose largest absolute value is not above this are quantized to zeros: 127 divided by it must be finite."""

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

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the original weight, (out, in)."""
        return self.q.shape

    @property
    def device(self) -> torch.device:
        """Return the device of the tensors."""
        return self.q.device

    @property
    def requires_grad(self) -> bool:
        """Return False: the weight is frozen."""
        return False


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
    inverse = torch.where(largest > SMALLEST, LEVELS / largest, 0.0)
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
    if not torch.is_grad_enabled():  # a call of an autograd function takes longer than the matmul with one row
        few = few_rows(x, weight, bias)
        if few is not None:
            return few
    y: Tensor = _Int8Linear.apply(x, weight, bias)
    return y


def few_rows(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor | None:
    """Return x·Wᵀ + b (…, out) for x (…, in), without autograd, or None if there are too many rows for the kernel.

    The result has the bits of `output`.

    Args:
        x: The input.
        weight: W (out, in).
        bias: b (out,), or None.
    """
    width = weight.q.shape[1]
    if not 0 < x.numel() <= MOST_ROWS * width:
        return None
    kernels = kernels_for(x, weight.columns, bias)
    steps = None if kernels is None else kernels.int8
    if steps is None or x.numel() > steps.few_rows * width:
        return None
    return steps.int8_few_rows(x, weight.gain, weight.kept, weight.q, weight.scale, weight.columns, bias)


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
    wrong results. One matmul in each direction is therefore compared with its exact result, once per process.
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


class Int8Inputs:
    """The quantized rows of an input x (N, in), made once for all weights that share their gain and kept channels."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._made: dict[tuple[int, int], _Quantized] = {}

    def quantized(self, weight: Int8Weight) -> _Quantized:
        """Return x in the form in which `weight` (out, in) multiplies it."""
        key = id(weight.gain), id(weight.kept)
        if key not in self._made:
            q, t = _quantized(self.x, weight.gain.index_fill(0, weight.kept, 0))
            self._made[key] = _Quantized(q, t, self.x.index_select(1, weight.kept))
        return self._made[key]


class _Quantized(NamedTuple):
    q: Tensor  # int8 (N, in)
    scale: Tensor  # fp32 (N,)
    kept: Tensor  # columns of x that are left out, (N, k)


def output(
    inputs: Int8Inputs,
    weight: Int8Weight,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor:
    """Return x·Wᵀ + b + h·Bᵀ (N, out), rounded once to the dtype of x.

    Args:
        inputs: The input x (N, in).
        weight: W (out, in).
        bias: b (out,), or None.
        h: Low-rank activation (N, r), with the scale, in the dtype of x; or None.
        B: Factor (out, r) in the dtype of x, or None.
    """
    if h is None and (y := few_rows(inputs.x, weight, bias)) is not None:
        return y
    x, (q, t, kept) = inputs.x, inputs.quantized(weight)
    columns = weight.columns.to(x.dtype)
    left, right = (kept, columns) if h is None or B is None else (torch.cat((h, kept), 1), torch.cat((B, columns), 1))
    bias = None if bias is None else bias.to(x.dtype)
    sums, kernels = _integer_matmul(q, weight.q.t()), kernels_for(x, left, bias)
    if kernels is None or kernels.int8 is None:
        y = sums.float() * t[:, None] * weight.scale + left.float() @ right.float().t()
        return (y if bias is None else y + bias.float()).to(x.dtype)
    if left.shape[1] % 2:
        left, right = (torch.nn.functional.pad(side, (0, 1)) for side in (left, right))
    y = x.new_empty(sums.shape)
    kernels.int8.int8_output(sums, t, weight.scale, bias, left, _paired(right), y)
    return y


def _paired(right: Tensor) -> Tensor:
    """Rearrange (out, k) as (k/2, out, 2), moving each pair of numbers as one integer."""
    if not right.shape[1]:
        return right.new_empty(0, len(right), 2)
    pairs = right.contiguous().view({2: torch.int32, 4: torch.int64}[right.element_size()])
    return pairs.t().contiguous().view(right.dtype).view(*pairs.shape[::-1], 2)


def input_gradient(dys: Sequence[tuple[Tensor, Int8Weight]], plus: Tensor | None = None) -> Tensor:
    """Return the sum of dy·W (N, in) over several outputs, plus `plus` (N, in), which may be overwritten.

    The sum is in fp32 and is rounded once to the dtype of dy if all weights share their gain and kept channels,
    otherwise once for each such set. Products with columns that keep their dtype are rounded before they are added.

    Args:
        dys: Gradient (N, out) of each output, and its weight (out, in).
        plus: Tensor to add.
    """
    groups: dict[tuple[int, int], list[tuple[Tensor, Int8Weight]]] = {}
    for dy, weight in dys:
        groups.setdefault((id(weight.gain), id(weight.kept)), []).append((dy, weight))
    for group in groups.values():
        plus = _group_gradient(group, plus)
    assert plus is not None  # `dys` is not empty
    return plus


def _group_gradient(dys: Sequence[tuple[Tensor, Int8Weight]], plus: Tensor | None) -> Tensor:
    dy, shared = dys[0]
    columns = torch.stack([torch.mm(each, weight.columns.to(each.dtype)).float() for each, weight in dys]).sum(0)
    plus = dy.new_zeros(len(dy), shared.q.shape[1]) if plus is None else plus
    kernels = kernels_for(dy, plus)
    steps = None if kernels is None else kernels.int8
    total: Tensor | None = None
    for number, (each, weight) in enumerate(dys, 1):
        q, u = _quantized(each, weight.scale)
        sums = _integer_matmul(q, weight.q)
        if steps is None:
            made = sums.float() * u[:, None] * weight.gain
            total = made if total is None else total + made
        elif number < len(dys):
            partial, total = total, torch.empty(sums.shape) if total is None else total
            steps.int8_add(sums, u, weight.gain, partial, total)
        else:
            steps.int8_input_gradient(sums, u, weight.gain, columns, weight.kept, total, plus)
            return plus
    assert total is not None
    return (total.index_add(1, shared.kept, columns) + plus.float()).to(dy.dtype)


def _quantized(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return `quantize_rows` of x·factors for x (N, d) and fp32 factors (d,)."""
    kernels = kernels_for(x)
    if kernels is None or kernels.int8 is None:
        return quantize_rows(x.float() * factors)
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    kernels.int8.int8_quantize(x, factors, q, scale)
    return q, scale


def _integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    # compiled code cannot contain the check of the processor
    if a.device.type != "cpu" or torch.compiler.is_compiling() or not why_no_int8_matmuls():
        return torch._int_mm(a, b)
    return reference_integer_matmul(a, b)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context[tuple[Int8Weight, torch.Size]], x: Tensor, weight: Int8Weight, bias: Tensor | None
    ) -> Tensor:
        ctx.state = weight, x.shape
        return output(Int8Inputs(rows(x)), weight, bias).view(*x.shape[:-1], len(weight.q))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[tuple[Int8Weight, torch.Size]], dy: Tensor) -> tuple[Tensor, None, None]:
        weight, shape = ctx.state
        return input_gradient([(rows(dy), weight)]).view(shape), None, None
