"""The low-rank matmuls of a backward pass that read the gradient of an output.

They are narrow, so most of their time is that of reading the gradient. If there is a kernel, it reads the gradient
once for all of them; otherwise, each is a matmul of PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops.kernels import kernels_for


class LowRankMatmuls(NamedTuple):
    """Results of matmuls with the gradient dy (N, out) of an output; each is None if its other operand was None.

    Attributes:
        dh: dy·B (N, r), in the dtype of dy: the gradient of the low-rank activation.
        kept: dy·W_K (N, k), in fp32.
        grad_b: The gradient dyᵀ·h (out, r) of B. It is fp32 if a kernel computed it, otherwise in the dtype of dy.
    """

    dh: Tensor | None
    kept: Tensor | None
    grad_b: Tensor | None


def low_rank_matmuls(dy: Tensor, B: Tensor | None, columns: Tensor | None, h: Tensor | None) -> LowRankMatmuls:
    """Return the matmuls of dy (N, out) with the operands that are not None.

    Args:
        dy: Gradient of an output.
        B: Factor (out, r) in the dtype of dy, or None.
        columns: Columns W_K (out, k) of an int8 weight that keep their dtype, in the dtype of dy, or None.
        h: Low-rank activation (N, r) in the dtype of dy, or None.
    """
    if B is None and columns is None and h is None:
        return LowRankMatmuls(None, None, None)
    kernels = kernels_for(dy, B, columns)
    fused = None if kernels is None else kernels.low_rank
    if fused is not None and fused.supports(dy, h, max(each.shape[1] for each in (B, columns, h) if each is not None)):
        return LowRankMatmuls(*fused.low_rank_gradients(dy, B, columns, h))
    return LowRankMatmuls(
        None if B is None else torch.mm(dy, B),
        None if columns is None else torch.mm(dy, columns).float(),
        None if h is None else torch.mm(h.t(), dy).t(),  # faster than dyᵀ·h for small r
    )
