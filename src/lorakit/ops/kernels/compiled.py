"""Call the CPU kernels in rows.c and its headers, under the terms of `lorakit.ops.kernels`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.ops.kernels.building import Built, built
from lorakit.ops.kernels.compiled_matmuls import CompiledAttention, CompiledLowRankGradients, int8_matmuls
from lorakit.ops.kernels.decoder_layer import CompiledDecoderLayer
from lorakit.ops.kernels.gateway import Gateway

DTYPES = {torch.float32: "", torch.bfloat16: "BF16"}
"""Dtype -> preprocessor macro that is defined when its kernels are compiled."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "quick_gelu": 2, "relu": 3}
"""Name in `lorakit.ops.activation` -> enum value in the C source."""

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
    built_so_far: list[Built] = []
    for define in DTYPES.values():
        built_so_far.append(built(define))
        if built_so_far[-1].functions is None:
            break
    return built_so_far


class CompiledKernels:
    """Kernels for each dtype, compiled from rows.c, behind the checks of `lorakit.ops.kernels.gateway`.

    Attributes:
        activations: The activations that `gate` supports.
        caps_logits: Whether `cross_entropy` supports a cap.
        dropping, own, int8, linear, slots, attention, low_rank, int8_matmuls, layer: The kernels for matmuls with
            dropout, for one adapter per row, for the steps around int8 matmuls, for linear layers, for attention over
            slots, and as their classes say; None if there are none or they are not faster.
        few_rows: Largest number of rows for which `int8_few_rows` is faster than the other steps, or 0.
        linear_rows: Dtype -> largest number of rows for which `linear_few_rows` is not slower than PyTorch, or 0.
    """

    activations = frozenset(ACTIVATIONS)
    caps_logits = False
    dropping = None

    def __init__(self, libraries: dict[torch.dtype, ctypes.CDLL]) -> None:
        self.own = self.int8 = self.linear = self.slots = self
        gateway = Gateway(libraries)
        self.attention = CompiledAttention(gateway) if gateway.dots else None
        self.low_rank = CompiledLowRankGradients(gateway) if gateway.dots else None
        self.int8_matmuls = int8_matmuls(gateway)
        self.layer = CompiledDecoderLayer(gateway)
        self.few_rows = MOST_ROWS if gateway.has_int8_dots else 0
        self.linear_rows: Mapping[torch.dtype, int] = gateway.linear_rows
        self._pointer, self._optional, self._call = gateway.pointer, gateway.optional, gateway.call

    def rms_forward(self, x: Tensor, w: Tensor, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """Write the RMS norm of x (N, d) to n (N, d), and 1/RMS of each row to rstd (N, 1). [docs/math.md (76)]

        If offset is 0, values are rounded to the dtype of x before and after the multiplication by the weight w (d,).
        Otherwise, they are rounded once, after the multiplication by offset + w.
        """
        dtype, shape = x.dtype, x.shape
        rows, d = shape
        inputs = self._pointer("x", x, dtype, shape), self._pointer("w", w, dtype, (d,))
        outputs = self._pointer("n", n, dtype, shape), self._pointer("rstd", rstd, torch.float32, (rows, 1))
        self._call("rms_forward", dtype, rows * d, *inputs, eps, offset, rows, d, *outputs)

    def rms_recompute(self, x: Tensor, w: Tensor, offset: float, rstd: Tensor, n: Tensor) -> None:
        """Recompute the output n (N, d) of `rms_forward` bit for bit from x and rstd (N, 1)."""
        dtype, shape = x.dtype, x.shape
        rows, d = shape
        inputs = self._pointer("x", x, dtype, shape), self._pointer("w", w, dtype, (d,))
        stats, output = self._pointer("rstd", rstd, torch.float32, (rows, 1)), self._pointer("n", n, dtype, shape)
        self._call("rms_recompute", dtype, rows * d, *inputs, offset, stats, rows, d, output)

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """Write the gradient of x, plus `add`, to dx, which may be dn, the gradient of n; all are (N, d)."""
        dtype, shape = x.dtype, x.shape
        rows, d = shape
        inputs = self._pointer("dn", dn, dtype, shape), self._pointer("x", x, dtype, shape)
        weight, stats = self._pointer("w", w, dtype, (d,)), self._pointer("rstd", rstd, torch.float32, (rows, 1))
        added, output = self._optional("add", add, dtype, shape), self._pointer("dx", dx, dtype, shape)
        self._call("rms_backward", dtype, rows * d, *inputs, weight, offset, stats, added, rows, d, output)

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """Write act(first)·up, or act(first) without `up`, rounded once, to `out`; all (N, f). [docs/math.md (78)]"""
        dtype, shape, count = first.dtype, first.shape, first.numel()
        inputs = self._pointer("first", first, dtype, shape), self._optional("up", up, dtype, shape)
        self._call("gate", dtype, count, ACTIVATIONS[act], *inputs, count, self._pointer("out", out, dtype, shape))

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """Write the gradients of `gate` to dfirst, which may be da, and, if `up` is given, to dup; all are (N, f).

        Raises:
            ValueError: A tensor is invalid, or only one of up and dup is given.
        """
        if (up is None) != (dup is None):
            raise ValueError("up, dup: give both or neither")
        dtype, shape, count = first.dtype, first.shape, first.numel()
        inputs = self._pointer("da", da, dtype, shape), self._pointer("first", first, dtype, shape)
        gate = self._optional("up", up, dtype, shape)
        outputs = self._pointer("dfirst", dfirst, dtype, shape), self._optional("dup", dup, dtype, shape)
        self._call("gate_backward", dtype, count, ACTIVATIONS[act], *inputs, gate, count, *outputs)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool, out: Tensor) -> None:
        """Rotate x (B, T, H, D) by position, or rotate it back, and write the result to `out`. [docs/math.md (80)]

        `out` may be x. Both cos and sin are (B or 1, T, rot). The first rot elements of a head are rotated, and
        the others are copied. In x and `out`, the heads of each token are contiguous, and tokens are evenly spaced.

        Raises:
            ValueError: A tensor is invalid.
        """
        dtype, shape, tables = x.dtype, x.shape, cos.shape
        batch, tokens, heads, width = shape
        rot = tables[-1]
        table_rows = cos.numel() // max(rot, 1)
        if rot % 2 or rot > width or table_rows not in (tokens, batch * tokens):
            raise ValueError(f"cos {tuple(tables)}: expected (1 or B, T, rot) with rot even, for x {tuple(shape)}")
        tokens_in = self._pointer("x", x, dtype, shape, _heads_together(x)), x.stride(1)
        angles = self._pointer("cos", cos, dtype, tables), self._pointer("sin", sin, dtype, tables), table_rows
        sizes = (batch * tokens, heads, width, rot, back)
        tokens_out = self._pointer("out", out, dtype, shape, _heads_together(out)), out.stride(1)
        self._call("rotate", dtype, x.numel(), *tokens_in, *angles, *sizes, *tokens_out)

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """Write scale·x (any shape) to `out`, which may be x, with zeros for dropped elements. [docs/math.md (70)] Each
        is dropped with probability p; calls with the same seed, uint64 (1,), size and p drop the same elements.

        Raises:
            ValueError: A tensor is invalid, or p is not in (0, 1].
        """
        if not 0 < p <= 1:
            raise ValueError(f"p must be in (0, 1]; got {p}")
        dtype, shape, count = x.dtype, x.shape, x.numel()
        source, target = self._pointer("x", x, dtype, shape), self._pointer("out", out, dtype, shape)
        self._call("drop", dtype, count, source, count, p, seed.item(), scale, target)

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """Compute the softmax of rows (Z, n, m) in place, limited to the positions that each row sees.

        Row i sees the positions low[i % k] to high[i % k] − 1. `low` and `high` are int32 (k,); None means no bound.

        Raises:
            ValueError: A tensor is invalid or empty.
        """
        dtype, shape, count, m = scores.dtype, scores.shape, scores.numel(), scores.shape[-1]
        kinds = len(low) if low is not None else len(high) if high is not None else 1
        if not kinds or not m:
            raise ValueError(f"scores {tuple(shape)}, bounds ({kinds},): neither may be empty")
        address, bound = self._pointer("scores", scores, dtype, shape), (torch.int32, (kinds,), (0, m))
        bounds = self._optional("low", low, *bound), self._optional("high", high, *bound)
        self._call("softmax", dtype, count, address, *bounds, kinds, count // m, m)

    def softmax_backward(self, weights: Tensor, ds: Tensor) -> None:
        """Replace ds, the gradient of the softmax weights (Z, n, m), with the gradient of the scores."""
        dtype, shape, count, m = ds.dtype, ds.shape, ds.numel(), ds.shape[-1]
        source, target = self._pointer("weights", weights, dtype, shape), self._pointer("ds", ds, dtype, shape)
        self._call("softmax_backward", dtype, count, source, count // max(m, 1), m, target)

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses: Tensor, cap: float | None = None
    ) -> None:
        """Write the fp32 losses (c,) for logits (c, V) after multiplying the logits by `scale`. [docs/math.md (75)]

        If `gradients` is true, replace the logits with the gradient of the summed loss, divided by `scale`. If a cap is
        given, the scaled logits z are first replaced with cap·tanh(z/cap).
        """
        assert cap is None  # callers check `caps_logits`
        rows, v = logits.shape
        scores = self._pointer("logits", logits, logits.dtype, (rows, v))
        targets = self._pointer("labels", labels, torch.int64, (rows,), within=(0, v - 1))
        output = self._pointer("losses", losses, torch.float32, (rows,))
        self._call("cross_entropy", logits.dtype, rows * v, scores, targets, scale, gradients, rows, v, output)

    def add_per_row(self, x: Tensor, A: Tensor, Bt: Tensor, index: Tensor, y: Tensor) -> None:
        """Add (x_i·A_kᵀ)·Bt_k to y_i for each row i, with k = index[i]. [docs/math.md (72)]

        Shapes: x (rows, …, in), y (rows, …, out), A (K, r, in), Bt (K, r, out). `index` is int64 (rows,), with −1 for
        rows without an adapter. The low-rank activation and the sum with y are rounded to the dtype of x.
        """
        dtype, shape, (adapters, r, out) = x.dtype, x.shape, Bt.shape
        width, indexed = shape[-1], shape[0]
        rows = x.numel() // max(width, 1)
        pointers = (
            self._pointer("x", x, dtype, shape),
            self._pointer("A", A, dtype, (adapters, r, width)),
            self._pointer("Bt", Bt, dtype, Bt.shape),
            self._pointer("index", index, torch.int64, (indexed,), within=(-1, adapters - 1)),
        )
        into = self._pointer("y", y, dtype, (*shape[:-1], out))
        if rows:
            read = rows * r * (width + out)
            self._call("add_per_row", dtype, read, *pointers, rows // indexed, rows, width, r, out, into)

    def int8_quantize(
        self, x: Tensor, factors: Tensor, kept: Tensor | None, q: Tensor, scale: Tensor, columns: Tensor | None
    ) -> None:
        """Write the rows of x·factors in 255 levels to q, int8 (N, d), and their scales to `scale` (N,).

        x is (N, d) and `factors` (d,). The results have the bits of `lorakit.ops.int8_weight.quantize_rows`.
        If given, `columns` (N, k), in the dtype of x, is set to the columns `kept` (k,), int64, of x.
        """
        dtype, (rows, d), wide = x.dtype, x.shape, torch.float32
        k = 0 if columns is None else columns.shape[-1]
        inputs = (
            self._pointer("x", x, dtype, (rows, d)),
            self._pointer("factors", factors, wide, (d,)),
            None if kept is None else self._pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
        )
        outputs = (
            self._pointer("q", q, torch.int8, (rows, d)),
            self._pointer("scale", scale, wide, (rows,)),
            self._optional("columns", columns, dtype, (rows, k)),
        )
        self._call("int8_quantize", dtype, rows * d, *inputs, rows, d, k, *outputs)

    def int8_output(
        self, sums: Tensor, t: Tensor, s: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, y: Tensor
    ) -> None:
        """Write t·sums·s + bias + left·right to y (N, out), rounded once.

        Shapes: sums (N, out), t (N,), s (out,), bias (out,), left (N, k) with k even, right (k/2, out, 2): element
        (i, o, j) is the factor of column 2·i + j of `left` in output o.

        Raises:
            ValueError: A tensor is invalid, or `left` has an odd number of columns.
        """
        dtype, (rows, out), k, wide = y.dtype, y.shape, left.shape[-1], torch.float32
        if k % 2:
            raise ValueError(f"left {tuple(left.shape)}: expected an even number of columns")
        inputs = (
            self._pointer("sums", sums, torch.int32, (rows, out)),
            self._pointer("t", t, wide, (rows,)),
            self._pointer("s", s, wide, (out,)),
            self._optional("bias", bias, dtype, (out,)),
        )
        low = self._pointer("left", left, dtype, (rows, k)), self._pointer("right", right, dtype, (k // 2, out, 2))
        output = self._pointer("y", y, dtype, (rows, out))
        self._call("int8_output", dtype, rows * out, *inputs, *low, rows, k, out, output)

    def int8_add(self, sums: Tensor, u: Tensor, g: Tensor, partial: Tensor | None, total: Tensor) -> None:
        """Write u·sums·g (N, d), plus `partial`, to `total`, which may be it, all in fp32; u is (N,) and g (d,)."""
        wide, (rows, d) = torch.float32, sums.shape
        inputs = self._pointer("sums", sums, torch.int32, (rows, d)), self._pointer("u", u, wide, (rows,))
        more = self._pointer("g", g, wide, (d,)), self._optional("partial", partial, wide, (rows, d))
        output = self._pointer("total", total, wide, (rows, d))
        self._call("int8_add", wide, rows * d, *inputs, *more, rows, d, output)

    def int8_input_gradient(
        self, sums: Tensor, u: Tensor, g: Tensor, columns: Tensor, kept: Tensor, partial: Tensor | None, dx: Tensor
    ) -> None:
        """Add u·sums·g, `partial` if given, and `columns` at the positions `kept` to dx (N, d), rounded once.
        Shapes: sums and fp32 partial (N, d), u (N,), g (d,), fp32 columns (N, k), kept int64 (k,).
        """
        dtype, (rows, d), wide, (k,) = dx.dtype, dx.shape, torch.float32, kept.shape
        inputs = (
            self._pointer("sums", sums, torch.int32, (rows, d)),
            self._pointer("u", u, wide, (rows,)),
            self._pointer("g", g, wide, (d,)),
            self._pointer("columns", columns, wide, (rows, k)),
            self._pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
            self._optional("partial", partial, wide, (rows, d)),
        )
        output = self._pointer("dx", dx, dtype, (rows, d))
        self._call("int8_input_gradient", dtype, rows * d, *inputs, rows, d, k, output)

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
        """Return the output of an int8 linear layer, (…, out), with the bits of the other steps around a matmul.
        Shapes: x (…, in), g (in,), kept int64 (k,), q int8 (out, in), s (out,), columns (out, k), bias (out,).

        Raises:
            ValueError: A tensor is invalid, or there are more than `MOST_ROWS` rows.
        """
        dtype, shape, (out, k), wide = x.dtype, x.shape, columns.shape, torch.float32
        d = shape[-1]
        rows = x.numel() // max(d, 1)
        if rows > MOST_ROWS:
            raise ValueError(f"x {tuple(shape)}: expected at most {MOST_ROWS} rows")
        inputs = (
            self._pointer("x", x, dtype, shape),
            self._pointer("g", g, wide, (d,)),
            self._pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
            self._pointer("q", q, torch.int8, (out, d)),
            self._pointer("s", s, wide, (out,)),
            self._pointer("columns", columns, dtype, (out, k)),
            self._optional("bias", bias, dtype, (out,)),
        )
        y = x.new_empty((*shape[:-1], out))
        output = self._pointer("y", y, dtype, y.shape)
        self._call("int8_few_rows", dtype, out * d, *inputs, rows, d, k, out, output)
        return y

    def linear_few_rows(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """Return x·Wᵀ + bias (…, out), rounded once, for x (…, in), W (out, in), rows at a distance, and bias (out,).

        The bits of a row of the result depend on this row of x alone, for any number of rows, order and threads.
        Kernels for bf16 may treat denormal numbers as zero.
        """
        dtype, shape, (out, d) = x.dtype, x.shape, W.shape
        rows, apart = x.numel() // max(d, 1), W.stride(0)
        inputs = (
            self._pointer("x", x, dtype, (*shape[:-1], d)),
            self._pointer("W", W, dtype, (out, d), (apart, 1)),
            self._optional("bias", bias, dtype, (out,)),
        )
        y = x.new_empty((*shape[:-1], out))
        self._call(
            "linear_few_rows", dtype, out * d, *inputs, apart, rows, d, out, self._pointer("y", y, dtype, y.shape)
        )
        return y

    def attend_slots(
        self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float
    ) -> Tensor:
        """Return the attention (rows, T, H, D) of the last T tokens of each row, q (rows, T, H, D), to the row.

        Position t of row i is in slot table[i, t] of keys and values (slots, K, D), for t < lengths[i]; H is a multiple
        of K. A token sees the positions up to its own. Its bits depend on these alone. Shapes: table int64 (rows,
        longest), lengths int64 (rows,).

        Raises:
            ValueError: A tensor is invalid, or H is not a multiple of K.
        """
        dtype, (rows, tokens, heads, width), (slots, kv, _), longest = q.dtype, q.shape, keys.shape, table.shape[-1]
        if not kv or heads % kv:
            raise ValueError(f"q {tuple(q.shape)}: the number of heads is not a multiple of that of keys, {kv}")
        inputs = (
            self._pointer("q", q, dtype, q.shape),
            self._pointer("keys", keys, dtype, (slots, kv, width)),
            self._pointer("values", values, dtype, (slots, kv, width)),
            self._pointer("table", table, torch.int64, (rows, longest), within=(0, slots - 1)),
            self._pointer("lengths", lengths, torch.int64, (rows,), within=(tokens, longest)),
        )
        y = torch.empty_like(q)
        sizes = rows, tokens, longest, kv, heads // kv, width
        output = self._pointer("y", y, dtype, q.shape)
        self._call("attend_slots", dtype, q.numel() * longest, *inputs, *sizes, scale, output)
        return y


def _heads_together(x: Tensor) -> tuple[int, ...]:
    """Return the strides that x (B, T, H, D) must have: contiguous heads within a token, and evenly spaced tokens."""
    batch, tokens, heads, width = x.shape
    apart = x.stride(1) if batch * tokens == 1 else max(x.stride(1), heads * width)
    return (x.stride(0) if batch == 1 else tokens * apart, apart, width, 1)
