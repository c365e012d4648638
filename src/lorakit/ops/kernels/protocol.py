"""Interface of the compiled kernels. If no kernels are available, PyTorch operations compute the same results.

All tensors are on the same device and contiguous, except that `rotate` also accepts strided tokens. N rows of
width d form a tensor (N, d). In each call, inputs and outputs have the same dtype: fp32, bf16 or, on CUDA, fp16. Row
statistics and intermediate results are fp32; intermediate results are rounded only where stated. The caller allocates
outputs. An output may alias an input only where stated.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Kernels for one device type: CPUs (`lorakit.ops.kernels.compiled`) or CUDA (`lorakit.ops.kernels.triton`).

    `activations` names those that `gate` supports; `caps_logits` says whether `cross_entropy` supports a cap. The other
    attributes are None if there are no such kernels or they are not faster.
    """

    activations: frozenset[str]
    caps_logits: bool
    dropping: DropoutMatmuls | None
    attention: SequenceAttention | None
    own: PerRowMatmuls | None
    int8: Int8Steps | None
    int8_matmuls: Int8Matmuls | None
    low_rank: LowRankGradients | None

    def rms_forward(self, x: Tensor, w: Tensor | None, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """Write the RMS norm of x (N, d) to n (N, d), and 1/RMS of each row to rstd (N, 1). [docs/math.md (76)]

        If offset is 0, values are rounded to the dtype of x before and after the multiplication by the weight w (d,).
        Otherwise, they are rounded once, after the multiplication by offset + w.
        """

    def rms_recompute(self, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, n: Tensor) -> None:
        """Recompute the output n (N, d) of `rms_forward` bit for bit from x and rstd (N, 1)."""

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """Write the gradient of x, plus `add`, to dx, which may be dn, the gradient of n; all are (N, d)."""

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """Write act(first)·up, or act(first) without `up`, rounded once, to `out`; all (N, f). [docs/math.md (78)]"""

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """Write the gradients of `gate` to dfirst, which may be da, and, if `up` is given, to dup; all are (N, f)."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, out: Tensor) -> None:
        """Rotate x (B, T, H, D) by position, or rotate it back, and write the result to `out`. [docs/math.md (80)]

        `out` may be x. Both cos and sin are (B or 1, T, rot). The first rot elements of a head are rotated, and
        the others are copied. In x and `out`, the heads of each token are contiguous, and tokens are evenly spaced.
        """

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """Write scale·x (any shape) to `out`, which may be x, with zeros for dropped elements. [docs/math.md (70)] Each
        is dropped with probability p; calls with the same seed, uint64 (1,), size and p drop the same elements.
        """

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """Compute the softmax of rows (Z, n, m) in place, limited to the positions that each row sees.

        Row i sees the positions low[i % k] to high[i % k] − 1. `low` and `high` are int32 (k,); None means no bound.
        """

    def softmax_backward(self, weights: Tensor, ds: Tensor) -> None:
        """Replace ds, the gradient of the softmax weights (Z, n, m), with the gradient of the scores."""

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses: Tensor, cap: float | None = None
    ) -> None:
        """Write the fp32 losses (c,) for logits (c, V) after multiplying the logits by `scale`. [docs/math.md (75)]

        If `gradients` is true, replace the logits with the gradient of the summed loss, divided by `scale`. If a cap is
        given, the scaled logits z are first replaced with cap·tanh(z/cap).
        """


class DropoutMatmuls(Protocol):
    """Low-rank matmuls with a factor `a` (r, n), fused with dropout.

    For a given seed, dropout drops the same elements as `Kernels.drop`. The width n must be a multiple of 4.
    """

    def shrink(self, x: Tensor, a: Tensor, p: float, seed: Tensor) -> Tensor:
        """Return dropout(x)·aᵀ for x (N, n) as a new tensor (N, r)."""

    def add_low_rank(self, h: Tensor, a: Tensor, p: float, seed: Tensor, y: Tensor) -> None:
        """Add dropout(h·a) to y (N, n), for h (N, r)."""

    def outer(self, dh: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """Return dhᵀ·dropout(x) for dh (N, r) and x (N, n) as a new fp32 tensor (r, n)."""


class LowRankGradients(Protocol):
    """Low-rank matmuls with the gradient of an output, read once, whose fp32 sums do not depend on the threads."""

    def supports(self, dy: Tensor, h: Tensor | None, narrow: int) -> bool:
        """Return whether dy (N, out), h (N, r), with rows at a distance, and up to `narrow` columns are supported."""

    def low_rank_gradients(
        self, dy: Tensor, B: Tensor | None, columns: Tensor | None, h: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return dy·B (N, r), rounded to the dtype of dy, and dy·columns (N, k) and dyᵀ·h (out, r) in fp32.

        Shapes: dy (N, out), B (out, r), columns (out, k), h (N, r). A result is None if its factor is None.
        """


class PerRowMatmuls(Protocol):
    """Matmuls between input rows and per-row low-rank factors. The factors are read in place."""

    def add_per_row(self, x: Tensor, A: Tensor, Bt: Tensor, index: Tensor, y: Tensor) -> None:
        """Add (x_i·A_kᵀ)·Bt_k to y_i for each row i, with k = index[i]. [docs/math.md (72)]

        Shapes: x (rows, …, in), y (rows, …, out), A (K, r, in), Bt (K, r, out). `index` is int64 (rows,), with −1 for
        rows without an adapter. The low-rank activation and the sum with y are rounded to the dtype of x.
        """


class Int8Steps(Protocol):
    """Quantization before an int8 matmul, and scales, additions and rounding after it; see `lorakit.ops.int8`.

    The integer results `sums` are int32, and scales and factors are fp32. `few_rows` is the largest number of rows for
    which `int8_few_rows` is faster than the other steps, or 0.
    """

    few_rows: int

    def int8_quantize(
        self, x: Tensor, factors: Tensor, kept: Tensor | None, q: Tensor, scale: Tensor, columns: Tensor | None
    ) -> None:
        """Write the rows of x·factors in 255 levels to q, int8 (N, d), and their scales to `scale` (N,).

        x is (N, d) and `factors` (d,). The results have the bits of `lorakit.ops.int8_weight.quantize_rows`.
        If given, `columns` (N, k), in the dtype of x, is set to the columns `kept` (k,), int64, of x.
        """

    def int8_output(
        self, sums: Tensor, t: Tensor, s: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, y: Tensor
    ) -> None:
        """Write t·sums·s + bias + left·right to y (N, out), rounded once.

        Shapes: sums (N, out), t (N,), s (out,), bias (out,), left (N, k) with k even, right (k/2, out, 2): element
        (i, o, j) is the factor of column 2·i + j of `left` in output o.
        """

    def int8_add(self, sums: Tensor, u: Tensor, g: Tensor, partial: Tensor | None, total: Tensor) -> None:
        """Write u·sums·g (N, d), plus `partial`, to `total`, which may be it, all in fp32; u is (N,) and g (d,)."""

    def int8_input_gradient(
        self, sums: Tensor, u: Tensor, g: Tensor, columns: Tensor, kept: Tensor, partial: Tensor | None, dx: Tensor
    ) -> None:
        """Add u·sums·g, `partial` if given, and `columns` at the positions `kept` to dx (N, d), rounded once.
        Shapes: sums and fp32 partial (N, d), u (N,), g (d,), fp32 columns (N, k), kept int64 (k,).
        """

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
        """


class Int8Matmuls(Protocol):
    """Int8 matmuls with Q (out, in), exact, together with what follows: `Int8Steps` up to the order of additions."""

    def supports(self, q: Tensor, Q: Tensor) -> bool:
        """Return whether q (N, in) or (N, out) can be multiplied with Q (out, in), and whether this is fast."""

    def int8_matmul_output(
        self,
        q: Tensor,
        Q: Tensor,
        scales: tuple[Tensor, Tensor],
        bias: Tensor | None,
        terms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        y: Tensor,
    ) -> None:
        """Write t·(q·Qᵀ)·s + bias + h·Bᵀ + kept·columnsᵀ to y (N, out), rounded once.

        Shapes: q (N, in), scales (t, s) as in `Int8Steps.int8_output`, terms (h, B) and (kept, columns): (N, r) and
        (out, r), (N, k) and (out, k), where r and k may be 0. h may have rows at a distance.
        """

    def int8_matmul_add(
        self, q: Tensor, Q: Tensor, scales: tuple[Tensor, Tensor], partial: Tensor | None, total: Tensor
    ) -> None:
        """Write what `Int8Steps.int8_add` writes for the sums q·Q, given q (N, out) and (u, g)."""

    def int8_matmul_input_gradient(
        self,
        q: Tensor,
        Q: Tensor,
        scales: tuple[Tensor, Tensor],
        columns: Tensor,
        kept: Tensor,
        partial: Tensor | None,
        dx: Tensor,
    ) -> None:
        """Write what `Int8Steps.int8_input_gradient` writes for the sums q·Q, given q (N, out) and (u, g)."""


class SequenceAttention(Protocol):
    """Attention over separate sequences, without windows, caps, biases, sinks or dropout. [docs/math.md (81), (82)]

    Shapes: q (B, H, T, D), k and v (B, KV, T, D). Heads must be contiguous; other strides are arbitrary. `ends` is
    int64 (S,): the end of each sequence within the T tokens, in increasing order; the last one is T. If `causal` is
    true, a token sees only itself and earlier tokens of its sequence.
    """

    def supports(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Return whether the kernel supports the dtype, widths and strides of q (B, H, T, D), k and v."""

    def attend(
        self, operands: tuple[Tensor, Tensor, Tensor], ends: Tensor, scale: float, causal: bool, out: Tensor
    ) -> None:
        """Write softmax(scale·q·kᵀ)·v to `out` (B, H, T, D)."""

    def attend_backward(
        self,
        operands: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        ends: Tensor,
        scale: float,
        causal: bool,
        into: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write the gradients of q (B, H, T, D), which may be `dout`, k and v to `into`; dout is that of the output."""
