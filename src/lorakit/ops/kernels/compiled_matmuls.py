"""Call the matmuls in int8_matmul.h, low_rank.h and attention.h, under the terms of `lorakit.ops.kernels`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lorakit.ops.kernels.gateway import FARTHEST, Gateway

DTYPE = torch.bfloat16
"""The dtype of all floating-point operands that are not fp32; the instructions multiply no other."""

TILE_STEP = 64
"""The same in int8_panels.h. Both sizes of a weight must be multiples of this."""

FEWEST_ROWS = 33
"""The smallest number of rows; with fewer, most of the time is that of reading the weight."""


def int8_matmuls(gateway: Gateway) -> CompiledInt8Matmuls | None:
    """Return the int8 matmuls of a library, with tiles if it can use them, or None if it has none."""
    return CompiledInt8Matmuls(gateway, DTYPE in gateway.tiles) if DTYPE in gateway.int8_matmuls else None


class CompiledInt8Matmuls:
    """Int8 matmuls with Q (out, in), exact, together with the steps after them, up to the order of additions, from
    int8_matmul.h, with matrix tiles (AMX) or dot products (VNNI).
    """

    def __init__(self, gateway: Gateway, tiles: bool) -> None:
        if tiles and DTYPE not in gateway.tiles:
            raise ValueError("tiles: this processor has none, or the system does not permit their use")
        self._gateway, self.tiles = gateway, tiles

    def supports(self, q: Tensor, Q: Tensor) -> bool:
        """Return whether q (N, in) or (N, out) can be multiplied with Q (out, in), and whether this is fast."""
        return len(q) >= FEWEST_ROWS and not any(size % TILE_STEP for size in Q.shape) and min(Q.shape) > 0

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

        Shapes: q (N, in), scales (t, s) as in `CompiledKernels.int8_output`, terms (h, B) and (kept, columns): (N, r)
        and (out, r), (N, k) and (out, k), where r and k may be 0. h may have rows at a distance.
        """
        (out, width), rows, pointer = self._checked(Q), len(q), self._gateway.pointer
        (h, B), (kept, columns) = terms
        r, k, apart = h.shape[-1], kept.shape[-1], h.stride(0)
        inputs = (
            pointer("q", q, torch.int8, (rows, width)),
            pointer("Q", Q, torch.int8, (out, width)),
            pointer("t", scales[0], torch.float32, (rows,)),
            pointer("s", scales[1], torch.float32, (out,)),
            self._gateway.optional("bias", bias, DTYPE, (out,)),
            pointer("h", h, DTYPE, (rows, r), (apart, 1)),
            pointer("B", B, DTYPE, (out, r)),
            pointer("kept", kept, DTYPE, (rows, k)),
            pointer("columns", columns, DTYPE, (out, k)),
        )
        sizes, output = (apart, rows, width, r, k, out), pointer("y", y, DTYPE, (rows, out))
        self._gateway.call("int8_matmul_output", DTYPE, rows * out, *inputs, *sizes, output, self.tiles)

    def int8_matmul_add(
        self, q: Tensor, Q: Tensor, scales: tuple[Tensor, Tensor], partial: Tensor | None, total: Tensor
    ) -> None:
        """Write what `CompiledKernels.int8_add` writes for the sums q·Q, given q (N, out) and (u, g)."""
        into = self._gateway.pointer("total", total, torch.float32, (len(q), Q.shape[1]))
        self._input_gradient(q, Q, scales, (None, None, 0), partial, (into, None))

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
        """Write what `CompiledKernels.int8_input_gradient` writes for the sums q·Q, given q (N, out) and (u, g)."""
        rows, d, (k,), pointer = len(q), Q.shape[1], kept.shape, self._gateway.pointer
        at_kept = (
            pointer("columns", columns, torch.float32, (rows, k)),
            pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
            k,
        )
        self._input_gradient(q, Q, scales, at_kept, partial, (None, pointer("dx", dx, DTYPE, (rows, d))))

    def _input_gradient(
        self,
        q: Tensor,
        Q: Tensor,
        scales: tuple[Tensor, Tensor],
        kept: tuple[int | None, int | None, int],
        partial: Tensor | None,
        outputs: tuple[int | None, int | None],
    ) -> None:
        """Call the function; `kept` has the addresses of the columns and their positions, and their number."""
        (out, d), rows, pointer = self._checked(Q), len(q), self._gateway.pointer
        operands = (
            pointer("q", q, torch.int8, (rows, out)),
            pointer("Q", Q, torch.int8, (out, d)),
            pointer("u", scales[0], torch.float32, (rows,)),
            pointer("g", scales[1], torch.float32, (d,)),
            *kept[:2],
            self._gateway.optional("partial", partial, torch.float32, (rows, d)),
        )
        sizes = (rows, out, d, kept[2])
        self._gateway.call("int8_matmul_input_gradient", DTYPE, rows * d, *operands, *sizes, *outputs, self.tiles)

    def _checked(self, Q: Tensor) -> tuple[int, int]:
        """Return the sizes of Q (out, in), which must be multiples of TILE_STEP."""
        out, width = Q.shape
        if out % TILE_STEP or width % TILE_STEP:
            raise ValueError(f"Q {tuple(Q.shape)}: both sizes must be multiples of {TILE_STEP}")
        return out, width


LOW_RANK_STEP = 32
"""FEW_ROWS in low_rank.h. The number of columns of dy must be a multiple of it."""

WIDEST = 64
"""The largest r, and the largest number of kept columns; with more, matmuls of PyTorch are as fast."""


