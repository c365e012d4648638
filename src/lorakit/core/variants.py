"""The table VARIANTS: how a base output and a low-rank update combine.

Every variant returns an *addition* to the base output and to the base weight, so that several adapters, and
batches whose rows use different ones, are well defined whatever their order. A row sees tensors and the kind's
geometry; it knows nothing about adapters' names, routes or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.bases import at_least_fp32
from lorakit.core.factor import Factor
from lorakit.errors import NotYetSupported


@dataclass(frozen=True)
class Variant:
    """One way to combine.

    Attributes:
        name: What messages call it.
        kinds: Names of the kinds it works on.
        mergeable: Its effect can be written into the weight.
        magnitude: Canonical W (out, in), A, B, scale -> the vector it learns, (out,), or None.
        output: y₀ (…, out), bias (out,) or None, scaled z = s·B(A x) (…, out), factor, reader of W -> addition.
        update: Canonical W (out, in), scaled delta (out, in), factor -> addition to W, (out, in).
    """

    name: str
    kinds: tuple[str, ...]
    mergeable: bool
    magnitude: Callable[[Tensor, Tensor, Tensor, float], Tensor | None]
    output: Callable[[Tensor, Tensor | None, Tensor, Factor, Callable[[], Tensor]], Tensor]
    update: Callable[[Tensor, Tensor, Factor], Tensor]


def _no_magnitude(W: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    return None


def _plain_output(y0: Tensor, bias: Tensor | None, z: Tensor, factor: Factor, read: Callable[[], Tensor]) -> Tensor:
    """H = W x + s·B(A x): the addition is z.   [docs/math.md (2)]

    Takes and returns (…, out). Source: Hu et al. 2021, arXiv:2106.09685, eq. (3).
    """
    return z


def _plain_update(W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    return delta


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Euclidean norm of each row of W + s·B·A, without forming the product.   [docs/math.md (8)]

    ‖w + s·bA‖² = ‖w‖² + 2s·(w Aᵀ)·b + s²·b (A Aᵀ) bᵀ for each row w of W and b of B.

    Args:
        W: Canonical weight, (out, in).
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


def _dora_magnitude(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return row_norms(W, A, B, scale)


def _dora_output(y0: Tensor, bias: Tensor | None, z: Tensor, factor: Factor, read: Callable[[], Tensor]) -> Tensor:
    """With g = m / ‖W + s·B·A‖ per output, the addition is (g − 1)(y₀ − b) + g·z.   [docs/math.md (7)]

    The norm is held constant in the backward, as the paper does to save memory (section 4.3). All are (…, out).

    Source:
        Liu et al. 2024, arXiv:2402.09353, eq. (5) and (11).
    """
    gain = _gain(read(), factor)
    without_bias = y0 if bias is None else y0 - bias
    return (gain - 1).to(y0.dtype) * without_bias + gain.to(y0.dtype) * z


def _dora_update(W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    gain = _gain(W, factor).unsqueeze(1)  # (out, 1)
    return gain * (W + delta) - W


def _gain(W: Tensor, factor: Factor) -> Tensor:
    """G = m / ‖W + s·B·A‖, (out,); a row of zeros keeps its gain at one instead of dividing by zero."""
    with torch.no_grad():
        norms = row_norms(W, factor.A, factor.B, factor.scale)
    magnitude = factor.magnitude if factor.magnitude is not None else norms
    return torch.where(norms > 0, at_least_fp32(magnitude) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="plain",
        kinds=("Linear", "Conv1D", "Embedding"),
        mergeable=True,
        magnitude=_no_magnitude,
        output=_plain_output,
        update=_plain_update,
    ),
    Variant(
        name="dora",
        kinds=("Linear", "Conv1D"),
        mergeable=True,
        magnitude=_dora_magnitude,
        output=_dora_output,
        update=_dora_update,
    ),
)


_NAMED = {variant.name: variant for variant in VARIANTS}


def variant_named(name: str) -> Variant:
    """The variant with that name; names are the table's own, so a miss is a mistake in lorakit."""
    return _NAMED[name]


def variant_for(use_dora: bool, kind: str, path: str) -> Variant:
    """The variant that a config asks for at a site.

    Args:
        use_dora: The config's field.
        kind: Name of the site's kind.
        path: Where, for the message.

    Raises:
        NotYetSupported: The variant does not work on this kind yet.
    """
    variant = variant_named("dora" if use_dora else "plain")
    if kind not in variant.kinds:
        raise NotYetSupported(
            f"use_dora at {path}: DoRA on {kind} is not built yet. Take it out of target_modules, or leave DoRA off."
        )
    return variant
