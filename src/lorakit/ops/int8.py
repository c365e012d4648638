"""W8A8: matmuls with a frozen weight in int8, in both directions, from a single int8 copy of the weight.

A weight W (out, in) is stored as W ≈ diag(s)·Q·diag(g), where Q is int8, s has one scale per output channel and g one
scale per input channel. Input channels with large values can be left out of Q; their columns keep the dtype of W. Rows
of activations are quantized when they are used, with one scale per row:

    y = t·(q(x·g)·Qᵀ)·s + x_K·W_Kᵀ        t: scale per row of x·g; K: channels that are left out; x·g is 0 at K
    dx = u·(q(dy·s)·Q)·g,  dx_K = dy·W_K   u: scale per row of dy·s

Folding g into x and s into dy lets one copy Q serve both directions (SwitchBack, arXiv:2304.13013, keeps two). Choosing
g from the values of x moves outliers from x to W, which has a scale per row (SmoothQuant, arXiv:2211.10438).

An input is quantized once for all of its weights (`Int8Inputs`); bias and low-rank result are added before rounding.
The integer matmuls are exact. The steps around them run in C if there are kernels; with AMX, or VNNI and bf16 dot
products, one function does the matmul and the steps after it, and with few rows, all steps, with the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.machine import INT8_UNITS, this_machine
from lorakit.ops.autograd import Context, rows
from lorakit.ops.int8_weight import LEVELS, Int8Weight, quantize_rows
from lorakit.ops.kernels import Kernels, kernels_for
from lorakit.ops.kernels.compiled import MOST_ROWS
from lorakit.ops.kernels.compiled_matmuls import CompiledInt8Matmuls

KERNEL_SIZES = (192, 128), (70, 128), (70, 192)
"""Shapes of a weight, of rows of an input and of rows of a gradient, to check kernels with."""


def reference_integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact product of int8 matrices (N, k) and (k, n) as int32 (N, n)."""
    return (a.double() @ b.double()).to(torch.int32)  # exact: no sum exceeds 2^53


def reference_forward(x: Tensor, weight: Int8Weight, plus: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ, plus `plus` (out,) or (N, out), for x (N, in), rounded once to the dtype of x."""
    wide = x.float()
    scaled = wide * weight.gain
    scaled[:, weight.kept] = 0
    q, t = quantize_rows(scaled)
    y = reference_integer_matmul(q, weight.q.t()).float() * t[:, None] * weight.scale
    y += wide[:, weight.kept] @ weight.columns.float().t()
    return (y if plus is None else y + plus.float()).to(x.dtype)


def reference_backward(dy: Tensor, weight: Int8Weight, plus: Tensor | None = None) -> Tensor:
    """Return dy·W, plus `plus` (N, in), for dy (N, out), rounded once to the dtype of dy."""
    wide = dy.float()
    q, u = quantize_rows(wide * weight.scale)
    dx = reference_integer_matmul(q, weight.q).float() * u[:, None] * weight.gain
    dx[:, weight.kept] = wide @ weight.columns.float()
    return (dx if plus is None else dx + plus.float()).to(dy.dtype)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b for x (…, in); gradients flow to x, through int8 matmuls too, and not to the bias (out,)."""
    if not torch.is_grad_enabled():  # a call of an autograd function takes longer than the matmul with one row
        few = few_rows(x, weight, bias)
        if few is not None:
            return few
    y: Tensor = Int8Linear.apply(x, weight, bias)
    return y


def few_rows(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor | None:
    """Return x·Wᵀ + b (…, out) for x (…, in), with the bits of `output`, or None if a kernel lacks or rows are many."""
    width = weight.q.shape[1]
    if not 0 < x.numel() <= MOST_ROWS * width:
        return None
    kernels = kernels_for(x, weight.columns, bias)
    steps = None if kernels is None else kernels.int8
    if steps is None or x.numel() > steps.few_rows * width:
        return None
    return steps.int8_few_rows(x, weight.gain, weight.kept, weight.q, weight.scale, weight.columns, bias)


@functools.cache
def why_no_int8_matmuls() -> str:
    """Return why int8 matmuls are not fast or not exact on this machine's processor, or "" if they are both.

    Without int8 units, PyTorch's are slower than bf16 matmuls, and some older versions returned wrong results, so one
    in each direction is compared with its exact result, once per process.
    """
    units = [unit for unit in INT8_UNITS if unit in this_machine().features]
    if not units:
        return f"the processor has no int8 units ({' or '.join(INT8_UNITS)})"
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-LEVELS, LEVELS + 1, shape, generator=g).to(torch.int8) for shape in ((33, 577), (577, 70)))
    for right in (b, b.t().contiguous().t()):
        if not torch.equal(torch._int_mm(a, right), reference_integer_matmul(a, right)):
            return f"PyTorch {torch.__version__} returns wrong int8 products on this processor"
    return "" if _exact_kernels(g) else "the CPU kernels return wrong int8 products on this processor"


