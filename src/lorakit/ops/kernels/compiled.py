"""Call the CPU kernels in rows.c and its headers, which `lorakit.ops.kernels.protocol` documents."""

from __future__ import annotations

import ctypes
import functools
import itertools

import torch
from torch import Tensor

from lorakit.ops.kernels.building import Built, built
from lorakit.ops.kernels.compiled_matmuls import CompiledLowRankGradients, int8_matmuls
from lorakit.ops.kernels.gateway import FARTHEST, Gateway
from lorakit.ops.kernels.protocol import (
    DropoutMatmuls,
    Int8Matmuls,
    Int8Steps,
    LowRankGradients,
    PerRowMatmuls,
    SequenceAttention,
)

DTYPES = {torch.float32: "", torch.bfloat16: "BF16"}
"""Dtype -> preprocessor macro that is defined when its kernels are compiled."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "quick_gelu": 2, "relu": 3}
"""Name in `lorakit.ops.activation` -> enum value in the C source."""

LANES = 16
"""Number of fp32 values in a register of the attention kernel; head widths must be a multiple of it."""

MOST_ROWS = 32
"""Largest number of rows for `int8_few_rows`, as in int8_few.h; with more rows, int8 matmuls of PyTorch are faster."""


@functools.cache
def kernels() -> CompiledKernels | None:
    """Return the kernels, compiling them if necessary, or None if they cannot be built."""
    libraries = [each.functions for each in _built()]
    if libraries[-1] is None:
        return None
    return CompiledKernels({dtype: each for dtype, each in zip(DTYPES, libraries, strict=True) if each is not None})


def describe() -> str:
    """Describe how the kernels were built, or why there are none."""
    last = _built()[-1]
    return f"kernels {last.why}" if last.functions is not None else f"PyTorch's operations ({last.why})"


def lacks_compiler() -> bool:
    """Return whether kernels are unavailable because no C compiler was found."""
    return _built()[-1].lacks_compiler


def _built() -> list[Built]:
    """Build the library for each dtype. Stop after a failure, so that the reason is logged only once."""
    found: list[Built] = []
    for define in DTYPES.values():
        found.append(built(define))
        if found[-1].functions is None:
            break
    return found


class CompiledKernels:
    """Kernels for each dtype, compiled from rows.c, behind the checks of `lorakit.ops.kernels.gateway`."""

    activations = frozenset(ACTIVATIONS)
    caps_logits = False
    dropping: DropoutMatmuls | None = None

    def __init__(self, libraries: dict[torch.dtype, ctypes.CDLL]) -> None:
        self.own: PerRowMatmuls | None = self
        self.int8: Int8Steps | None = self
        gateway = Gateway(libraries)
        self.attention: SequenceAttention | None = CompiledAttention(gateway) if gateway.dots else None
        self.low_rank: LowRankGradients | None = CompiledLowRankGradients(gateway) if gateway.dots else None
        self.int8_matmuls: Int8Matmuls | None = int8_matmuls(gateway)
        self.few_rows = MOST_ROWS if gateway.has_int8_dots else 0
        self._pointer, self._optional, self._call = gateway.pointer, gateway.optional, gateway.call

    def rms_forward(self, x: Tensor, w: Tensor | None, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """Implement `Kernels.rms_forward`; x and n are (N, d)."""
        dtype, shape = x.dtype, x.shape
        rows, d = shape
        given = self._pointer("x", x, dtype, shape), self._optional("w", w, dtype, (d,))
        made = self._pointer("n", n, dtype, shape), self._pointer("rstd", rstd, torch.float32, (rows, 1))
        self._call("rms_forward", dtype, rows * d, *given, eps, offset, rows, d, *made)

    def rms_recompute(self, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, n: Tensor) -> None:
        """Implement `Kernels.rms_recompute`; x and n are (N, d)."""
        dtype, shape = x.dtype, x.shape
        rows, d = shape
        given = self._pointer("x", x, dtype, shape), self._optional("w", w, dtype, (d,))
        stats, made = self._pointer("rstd", rstd, torch.float32, (rows, 1)), self._pointer("n", n, dtype, shape)
        self._call("rms_recompute", dtype, rows * d, *given, offset, stats, rows, d, made)

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """Implement `Kernels.rms_backward`; dn, x and dx are (N, d)."""
        dtype, shape = x.dtype, x.shape
        rows, d = shape
        given = self._pointer("dn", dn, dtype, shape), self._pointer("x", x, dtype, shape)
        weight, stats = self._optional("w", w, dtype, (d,)), self._pointer("rstd", rstd, torch.float32, (rows, 1))
        added, made = self._optional("add", add, dtype, shape), self._pointer("dx", dx, dtype, shape)
        self._call("rms_backward", dtype, rows * d, *given, weight, offset, stats, added, rows, d, made)

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """Implement `Kernels.gate`; first, up and out are (N, f)."""
        dtype, shape, count = first.dtype, first.shape, first.numel()
        given = self._pointer("first", first, dtype, shape), self._optional("up", up, dtype, shape)
        self._call("gate", dtype, count, ACTIVATIONS[act], *given, count, self._pointer("out", out, dtype, shape))

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """Implement `Kernels.gate_backward`; da, first and up are (N, f).

        Raises:
            ValueError: A tensor is invalid, or only one of up and dup is given.
        """
        if (up is None) != (dup is None):
            raise ValueError("up, dup: give both or neither")
        dtype, shape, count = first.dtype, first.shape, first.numel()
        given = self._pointer("da", da, dtype, shape), self._pointer("first", first, dtype, shape)
        gate = self._optional("up", up, dtype, shape)
        made = self._pointer("dfirst", dfirst, dtype, shape), self._optional("dup", dup, dtype, shape)
        self._call("gate_backward", dtype, count, ACTIVATIONS[act], *given, gate, count, *made)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, out: Tensor) -> None:
        """Implement `Kernels.rotate`; x and out are (B, T, H, D).

        Raises:
            ValueError: A tensor is invalid.
        """
        dtype, shape, tables = x.dtype, x.shape, cos.shape
        batch, tokens, heads, width = shape
        rot = tables[-1]
        table_rows = cos.numel() // max(rot, 1)
        if rot % 2 or rot > width or table_rows not in (tokens, batch * tokens):
            raise ValueError(f"cos {tuple(tables)}: expected (1 or B, T, rot) with rot even, for x {tuple(shape)}")
        given = self._pointer("x", x, dtype, shape, _heads_together(x)), x.stride(1)
        angles = self._pointer("cos", cos, dtype, tables), self._pointer("sin", sin, dtype, tables), table_rows
        sizes = (batch * tokens, heads, width, rot, interleaved, back)
        made = self._pointer("out", out, dtype, shape, _heads_together(out)), out.stride(1)
        self._call("rotate", dtype, x.numel(), *given, *angles, *sizes, *made)

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """Implement `Kernels.drop`; x may have any shape, and `out` has the same shape.

        Raises:
            ValueError: A tensor is invalid, or p is not in (0, 1].
        """
        if not 0 < p <= 1:
            raise ValueError(f"p must be in (0, 1]; got {p}")
        dtype, shape, count = x.dtype, x.shape, x.numel()
        given, made = self._pointer("x", x, dtype, shape), self._pointer("out", out, dtype, shape)
        self._call("drop", dtype, count, given, count, p, seed.item(), scale, made)

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """Implement `Kernels.softmax`; scores is (Z, n, m).

        Raises:
            ValueError: A tensor is invalid or empty.
        """
        dtype, shape, count, m = scores.dtype, scores.shape, scores.numel(), scores.shape[-1]
        kinds = len(low) if low is not None else len(high) if high is not None else 1
        if not kinds or not m:
            raise ValueError(f"scores {tuple(shape)}, bounds ({kinds},): neither may be empty")
        given, bound = self._pointer("scores", scores, dtype, shape), (torch.int32, (kinds,), (0, m))
        bounds = self._optional("low", low, *bound), self._optional("high", high, *bound)
        self._call("softmax", dtype, count, given, *bounds, kinds, count // m, m)

    def softmax_backward(self, weights: Tensor, ds: Tensor) -> None:
        """Implement `Kernels.softmax_backward`; weights and ds are (Z, n, m)."""
        dtype, shape, count, m = ds.dtype, ds.shape, ds.numel(), ds.shape[-1]
        given, made = self._pointer("weights", weights, dtype, shape), self._pointer("ds", ds, dtype, shape)
        self._call("softmax_backward", dtype, count, given, count // max(m, 1), m, made)

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses: Tensor, cap: float | None = None
    ) -> None:
        """Implement `Kernels.cross_entropy`; logits is (c, V)."""
        assert cap is None  # callers check `caps_logits`
        rows, v = logits.shape
        scores = self._pointer("logits", logits, logits.dtype, (rows, v))
        targets = self._pointer("labels", labels, torch.int64, (rows,), within=(0, v - 1))
        made = self._pointer("losses", losses, torch.float32, (rows,))
        self._call("cross_entropy", logits.dtype, rows * v, scores, targets, scale, gradients, rows, v, made)

    def add_per_row(self, x: Tensor, A: Tensor, Bt: Tensor, index: Tensor, y: Tensor) -> None:
        """Implement `PerRowMatmuls.add_per_row`.

        Shapes: x (rows, …, in), A (K, r, in), Bt (K, r, out), index (rows,), y (rows, …, out).
        """
        dtype, shape, (adapters, r, out) = x.dtype, x.shape, Bt.shape
        width, asked = shape[-1], shape[0]
        rows = x.numel() // max(width, 1)
        pointers = (
            self._pointer("x", x, dtype, shape),
            self._pointer("A", A, dtype, (adapters, r, width)),
            self._pointer("Bt", Bt, dtype, Bt.shape),
            self._pointer("index", index, torch.int64, (asked,), within=(-1, adapters - 1)),
        )
        into = self._pointer("y", y, dtype, (*shape[:-1], out))
        if rows:
            read = rows * r * (width + out)
            self._call("add_per_row", dtype, read, *pointers, rows // asked, rows, width, r, out, into)

    def int8_quantize(
        self, x: Tensor, factors: Tensor, kept: Tensor | None, q: Tensor, scale: Tensor, columns: Tensor | None
    ) -> None:
        """Implement `Int8Steps.int8_quantize`; x and q are (N, d)."""
        dtype, (rows, d), wide = x.dtype, x.shape, torch.float32
        k = 0 if columns is None else columns.shape[-1]
        given = (
            self._pointer("x", x, dtype, (rows, d)),
            self._pointer("factors", factors, wide, (d,)),
            None if kept is None else self._pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
        )
        made = (
            self._pointer("q", q, torch.int8, (rows, d)),
            self._pointer("scale", scale, wide, (rows,)),
            self._optional("columns", columns, dtype, (rows, k)),
        )
        self._call("int8_quantize", dtype, rows * d, *given, rows, d, k, *made)

    def int8_output(
        self, sums: Tensor, t: Tensor, s: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, y: Tensor
    ) -> None:
        """Implement `Int8Steps.int8_output`; sums and y are (N, out).

        Raises:
            ValueError: A tensor is invalid, or `left` has an odd number of columns.
        """
        dtype, (rows, out), k, wide = y.dtype, y.shape, left.shape[-1], torch.float32
        if k % 2:
            raise ValueError(f"left {tuple(left.shape)}: expected an even number of columns")
        given = (
            self._pointer("sums", sums, torch.int32, (rows, out)),
            self._pointer("t", t, wide, (rows,)),
            self._pointer("s", s, wide, (out,)),
            self._optional("bias", bias, dtype, (out,)),
        )
        low = self._pointer("left", left, dtype, (rows, k)), self._pointer("right", right, dtype, (k // 2, out, 2))
        made = self._pointer("y", y, dtype, (rows, out))
        self._call("int8_output", dtype, rows * out, *given, *low, rows, k, out, made)

    def int8_add(self, sums: Tensor, u: Tensor, g: Tensor, partial: Tensor | None, total: Tensor) -> None:
        """Implement `Int8Steps.int8_add`; sums and total are (N, d)."""
        wide, (rows, d) = torch.float32, sums.shape
        given = self._pointer("sums", sums, torch.int32, (rows, d)), self._pointer("u", u, wide, (rows,))
        more = self._pointer("g", g, wide, (d,)), self._optional("partial", partial, wide, (rows, d))
        made = self._pointer("total", total, wide, (rows, d))
        self._call("int8_add", wide, rows * d, *given, *more, rows, d, made)

    def int8_input_gradient(
        self, sums: Tensor, u: Tensor, g: Tensor, columns: Tensor, kept: Tensor, partial: Tensor | None, dx: Tensor
    ) -> None:
        """Implement `Int8Steps.int8_input_gradient`; sums and dx are (N, d)."""
        dtype, (rows, d), wide, (k,) = dx.dtype, dx.shape, torch.float32, kept.shape
        given = (
            self._pointer("sums", sums, torch.int32, (rows, d)),
            self._pointer("u", u, wide, (rows,)),
            self._pointer("g", g, wide, (d,)),
            self._pointer("columns", columns, wide, (rows, k)),
            self._pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
            self._optional("partial", partial, wide, (rows, d)),
        )
        made = self._pointer("dx", dx, dtype, (rows, d))
        self._call("int8_input_gradient", dtype, rows * d, *given, rows, d, k, made)

    def int8_few_rows(
        self,
        x: Tensor,
        g: Tensor,
        kept: Tensor,
        q: Tensor,
        s: Tensor,
        columns: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Implement `Int8Steps.int8_few_rows`; x is (…, in), and the result is (…, out).

        Raises:
            ValueError: A tensor is invalid, or there are more than `MOST_ROWS` rows.
        """
        dtype, shape, (out, k), wide = x.dtype, x.shape, columns.shape, torch.float32
        d = shape[-1]
        rows = x.numel() // max(d, 1)
        if rows > MOST_ROWS:
            raise ValueError(f"x {tuple(shape)}: expected at most {MOST_ROWS} rows")
        given = (
            self._pointer("x", x, dtype, shape),
            self._pointer("g", g, wide, (d,)),
            self._pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
            self._pointer("q", q, torch.int8, (out, d)),
            self._pointer("s", s, wide, (out,)),
            self._pointer("columns", columns, dtype, (out, k)),
            self._optional("bias", bias, dtype, (out,)),
        )
        y = x.new_empty((*shape[:-1], out))
        made = self._pointer("y", y, dtype, y.shape)
        self._call("int8_few_rows", dtype, out * d, *given, rows, d, k, out, made)
        return y


