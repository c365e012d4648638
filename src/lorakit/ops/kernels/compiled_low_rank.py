"""Call the low-rank matmuls of a backward pass in low_rank.h, which `lorakit.ops.kernels.protocol` documents."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.kernels.gateway import Gateway

STEP = 32
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
        fits = len(dy) > 0 and dy.shape[1] > 0 and dy.shape[1] % STEP == 0 and narrow <= WIDEST
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