class CompiledLowRankGradients:
    """Low-rank matmuls with the gradient of an output, read once, whose fp32 sums do not depend on the threads; from
    low_rank.h.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def supports(self, dy: Tensor, h: Tensor | None, narrow: int) -> bool:
        """Return whether dy (N, out), h (N, r), with rows at a distance, and up to `narrow` columns are supported."""
        laid_out = h is None or (h.dtype == dy.dtype and h.stride(1) == 1 and h.shape[1] <= WIDEST)
        fits = len(dy) > 0 and dy.shape[1] > 0 and dy.shape[1] % LOW_RANK_STEP == 0 and narrow <= WIDEST
        return dy.dtype in self._gateway.dots and laid_out and fits

    def low_rank_gradients(
        self, dy: Tensor, B: Tensor | None, columns: Tensor | None, h: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return dy·B (N, r), rounded to the dtype of dy, and dy·columns (N, k) and dyᵀ·h (out, r) in fp32.

        Shapes: dy (N, out), B (out, r), columns (out, k), h (N, r). A result is None if its factor is None.

        Raises:
            ValueError: A tensor is invalid, or a size is not supported.
        """
        dtype, (rows, out), gateway = dy.dtype, dy.shape, self._gateway
        k, r = (0 if each is None else each.shape[1] for each in (columns, B if h is None else h))
        if not self.supports(dy, h, max(r, k)):
            raise ValueError(f"dy {tuple(dy.shape)}, r {r}, {k} kept columns: not supported")
        apart = 0 if h is None else h.stride(0)
        dh = None if B is None else dy.new_empty(rows, r)
        kept = None if columns is None else torch.empty(rows, k, dtype=torch.float32)
        grad = None if h is None else torch.empty(out, r, dtype=torch.float32)
        inputs = (
            gateway.pointer("dy", dy, dtype, (rows, out)),
            gateway.optional("B", B, dtype, (out, r)),
            gateway.optional("columns", columns, dtype, (out, k)),
            None if h is None else gateway.pointer("h", h, dtype, (rows, r), (apart, 1)),
        )
        outputs = (
            gateway.optional("dh", dh, dtype, (rows, r)),
            gateway.optional("kept", kept, torch.float32, (rows, k)),
            gateway.optional("grad", grad, torch.float32, (out, r)),
        )
        gateway.call("low_rank_gradients", dtype, rows * out, *inputs, apart, rows, out, r, k, *outputs)
        return dh, kept, grad


LANES = 16
"""Number of fp32 values in a register of the attention kernel; head widths must be a multiple of it."""


class CompiledAttention:
    """Attention over separate sequences, without windows, caps, biases, sinks or dropout. [docs/math.md (81), (82)]

    Shapes: q (B, H, T, D), k and v (B, KV, T, D). Heads must be contiguous; other strides are arbitrary. `ends` is
    int64 (S,): the end of each sequence within the T tokens, in increasing order; the last one is T. If `causal` is
    true, a token sees only itself and earlier tokens of its sequence. From attention.h.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def supports(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Return whether the kernel supports the dtype, widths and strides of q (B, H, T, D), k and v."""
        width = q.shape[3]
        laid_out = all(t.stride(3) == 1 and min(t.stride()) >= 0 and t.stride(2) < FARTHEST for t in (q, k, v))
        return q.dtype in self._gateway.dots and laid_out and width > 0 and width % LANES == 0 and v.shape[3] == width

    def attend(
        self, operands: tuple[Tensor, Tensor, Tensor], ends: Tensor, scale: float, causal: bool, out: Tensor
    ) -> None:
        """Write softmax(scale·q·kᵀ)·v to `out` (B, H, T, D)."""
        inputs, sizes = self._operands(operands, ends)
        q, dtype = operands[0], operands[0].dtype
        output = self._gateway.heads("out", out, dtype, q.shape, least=1)
        self._gateway.call("attend", dtype, q.numel(), *inputs, *output, *sizes, scale, causal)

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
        inputs, sizes = self._operands(operands, ends)
        q, dtype = operands[0], operands[0].dtype
        outputs = [*self._gateway.heads("dout", dout, dtype, q.shape)]
        for name, grad, of in zip(("dq", "dk", "dv"), into, operands, strict=True):
            outputs += self._gateway.heads(name, grad, dtype, of.shape, least=1)
        self._gateway.call("attend_backward", dtype, q.numel(), *inputs, *outputs, *sizes, scale, causal)

    def _operands(self, operands: tuple[Tensor, Tensor, Tensor], ends: Tensor) -> tuple[list[int], list[int]]:
        """Check q (B, H, T, D), k, v (B, KV, T, D) and ends (S,) that increase up to T; return the arguments."""
        q, k, v = operands
        (batch, heads, tokens, width), kv = q.shape, k.shape[1]
        bounds = [0, *ends.tolist()]
        if not self.supports(q, k, v) or kv < 1 or heads % kv:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: not supported")
        if bounds[-1] != tokens or any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"ends: expected positions that increase up to {tokens}; got {bounds[1:]}")
        addresses: list[int] = []
        for name, tensor, count in (("q", q, heads), ("k", k, kv), ("v", v, kv)):
            addresses += self._gateway.heads(name, tensor, q.dtype, (batch, count, tokens, width))
        at = self._gateway.pointer("ends", ends, torch.int64, (len(bounds) - 1,))
        return addresses, [at, batch, len(bounds) - 1, kv, heads // kv, width]