def _exact_kernels(g: torch.Generator) -> bool:
    """Return whether the kernels for int8 matmuls, if there are any, are exact in both directions."""
    Q, q, dq = (torch.randint(-LEVELS, LEVELS + 1, shape, generator=g).to(torch.int8) for shape in KERNEL_SIZES)
    kernels = kernels_for(torch.empty(0, dtype=torch.bfloat16))
    matmuls = None if kernels is None else kernels.int8_matmuls
    if matmuls is None:
        return True
    rows, (out, width) = len(q), Q.shape
    ones = torch.ones(max(rows, out, width), dtype=torch.float32)
    none = torch.empty(rows, 0, dtype=torch.bfloat16), torch.empty(out, 0, dtype=torch.bfloat16)
    y, dx = torch.empty(rows, out, dtype=torch.bfloat16), torch.empty(rows, width, dtype=torch.float32)
    matmuls.int8_matmul_output(q, Q, (ones[:rows], ones[:out]), None, (none, none), y)
    matmuls.int8_matmul_add(dq, Q, (ones[:rows], ones[:width]), None, dx)
    forward, backward = (reference_integer_matmul(a, b).float() for a, b in ((q, Q.t()), (dq, Q)))
    return torch.equal(y, forward.bfloat16()) and torch.equal(dx, backward)


class Int8Inputs:
    """The quantized rows of an input x (N, in), made once for all weights that share their gain and kept channels."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._made: dict[tuple[int, int], _Quantized] = {}

    def quantized(self, weight: Int8Weight) -> _Quantized:
        """Return x in the form in which `weight` (out, in) multiplies it."""
        key = id(weight.gain), id(weight.kept)
        if key not in self._made:
            factors = weight.gain.index_fill(0, weight.kept, 0)
            self._made[key] = _quantized(self.x, factors, weight.kept)
        return self._made[key]


class _Quantized(NamedTuple):
    q: Tensor  # int8 (N, d)
    scale: Tensor  # fp32 (N,)
    kept: Tensor  # the kept columns of the input, in its dtype (N, k)


def output(
    inputs: Int8Inputs,
    weight: Int8Weight,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor:
    """Return x·Wᵀ + b + h·Bᵀ (N, out), rounded once to the dtype of x.
    Shapes: x (N, in), W (out, in), b (out,); h (N, r), with the scale, and B (out, r), in the dtype of x.
    """
    if h is None and (y := few_rows(inputs.x, weight, bias)) is not None:
        return y
    x, (q, t, kept) = inputs.x, inputs.quantized(weight)
    h, B = (x.new_empty(len(x), 0), x.new_empty(len(weight.q), 0)) if h is None or B is None else (h, B)
    bias, columns = None if bias is None else bias.to(x.dtype), weight.columns.to(x.dtype)
    # h may be a part of a wider matrix, which adapters without dropout share
    kernels, y = kernels_for(h, x, bias, strided=True), x.new_empty(len(x), len(weight.q))
    matmuls = _matmuls(kernels, x.dtype, q, weight)
    if matmuls is not None:
        h = h if h.stride(1) == 1 else h.clone(memory_format=torch.contiguous_format)
        matmuls.int8_matmul_output(q, weight.q, (t, weight.scale), bias, ((h, B.contiguous()), (kept, columns)), y)
        return y
    left, right = torch.cat((h, kept), 1), torch.cat((B, columns), 1)
    sums = _integer_matmul(q, weight.q.t())
    if kernels is None or kernels.int8 is None:
        y = sums.float() * t[:, None] * weight.scale + left.float() @ right.float().t()
        return (y if bias is None else y + bias.float()).to(x.dtype)
    left, right = _even(left, right)
    kernels.int8.int8_output(sums, t, weight.scale, bias, left, _paired(right), y)
    return y


def _matmuls(kernels: Kernels | None, dtype: torch.dtype, q: Tensor, weight: Int8Weight) -> CompiledInt8Matmuls | None:
    """Return the kernels that multiply q (N, ·) with a weight and finish the result in a dtype, or None."""
    matmuls = None if kernels is None or dtype != torch.bfloat16 else kernels.int8_matmuls
    if matmuls is None or not matmuls.supports(q, weight.q):
        return None
    return None if why_no_int8_matmuls() else matmuls


def _even(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Append a zero column to matrices (·, k) with the same k, if k is odd."""
    if left.shape[1] % 2 == 0:
        return left, right
    return torch.nn.functional.pad(left, (0, 1)), torch.nn.functional.pad(right, (0, 1))


