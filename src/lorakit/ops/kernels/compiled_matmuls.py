"""Call the matmuls in int8_matmul.h and low_rank.h, which `lorakit.ops.kernels.protocol` documents."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.kernels.gateway import Gateway

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
    """Int8 matmuls, from int8_matmul.h, with matrix tiles (AMX) or dot products (VNNI)."""

    def __init__(self, gateway: Gateway, tiles: bool) -> None:
        if tiles and DTYPE not in gateway.tiles:
            raise ValueError("tiles: this processor has none, or the system does not permit their use")
        self._gateway, self.tiles = gateway, tiles

    def supports(self, q: Tensor, Q: Tensor) -> bool:
        """Implement `Int8Matmuls.supports`; q is (N, in) or (N, out), and Q is (out, in)."""
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
        """Implement `Int8Matmuls.int8_matmul_output`; y is (N, out)."""
        (out, width), rows, pointer = self._checked(Q), len(q), self._gateway.pointer
        (h, B), (kept, columns) = terms
        r, k, apart = h.shape[-1], kept.shape[-1], h.stride(0)
        given = (
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
        sizes, made = (apart, rows, width, r, k, out), pointer("y", y, DTYPE, (rows, out))
        self._gateway.call("int8_matmul_output", DTYPE, rows * out, *given, *sizes, made, self.tiles)

    def int8_matmul_add(
        self, q: Tensor, Q: Tensor, scales: tuple[Tensor, Tensor], partial: Tensor | None, total: Tensor
    ) -> None:
        """Implement `Int8Matmuls.int8_matmul_add`; total is (N, in)."""
        (out, d), rows = self._checked(Q), len(q)
        given, more = self._gradient_operands(q, Q, scales), self._optional_partial(partial, (rows, d))
        made = self._gateway.pointer("total", total, torch.float32, (rows, d))
        self._input_gradient((rows, out, d, 0), *given, None, None, more, made, None)

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
        """Implement `Int8Matmuls.int8_matmul_input_gradient`; dx is (N, in)."""
        (out, d), rows, (k,), pointer = self._checked(Q), len(q), kept.shape, self._gateway.pointer
        given = (
            *self._gradient_operands(q, Q, scales),
            pointer("columns", columns, torch.float32, (rows, k)),
            pointer("kept", kept, torch.int64, (k,), within=(0, d - 1)),
            self._optional_partial(partial, (rows, d)),
        )
        made = pointer("dx", dx, DTYPE, (rows, d))
        self._input_gradient((rows, out, d, k), *given, None, made)

    def _input_gradient(self, sizes: tuple[int, int, int, int], *pointers: int | None) -> None:
        """Call the function; sizes are N, out, in and the number of kept columns, and the last two pointers outputs."""
        rows, _, d, _ = sizes
        given, made = pointers[:-2], pointers[-2:]
        name = "int8_matmul_input_gradient"
        self._gateway.call(name, DTYPE, rows * d, *given, *sizes, *made, self.tiles)

    def _gradient_operands(self, q: Tensor, Q: Tensor, scales: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        (out, d), rows, pointer = Q.shape, len(q), self._gateway.pointer
        return (
            pointer("q", q, torch.int8, (rows, out)),
            pointer("Q", Q, torch.int8, (out, d)),
            pointer("u", scales[0], torch.float32, (rows,)),
            pointer("g", scales[1], torch.float32, (d,)),
        )

    def _optional_partial(self, partial: Tensor | None, shape: tuple[int, int]) -> int | None:
        return self._gateway.optional("partial", partial, torch.float32, shape)

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
    """Low-rank matmuls with the gradient of an output, from low_rank.h."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def supports(self, dy: Tensor, h: Tensor | None, narrow: int) -> bool:
        """Implement `LowRankGradients.supports`; dy is (N, out), and h is (N, r)."""
        laid_out = h is None or (h.dtype == dy.dtype and h.stride(1) == 1 and h.shape[1] <= WIDEST)
        fits = len(dy) > 0 and dy.shape[1] > 0 and dy.shape[1] % LOW_RANK_STEP == 0 and narrow <= WIDEST
        return dy.dtype in self._gateway.dots and laid_out and fits

    def low_rank_gradients(
        self, dy: Tensor, B: Tensor | None, columns: Tensor | None, h: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Implement `LowRankGradients.low_rank_gradients`; dy is (N, out).

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
        given = (
            gateway.pointer("dy", dy, dtype, (rows, out)),
            gateway.optional("B", B, dtype, (out, r)),
            gateway.optional("columns", columns, dtype, (out, k)),
            None if h is None else gateway.pointer("h", h, dtype, (rows, r), (apart, 1)),
        )
        made = (
            gateway.optional("dh", dh, dtype, (rows, r)),
            gateway.optional("kept", kept, torch.float32, (rows, k)),
            gateway.optional("grad", grad, torch.float32, (out, r)),
        )
        gateway.call("low_rank_gradients", dtype, rows * out, *given, apart, rows, out, r, k, *made)
        return dh, kept, grad
