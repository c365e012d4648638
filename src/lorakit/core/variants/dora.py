"""DoRA: the direction of each row of W is adapted by LoRA, its length is learned by itself.

DoRA turns W into g ⊙ (W + s·B·A), which adds (g − 1) ⊙ W + g ⊙ s·B·A. A weighted sum of such additions is again one:
γ ⊙ (W + B'·A') with γ = 1 + Σ w(g − 1) and B'·A' = Σ (w·g/γ) ⊙ s·B·A. So DoRA adapters are combined exactly, and plain
ones among them have g = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, Shape, WeightSpec, spread
from lorakit.core.linalg import Product, Reading, factors_of
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import NO_SETTING, Addend, At, Factor, OwnTensor, Setting, Start, Sum, Variant
from lorakit.errors import AdapterError

MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of the learned lengths, on a layer and on disk."""

SMALLEST = 1e-6
"""A combined gain below this leaves a row of zeros, which no magnitude can turn."""


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


def _norms(kind: Kind, slot: WeightSpec, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The length of each row of the canonical weight with its update, (out,)."""
    return row_norms(kind.flat_weight(slot, W), *kind.flat(slot, A, B), scale)


def _setting(config: LoraConfig, path: str) -> Setting | None:
    return NO_SETTING if config.use_dora else None


def _fits(kind: Kind) -> bool:
    return kind.acts_on == "input"


def _shape(kind: Kind, slot: WeightSpec, r: int, setting: Setting) -> Shape:
    return kind.vector(slot)


def _start(start: Start) -> Tensor:
    return _norms(start.kind, start.slot, start.read(), start.A, start.B, start.scale)


def _output(at: At) -> Tensor:
    """With g = m / ‖W + s·B·A‖ per output, the addition is (g − 1)(y₀ − b) + g·z.   [docs/math.md (7)]

    The norm is held constant in the backward, as the paper does to save memory (section 4.3). All are (…, out).

    Source:
        Liu et al. 2024, arXiv:2402.09353, eq. (5) and (11).
    """
    gain = spread(_gain(at.kind, at.slot, at.read(), at.factor), at.slot)
    without_bias = at.y0 if at.bias is None else at.y0 - spread(at.bias.to(at.y0.dtype), at.slot)
    return (gain - 1).to(at.y0.dtype) * without_bias + gain.to(at.y0.dtype) * at.z


def _update(kind: Kind, slot: WeightSpec, W: Tensor, delta: Tensor, factor: Factor) -> Tensor:
    gain = _gain(kind, slot, W, factor).view(-1, *[1] * (W.ndim - 1))  # (out, 1…)
    return gain * (W + delta) - W


def _gain(kind: Kind, slot: WeightSpec, W: Tensor, factor: Factor) -> Tensor:
    """G = m / ‖W + s·B·A‖, (out,); a row of zeros keeps its gain at one instead of dividing by zero."""
    with torch.no_grad():
        norms = _norms(kind, slot, W, factor.A, factor.B, factor.scale)
    magnitude = factor.own[MAGNITUDE].flatten() if factor.own else norms
    return torch.where(norms > 0, at_least_fp32(magnitude) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


def combined(path: str, addends: Sequence[Addend], reading: Reading) -> Sum:
    """Combine adapters, of which some are DoRA, into one that is.   [docs/math.md (57)]

    Args:
        path: The site, for the message.
        addends: Factors with their weights.
        reading: The base there.

    Returns:
        The products g ⊙ B·A, (g, r, in) and (g, out, r), and what turns their sum into B'·A' and the magnitude
        γ·‖W + B'·A'‖, (out,).

    Raises:
        AdapterError: The gains cancel, so that nothing is left of an output.
    """
    gains = [_gain_over(addend.factor, reading) for addend in addends]
    total = 1 + torch.stack([one.weight * (gain - 1) for gain, one in zip(gains, addends, strict=True)]).sum(0)
    lost = int((total.abs() < SMALLEST).sum())
    if lost:
        raise AdapterError(
            f"At {path} the gains of these DoRA adapters cancel for {lost} outputs, which no DoRA adapter can do. "
            "Choose other weights."
        )
    products = [addend.product for addend in addends]
    turned = tuple(Product(p.A, p.B * g.view_as(p.B[..., :1])) for p, g in zip(products, gains, strict=True))
    like, experts = addends[0].factor, addends[0].experts

    def finish(product: Product) -> tuple[Product, Mapping[str, Tensor]]:
        rows = total.view(product.B.shape[0], product.B.shape[1], 1).to(product.B.dtype)
        made = Product(product.A, product.B / rows)
        A, B = factors_of(made, like.A, like.B, experts)
        wide = reading.W.dtype
        lengths = _norms(reading.kind, reading.slot, reading.W, A.detach().to(wide), B.detach().to(wide), 1.0)
        magnitude = (total * lengths).to(A.dtype)
        return made, {MAGNITUDE: magnitude.view(reading.kind.vector(reading.slot))}

    return Sum(turned, finish)


def _gain_over(factor: Factor, reading: Reading) -> Tensor:
    """The gain of each output, (out,), in the precision of the base that was read; ones where it is not DoRA."""
    W = reading.W
    if MAGNITUDE not in factor.own:
        return torch.ones(W.shape[0], dtype=W.dtype, device=W.device)
    A, B = factor.A.detach().to(W.dtype), factor.B.detach().to(W.dtype)
    norms = _norms(reading.kind, reading.slot, W, A, B, factor.scale)
    turned = factor.own[MAGNITUDE].detach().to(W.dtype).flatten() / norms.clamp_min(torch.finfo(W.dtype).tiny)
    return torch.where(norms > 0, turned, 1.0)


DORA = Variant(
    name="dora",
    title="DoRA",
    field="use_dora",
    setting=_setting,
    fits=_fits,
    tensors=(
        OwnTensor(
            held_as=MAGNITUDE,
            carried="module",
            keys=(f".{MAGNITUDE}", f".{MAGNITUDE}.weight"),  # an older PEFT wrote the second
            shape=_shape,
            start=_start,
            depends_on_rank=False,
        ),
    ),
    output=_output,
    update=_update,
    combine=combined,
    peft_names={"use_dora": lambda factor: True},
)