def _paired(right: Tensor) -> Tensor:
    """Rearrange (out, k) as (k/2, out, 2), moving each pair of numbers as one integer."""
    if not right.shape[1]:
        return right.new_empty(0, len(right), 2)
    pairs = right.contiguous().view({2: torch.int32, 4: torch.int64}[right.element_size()])
    return pairs.t().contiguous().view(right.dtype).view(*pairs.shape[::-1], 2)


def input_gradient(
    dys: Sequence[tuple[Tensor, Int8Weight]], plus: Tensor | None = None, kept: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the sum of dy·W (N, in) over several outputs, plus `plus` (N, in), which may be overwritten.

    The fp32 sum is rounded once to the dtype of dy for each set of weights that share their gain and kept channels.

    Args:
        dys: Gradient (N, out) of each output, and its weight (out, in).
        plus: Tensor to add.
        kept: dy·W_K (N, k) for each output, in fp32; None computes it, rounded before it is added.
    """
    if kept is None:
        kept = [torch.mm(dy, weight.columns.to(dy.dtype)).float() for dy, weight in dys]
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (_, weight) in enumerate(dys):
        groups.setdefault((id(weight.gain), id(weight.kept)), []).append(number)
    for group in groups.values():
        plus = _group_gradient([dys[i] for i in group], plus, functools.reduce(torch.add, [kept[i] for i in group]))
    assert plus is not None  # `dys` is not empty
    return plus


def _group_gradient(dys: Sequence[tuple[Tensor, Int8Weight]], plus: Tensor | None, columns: Tensor) -> Tensor:
    dy, shared = dys[0]
    plus = dy.new_zeros(len(dy), shared.q.shape[1]) if plus is None else plus
    kernels = kernels_for(dy, plus)
    total: Tensor | None = None
    for each, weight in dys[:-1]:
        q, u, _ = _quantized(each, weight.scale)
        total = _added(kernels, q, u, weight, total, dy.dtype)
    each, weight = dys[-1]
    q, u, _ = _quantized(each, weight.scale)
    return _finished(kernels, q, u, weight, columns, total, plus)


def _added(
    kernels: Kernels | None, q: Tensor, u: Tensor, weight: Int8Weight, partial: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return u·(q·Q)·g plus `partial`, which may be overwritten, in fp32 (N, in)."""
    matmuls = _matmuls(kernels, dtype, q, weight)
    if matmuls is None and (kernels is None or kernels.int8 is None):
        product = _integer_matmul(q, weight.q).float() * u[:, None] * weight.gain
        return product if partial is None else partial + product
    total = torch.empty(len(q), weight.q.shape[1], dtype=torch.float32) if partial is None else partial
    if matmuls is not None:
        matmuls.int8_matmul_add(q, weight.q, (u, weight.gain), partial, total)
    elif kernels is not None and kernels.int8 is not None:
        kernels.int8.int8_add(_integer_matmul(q, weight.q), u, weight.gain, partial, total)
    return total


def _finished(
    kernels: Kernels | None,
    q: Tensor,
    u: Tensor,
    weight: Int8Weight,
    columns: Tensor,
    partial: Tensor | None,
    plus: Tensor,
) -> Tensor:
    """Return u·(q·Q)·g + `partial` + `plus` in the dtype of `plus`; `columns` (N, k) are added at the kept channels."""
    matmuls = _matmuls(kernels, plus.dtype, q, weight)
    if matmuls is not None:
        scales = u, weight.gain
        matmuls.int8_matmul_input_gradient(q, weight.q, scales, columns, weight.kept, partial, plus)
        return plus
    if kernels is not None and kernels.int8 is not None:
        sums = _integer_matmul(q, weight.q)
        kernels.int8.int8_input_gradient(sums, u, weight.gain, columns, weight.kept, partial, plus)
        return plus
    total = _added(kernels, q, u, weight, partial, plus.dtype)
    return (total.index_add(1, weight.kept, columns) + plus.float()).to(plus.dtype)


def _quantized(x: Tensor, factors: Tensor, kept: Tensor | None = None) -> _Quantized:
    """Return `quantize_rows` of x·factors for x (N, d) and fp32 factors (d,), and the columns `kept` (k,) of x."""
    kernels = kernels_for(x)
    if kernels is None or kernels.int8 is None:
        q, scale = quantize_rows(x.float() * factors)
        return _Quantized(q, scale, x.new_empty(len(x), 0) if kept is None else x.index_select(1, kept))
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32)
    columns = x.new_empty(len(x), 0 if kept is None else len(kept))
    kernels.int8.int8_quantize(x, factors, kept, q, scale, columns)
    return _Quantized(q, scale, columns)


