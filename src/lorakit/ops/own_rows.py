"""Rows that have adapters of their own, each with its own factors alone, in one call of a compiled kernel.

Of A and B nothing is read but what a row needs, and nothing is copied: a token of many rows with many adapters costs
the reading of their factors. No gradient is recorded. The plain way beside it is `lorakit.ops.segments.reference`.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.ops.kernels.choosing import kernels_for
from lorakit.ops.kernels.protocol import OwnProducts


def own_products(x: Tensor, A: Tensor, Bt: Tensor) -> OwnProducts | None:
    """The kernel for rows like x (rows, …, in) with A (K, r, in) and Bt (K, r, out); None where there is none."""
    kernels = kernels_for(x, A, Bt, strided=True)
    return None if kernels is None else kernels.own


class OwnRows:
    """s_k·B_k·(A_k·x_i) for each row and its adapter, made ready for any number of calls.   [docs/math.md (72)]

    A (K, r, in) with the scales in it, Bt (K, r, out), index (rows,) with −1 for no adapter, which is in bounds.
    """

    def __init__(self, A: Tensor, Bt: Tensor, index: Tensor, products: OwnProducts) -> None:
        self.A, self.Bt, self.index, self.products = A, Bt, index.long().contiguous(), products

    def forward(self, x: Tensor, into: Tensor | None) -> tuple[Tensor, None]:
        """The result (rows, …, out) for x (rows, …, in), added to `into` in place where that is given.

        Returns:
            The result, and nothing that a backward could need.
        """
        if into is not None and into.dtype == x.dtype and into.is_contiguous():
            room = into
        else:
            room = x.new_zeros(*x.shape[:-1], self.Bt.shape[2])
        if x.numel():
            self.products.add_own(x.contiguous(), self.A, self.Bt, self.index, room)
        return room if into is None or room is into else into.add_(room), None
