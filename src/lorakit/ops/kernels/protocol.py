"""Interface of the compiled kernels. If no kernels are available, PyTorch operations compute the same results.

All tensors are on one device and contiguous (`rotate` also accepts strided tokens); rows are (N, d). Inputs and outputs
have the compute dtype of the call (fp32 or bf16; on CUDA, also fp16), row statistics are fp32, and intermediates are
fp32, rounded where stated. Outputs are preallocated; an output may alias an input only where stated.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Kernels for a device type: `lorakit.ops.kernels.compiled` for CPUs, `lorakit.ops.kernels.triton` for CUDA.

    Attributes:
        activations: Names of the activations that `gate` supports.
        caps_logits: Whether `cross_entropy` supports a cap.
        dropping: Low-rank matmuls with fused dropout, or None if they are not faster.
        own: Matmuls with per-row LoRA factors, or None.
    """

    activations: frozenset[str]
    caps_logits: bool
    dropping: DropoutMatmuls | None
    own: PerRowMatmuls | None

    def rms_forward(self, x: Tensor, w: Tensor | None, eps: float, offset: float, n: Tensor, rstd: Tensor) -> None:
        """Write the RMS norm of x (N, d) to n (N, d), and 1/RMS of each row to rstd (N, 1), [docs/math.md (76)].

        With offset 0, values are rounded to the dtype of x before and after the multiplication by the weight w (d,);
        otherwise, they are rounded once, after the multiplication by offset + w.
        """

    def rms_recompute(self, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, n: Tensor) -> None:
        """Recompute n (N, d) as in `rms_forward`, bit for bit, from rstd (N, 1)."""

    def rms_backward(
        self, dn: Tensor, x: Tensor, w: Tensor | None, offset: float, rstd: Tensor, add: Tensor | None, dx: Tensor
    ) -> None:
        """Write the gradient of x plus `add` to dx, given dn, the gradient of n. dx may be dn; all are (N, d)."""

    def gate(self, act: str, first: Tensor, up: Tensor | None, out: Tensor) -> None:
        """Write act(first)·up, or act(first) without up, to out, rounded once; all are (N, f), [docs/math.md (78)]."""

    def gate_backward(
        self, act: str, da: Tensor, first: Tensor, up: Tensor | None, dfirst: Tensor, dup: Tensor | None
    ) -> None:
        """Write the gradients of `gate`, given da: dfirst, which may be da, and dup, if up is given; all are (N, f)."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool, out: Tensor) -> None:
        """Write x (B, T, H, D), rotated by position or rotated back, to out, which may be x, [docs/math.md (80)].

        cos and sin are (B or 1, T, rot): the first rot elements of a head are rotated, and the others are copied. In x
        and out, the heads of each token are contiguous, and tokens are evenly spaced.
        """

    def drop(self, x: Tensor, p: float, seed: Tensor, scale: float, out: Tensor) -> None:
        """Write scale·x (any shape) to out, which may be x, zeroing the elements that the seed, uint64 (1,), drops.

        Each element is dropped independently with probability p, [docs/math.md (70)]. The same seed, size and p drop
        the same elements.
        """

    def softmax(self, scores: Tensor, low: Tensor | None, high: Tensor | None) -> None:
        """Compute the softmax of rows (Z, n, m) in place, limited to the positions that each row sees.

        Row i sees the positions low[i % k] to high[i % k] − 1; low and high are int32 (k,); None means no bound.
        """

    def softmax_backward(self, weights: Tensor, ds: Tensor) -> None:
        """Replace ds, the gradient of softmax weights (Z, n, m), with the gradient of the scores."""

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, scale: float, gradients: bool, losses: Tensor, cap: float | None = None
    ) -> None:
        """Write the fp32 losses (c,) for logits (c, V) times scale, [docs/math.md (75)].

        If `gradients`, replace the logits with the gradient of the summed losses, divided by scale. With a cap, the
        scaled logits go through cap·tanh(·/cap).
        """


class DropoutMatmuls(Protocol):
    """Low-rank matmuls with a factor a (r, n), fused with the dropout that `Kernels.drop` applies for a seed.

    n must be a multiple of 4.
    """

    def shrink(self, x: Tensor, a: Tensor, p: float, seed: Tensor) -> Tensor:
        """Return dropout(x)·aᵀ for x (N, n): a new tensor (N, r)."""

    def add_low_rank(self, h: Tensor, a: Tensor, p: float, seed: Tensor, y: Tensor) -> None:
        """Add dropout(h·a) to y (N, n), for h (N, r)."""

    def outer(self, dh: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """Return dhᵀ·dropout(x) for dh (N, r) and x (N, n): a new tensor (r, n) in fp32."""


class PerRowMatmuls(Protocol):
    """Matmuls of rows with per-row low-rank factors, which are read in place."""

    def add_per_row(self, x: Tensor, A: Tensor, Bt: Tensor, index: Tensor, y: Tensor) -> None:
        """Add (x_i·A_kᵀ)·Bt_k, with k = index[i], to y_i for x (rows, …, in) and y (rows, …, out), [docs/math.md (72)].

        A is (K, r, in), Bt is (K, r, out), and index is int64 (rows,), with −1 for none. Both the low-rank activation
        and the sum with y are rounded to the dtype of x.
        """
