"""What a set of compiled kernels computes. PyTorch's own operations compute the same where there is no set.

All tensors are contiguous and on one device; rows are (N, d). Inputs and outputs are in the compute dtype of the call
(fp32 or bf16, on CUDA also fp16), the numbers of rows in fp32; what is computed between them is fp32, rounded where the
operation that calls says so. Outputs are given; an output may be one of the inputs where that is said.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """One implementation: `lorakit.ops.kernels.compiled` for CPUs, `lorakit.ops.kernels.triton` for CUDA.

    Attributes:
        activations: Names of those that `gate` knows.
        caps_logits: Whether `cross_entropy` takes a cap.
        dropping: Products that drop out at once, or None where that does not pay.
        own: Products of rows with factors of their own, or None where there are none.
    """

    @property
    def activations(self) -> frozenset[str]:
        """See above."""

    @property
    def caps_logits(self) -> bool:
        """See above."""

    @property
    def dropping(self) -> DroppingProducts | None:
        """See above."""

    @property
    def own(self) -> OwnProducts | None:
        """See above."""

    def rms_forward(self, x: Tensor, w: Tensor | None, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """RMS norm of x (N, d) into n (N, d), and 1/rms of its rows into rstd (N, 1). [docs/math.md (76)]

        With offset 0 rounded to x's dtype before the weight (d,) and after it; else once, after offset + weight.
        """

    def rms_again(self, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, n: Tensor) -> None:
        """What `rms_forward` wrote into n (N, d), to the bit, from the rstd (N, 1) that it wrote."""

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """The gradient for x (N, d) from that for n (N, d), plus `add` (N, d), into dx (N, d), which may be dn."""

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """act(first)·up, or act(first), into out; all (N, f). [docs/math.md (78)] Rounded once, after the product."""

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """The gradients of `gate` for first and up from da, all (N, f), into dfirst, which may be da, and dup."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, out: Tensor) -> None:
        """Rotary positions [docs/math.md (80)]: x (B, T, H, D) turned, or turned back, into out, which may be x.

        cos, sin (B or 1, T, rot): the first rot numbers of a head are turned, the others pass.
        """

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """scale·x (any shape) into out, which may be x, without those numbers that the seed (1,) of uint64 drops.

        Each is dropped with probability p, independently; the same seed, size and p drop the same. [docs/math.md (70)]
        """

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """Softmax of rows (Z, n, m), in place: row i sees the places low[i % k] … high[i % k] alone, int32 (k,)."""

    def softmax_backward(self, weights: Tensor, ds: Tensor) -> None:
        """The gradient of the scores from that of their softmax weights, (Z, n, m) both, in the place of the latter."""

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses: Tensor, cap: float | None = None
    ) -> None:
        """Losses (c,) in fp32 of logits (c, V) times scale, which become the gradient of their sum over scale.

        With a cap, the scaled logits go through cap·tanh(·/cap). [docs/math.md (75)]
        """


class DroppingProducts(Protocol):
    """Products with a thin factor a (r, n) of what `Kernels.drop` leaves by the same seed. n is a multiple of 4."""

    def shrink(self, x: Tensor, a: Tensor, p: float, seed: Tensor) -> Tensor:
        """What is left of x (N, n), times a transposed: a new (N, r)."""

    def add_thin(self, h: Tensor, a: Tensor, p: float, seed: Tensor, y: Tensor) -> None:
        """Add to y (N, n) what is left of h (N, r) times a."""

    def outer(self, dh: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """Transposed dh (N, r) times what is left of x (N, n): a new (r, n) in fp32."""


class OwnProducts(Protocol):
    """Products of rows with low-rank factors of their own, which are read where they lie."""

    def add_own(self, x: Tensor, A: Tensor, Bt: Tensor, index: Tensor, y: Tensor) -> None:
        """Add (x_i·A_kᵀ)·Bt_k to y_i, k = index[i], for x (rows, …, in) and y (rows, …, out). [docs/math.md (72)]

        A (K, r, in), Bt (K, r, out), index (rows,) int64 with −1 for none. What A makes is rounded to x's dtype, then
        the sum with y.
        """
