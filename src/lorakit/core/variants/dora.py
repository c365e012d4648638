"""DoRA: LoRA adapts the direction of each row of W, while the length of each row is learned separately.

DoRA replaces W with g ⊙ (W + s·B·A); in other words, it adds (g − 1) ⊙ W + g ⊙ s·B·A to W. The sum of W and several
such additions, with weights w, has the same form: γ ⊙ (W + B'·A'), with γ = 1 + Σ w(g − 1) and
B'·A' = Σ (w·g/γ) ⊙ s·B·A. Combinations of DoRA adapters are therefore exact, even if they include plain LoRA
adapters, for which g = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.kinds.kind import Kind, WeightSpec, spread, takes_input
from lorakit.core.linalg import Product, Reading, factors_of
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import Addend, At, Factor, OwnTensor, Parts, Start, Sum, Variant
from lorakit.errors import AdapterError

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name for the learned row lengths, on a layer and on disk."""

SMALLEST = 1e-6
"""Smallest allowed absolute value of a combined DoRA scale γ; γ must not be zero, because B' is divided by γ."""


def row_norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the Euclidean norm of each row of W + s·B·A, without computing the product.   [docs/math.md (8)]

    ‖w + s·bA‖² = ‖w‖² + 2s·(w Aᵀ)·b + s²·b (A Aᵀ) bᵀ for each row w of W and the corresponding row b of B.

    Returns:
        (out,), fp32 or wider. Cost: 2·out·in·r FLOPs; the largest temporary is (out, r).
    """
    W, A, B = at_least_fp32(W), at_least_fp32(A), at_least_fp32(B)
    cross = ((W @ A.T) * B).sum(1)
    low_rank = ((B @ (A @ A.T)) * B).sum(1)
    squared = torch.linalg.vector_norm(W, dim=1).square() + 2 * scale * cross + scale * scale * low_rank
    return squared.clamp_min(0).sqrt()


def _norms(kind: Kind, spec: WeightSpec, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the row norms, (out,), of a canonical weight plus its low-rank update."""
    return row_norms(kind.flat_weight(spec, W), *kind.flat(spec, A, B), scale)


def _start(start: Start) -> Tensor:
    return _norms(start.kind, start.spec, start.read(), start.A, start.B, start.scale)


def _output(at: At) -> Tensor:
    """Return (g − 1)(y₀ − b) + g·z, with g = m / ‖W + s·B·A‖ per output.   [docs/math.md (7)]

    To save memory, the backward pass treats the norm as a constant, as in the paper (section 4.3). The result has the
    shape (…, out).

    Source:
        Liu et al. 2024, arXiv:2402.09353, eqs. (5) and (11).
    """
    gain = spread(_gain(at.kind, at.spec, at.read(), at.factor), at.spec)
    without_bias = at.y0 if at.bias is None else at.y0 - spread(at.bias.to(at.y0.dtype), at.spec)
    return (gain - 1).to(at.y0.dtype) * without_bias + gain.to(at.y0.dtype) * at.z


def _update(kind: Kind, spec: WeightSpec, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    gain = _gain(kind, spec, W, factor).view(-1, *[1] * (W.ndim - 1))  # (out, 1…)
    return gain * (W + delta) - W


def _gain(kind: Kind, spec: WeightSpec, W: Tensor, factor: Factor) -> Tensor:
    """Return g = m / ‖W + s·B·A‖, (out,); g is 1 for a row of zeros, and for every row if the factor is not DoRA."""
    with torch.no_grad():
        norms = _norms(kind, spec, W, factor.A, factor.B, factor.scale)
    magnitude = factor.own[MAGNITUDE].flatten() if MAGNITUDE in factor.own else norms
    return torch.where(norms > 0, at_least_fp32(magnitude) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


def combined(path: str, addends: Sequence[Addend], reading: Reading) -> Sum:
    """Combine DoRA adapters, and possibly plain LoRA adapters, into a DoRA adapter.   [docs/math.md (57)]

    An AdapterError if the scales of an output cancel out (γ = 0), so that no DoRA adapter can represent the sum.

    Returns:
        The products g ⊙ B·A, each as A (groups, r, in) and B (groups, out, r), and a function that takes the sum of the
        products and returns B'·A' and the magnitude γ·‖W + B'·A'‖, (out,).
    """
    gains = [_gain_over(addend.factor, reading) for addend in addends]
    total = 1 + torch.stack([one.weight * (gain - 1) for gain, one in zip(gains, addends, strict=True)]).sum(0)
    lost = int((total.abs() < SMALLEST).sum())
    if lost:
        text = f"At {path}, the scales of the DoRA adapters cancel out (affected outputs: {lost}); use other weights."
        raise AdapterError(text, what=str(lost), where=path)
    products = [addend.product for addend in addends]
    turned = tuple(Product(p.A, p.B * g.view_as(p.B[..., :1])) for p, g in zip(products, gains, strict=True))
    like, experts = addends[0].factor, addends[0].experts

    def finish(product: Product) -> tuple[Product, Mapping[str, Tensor]]:
        rows = total.view(product.B.shape[0], product.B.shape[1], 1).to(product.B.dtype)
        divided = Product(product.A, product.B / rows)
        A, B = factors_of(divided, like.A, like.B, experts)
        wide = reading.W.dtype
        lengths = _norms(reading.kind, reading.spec, reading.W, A.detach().to(wide), B.detach().to(wide), 1.0)
        magnitude = (total * lengths).to(A.dtype)
        return divided, {MAGNITUDE: magnitude.view(reading.kind.vector(reading.spec))}

    return Sum(turned, finish)


def _gain_over(factor: Factor, reading: Reading) -> Tensor:
    """Return the DoRA scale of each output, (out,), in the precision of the base; ones if the factor is not DoRA."""
    dtype = reading.W.dtype
    if MAGNITUDE not in factor.own:
        return reading.W.new_ones(reading.W.shape[0])
    extras = {name: tensor.detach().to(dtype) for name, tensor in factor.own.items()}
    wide = replace(factor, A=factor.A.detach().to(dtype), B=factor.B.detach().to(dtype), own=extras)
    return _gain(reading.kind, reading.spec, reading.W, wide)


DORA = Variant(
    name="dora",
    title="DoRA",
    field="use_dora",
    fits=takes_input,
    parts=Parts(
        extras=(
            OwnTensor(
                held_as=MAGNITUDE,
                carried="module",
                shape=lambda kind, spec, r, setting: kind.vector(spec),
                start=_start,
                depends_on_rank=False,
                older_names=(f"{MAGNITUDE}.weight",),  # of older versions of PEFT
            ),
        )
    ),
    output=_output,
    update=_update,
    combine=combined,
)
