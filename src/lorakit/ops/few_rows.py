"""Linear layers for few rows, as in decoding, with a result whose rows do not depend on each other.

PyTorch chooses the order of additions by the number of rows, so that a row in a batch can differ from the same row
alone. The kernel adds in one order. Its time is that of reading the weight once; without it, this can take twice as
long.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.ops.kernels import kernels_for


def few_rows(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return x·Wᵀ + b (…, out) for x (…, in), rounded once, without autograd, or None if a kernel is not available.

    A row of the result has the same bits for any number of rows up to the kernel's limit, any other rows and any order.
    Shapes: W (out, in), whose rows may be at a distance; b (out,).
    """
    kernels = kernels_for(W, bias, strided=True)
    linear = None if kernels is None else kernels.linear
    if linear is None or W.dim() != 2 or W.stride(1) != 1 or W.shape[1] != x.shape[-1]:
        return None
    if not 0 < x.numel() <= linear.linear_rows[W.dtype] * W.shape[1]:
        return None
    x = x.contiguous()
    return linear.linear_few_rows(x, W, bias) if x.dtype == W.dtype and kernels_for(x) is not None else None
