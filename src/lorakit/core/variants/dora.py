"""DoRA: the direction of each row of W is adapted by LoRA, its length is learned by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.factor import Factor
from lorakit.core.kinds import Kind, Slot, spread
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import At, Variant


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Euclidean norm of each row of W + s·B·A, without forming the product.   [docs/math.md (8)]

    ‖w + s·bA‖² = ‖w‖² + 2s·(w Aᵀ)·b + s²·b (A Aᵀ) bᵀ for each row w of W and b of B.

    Args:
        W: Weight as a matrix, (out, in).
        A: Down projection, (r, in).
        B: Up projection, (out, r).
        scale: The factor's scale.

    Returns:
        (out,), fp32 or wider. Cost: 2·out·in·r FLOPs; the largest temporary is (out, r).
    """
    W, A, B = at_least_fp32(W), at_least_fp32(A), at_least_fp32(B)
    cross = ((W @ A.T) * B).sum(1)
    low_rank = ((B @ (A @ A.T)) * B).sum(1)
    squared = torch.linalg.vector_norm(W, dim=1).square() + 2 * scale * cross + scale * scale * low_rank
    return squared.clamp_min(0).sqrt()


def _magnitude(kind: Kind, slot: Slot, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return row_norms(kind.flat_weight(slot, W), *kind.flat(slot, A, B), scale)


def _output(at: At) -> Tensor:
    """With g = m / ‖W + s·B·A‖ per output, the addition is (g − 1)(y₀ − b) + g·z.   [docs/math.md (7)]

    The norm is held constant in the backward, as the paper does to save memory (section 4.3). All are (…, out).

    Source:
        Liu et al. 2024, arXiv:2402.09353, eq. (5) and (11).
    """
    gain = spread(_gain(at.kind, at.slot, at.read(), at.factor), at.slot)
    without_bias = at.y0 if at.bias is None else at.y0 - spread(at.bias.to(at.y0.dtype), at.slot)
    return (gain - 1).to(at.y0.dtype) * without_bias + gain.to(at.y0.dtype) * at.z


def _update(kind: Kind, slot: Slot, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    gain = _gain(kind, slot, W, factor).view(-1, *[1] * (W.ndim - 1))  # (out, 1…)
    return gain * (W + delta) - W


def _gain(kind: Kind, slot: Slot, W: Tensor, factor: Factor) -> Tensor:
    """G = m / ‖W + s·B·A‖, (out,); a row of zeros keeps its gain at one instead of dividing by zero."""
    with torch.no_grad():
        norms = _magnitude(kind, slot, W, factor.A, factor.B, factor.scale)
    magnitude = factor.magnitude if factor.magnitude is not None else norms
    return torch.where(norms > 0, at_least_fp32(magnitude) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


DORA = Variant(
    name="dora",
    kinds=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    mergeable=True,
    has_magnitude=True,
    magnitude=_magnitude,
    output=_output,
    update=_update,
)