class CompiledAttention:
    """Attention kernels, from attention.h."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def supports(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Implement `SequenceAttention.supports`; q is (B, H, T, D)."""
        width = q.shape[3]
        laid_out = all(t.stride(3) == 1 and min(t.stride()) >= 0 and t.stride(2) < FARTHEST for t in (q, k, v))
        return q.dtype in self._gateway.dots and laid_out and width > 0 and width % LANES == 0 and v.shape[3] == width

    def attend(
        self, operands: tuple[Tensor, Tensor, Tensor], ends: Tensor, scale: float, causal: bool, out: Tensor
    ) -> None:
        """Implement `SequenceAttention.attend`; q is (B, H, T, D)."""
        given, sizes = self._operands(operands, ends)
        q, dtype = operands[0], operands[0].dtype
        made = self._gateway.heads("out", out, dtype, q.shape, least=1)
        self._gateway.call("attend", dtype, q.numel(), *given, *made, *sizes, scale, causal)

    def attend_backward(
        self,
        operands: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        ends: Tensor,
        scale: float,
        causal: bool,
        into: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Implement `SequenceAttention.attend_backward`; q is (B, H, T, D)."""
        given, sizes = self._operands(operands, ends)
        q, dtype = operands[0], operands[0].dtype
        made = [*self._gateway.heads("dout", dout, dtype, q.shape)]
        for name, grad, of in zip(("dq", "dk", "dv"), into, operands, strict=True):
            made += self._gateway.heads(name, grad, dtype, of.shape, least=1)
        self._gateway.call("attend_backward", dtype, q.numel(), *given, *made, *sizes, scale, causal)

    def _operands(self, operands: tuple[Tensor, Tensor, Tensor], ends: Tensor) -> tuple[list[int], list[int]]:
        """Check q (B, H, T, D), k, v (B, KV, T, D) and ends (S,) that increase up to T; return the arguments."""
        q, k, v = operands
        (batch, heads, tokens, width), kv = q.shape, k.shape[1]
        bounds = [0, *ends.tolist()]
        if not self.supports(q, k, v) or kv < 1 or heads % kv:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: not supported")
        if bounds[-1] != tokens or any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"ends: expected positions that increase up to {tokens}; got {bounds[1:]}")
        given: list[int] = []
        for name, tensor, count in (("q", q, heads), ("k", k, kv), ("v", v, kv)):
            given += self._gateway.heads(name, tensor, q.dtype, (batch, count, tokens, width))
        at = self._gateway.pointer("ends", ends, torch.int64, (len(bounds) - 1,))
        return given, [at, batch, len(bounds) - 1, kv, heads // kv, width]


def _heads_together(x: Tensor) -> tuple[int, ...]:
    """Return the strides that x (B, T, H, D) must have: contiguous heads within a token, and evenly spaced tokens."""
    batch, tokens, heads, width = x.shape
    apart = x.stride(1) if batch * tokens == 1 else max(x.stride(1), heads * width)
    return (x.stride(0) if batch == 1 else tokens * apart, apart, width, 1)