def _integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    # compiled code cannot contain the check of the processor
    if a.device.type != "cpu" or torch.compiler.is_compiling() or not why_no_int8_matmuls():
        return torch._int_mm(a, b)
    return reference_integer_matmul(a, b)


_State = tuple[Int8Weight, bool]
"""The weight, and whether the reference functions run."""


class Int8Linear(torch.autograd.Function):
    """x·Wᵀ + b. Each direction is the derivative of the other, so that gradients can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Context[_State], x: Tensor, weight: Int8Weight, bias: Tensor | None, is_reference: bool = False
    ) -> Tensor:
        """Return x·Wᵀ + b (…, out) for x (…, in)."""
        ctx.state, flat = (weight, is_reference), rows(x)
        y = reference_forward(flat, weight, bias) if is_reference else output(Int8Inputs(flat), weight, bias)
        return y.view(*x.shape[:-1], len(weight.q))

    @staticmethod
    def backward(ctx: Context[_State], dy: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x, (…, in)."""
        is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dx = _Int8Gradient.apply(dy, *ctx.state) if is_recorded else _input_gradient(dy, *ctx.state)
        return dx, None, None, None


class _Int8Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_State], dy: Tensor, weight: Int8Weight, is_reference: bool) -> Tensor:
        ctx.state = weight, is_reference
        return _input_gradient(dy, weight, is_reference)

    @staticmethod
    def backward(ctx: Context[_State], d: Tensor) -> tuple[Tensor, None, None]:
        weight, is_reference = ctx.state
        return Int8Linear.apply(d, weight, None, is_reference), None, None


def _input_gradient(dy: Tensor, weight: Int8Weight, is_reference: bool) -> Tensor:
    """Return the gradient (…, in) of the input for that of the output, dy (…, out)."""
    flat = rows(dy)
    dx = reference_backward(flat, weight) if is_reference else input_gradient([(flat, weight)])
    return dx.view(*dy.shape[:-1], weight.q.shape[1])
