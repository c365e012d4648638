"""DoRA's gain of each output, and how several DoRA adapters become one that does the same.

DoRA turns W into g ⊙ (W + s·B·A), which adds (g − 1) ⊙ W + g ⊙ s·B·A. A weighted sum of such additions is again one:
γ ⊙ (W + B'·A') with γ = 1 + Σ w(g − 1) and B'·A' = Σ (w·g/γ) ⊙ s·B·A. So DoRA adapters are combined exactly, and plain
ones among them have g = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.files.tensor_names import MAGNITUDE
from lorakit.core.kinds import Kind, Slot
from lorakit.core.linalg import Product
from lorakit.core.operations.tensor_sources import LooseFactor
from lorakit.core.variants.dora import DORA
from lorakit.errors import AdapterError

SMALLEST = 1e-6
"""A combined gain below this leaves a row of zeros, which no magnitude can turn."""


@dataclass(frozen=True)
class Reading:
    """The base's weight at a site, and its geometry.

    Attributes:
        W: Canonical weight, (out, in, …), in float64; of experts as the base stores them, (experts, …, …).
        kind: The kind of the site.
        slot: Its geometry.
    """

    W: Tensor
    kind: Kind
    slot: Slot

    def matrix(self, expert: int = 0) -> Tensor:
        """The weight as a matrix, (out, n), in float64; of several experts one, so that one is wide at a time."""
        if not self.slot.experts:
            return self.kind.flat_weight(self.slot, self.W)
        W = self.W[expert].double()
        return W.T if self.slot.in_first else W

    def norms(self, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """The norm of each output of W + scale·B·A, (out,), for A (r, in, …) and B (out, r, …)."""
        A, B = A.detach().to(self.W.dtype), B.detach().to(self.W.dtype)
        return DORA.magnitude(self.kind, self.slot, self.W, A, B, scale)


def gains_of(path: str, acting: Sequence[tuple[LooseFactor, float]], reading: Reading) -> tuple[list[Tensor], Tensor]:
    """The gain of each factor and the combined one, γ = 1 + Σ w(g − 1).   [docs/math.md (57)]

    Args:
        path: The site, for the message.
        acting: Factors with their weights.
        reading: The base there.

    Returns:
        Per factor its gain, (out, 1); and γ, (out,).

    Raises:
        AdapterError: The gains cancel, so that nothing is left of an output.
    """
    W = reading.W
    gains = []
    for factor, _ in acting:
        magnitude = factor.part("magnitude")
        if magnitude is None:
            gains.append(torch.ones(W.shape[0], dtype=W.dtype, device=W.device))
            continue
        norms = reading.norms(factor.A, factor.B, factor.scale)
        turned = magnitude.detach().to(W.dtype).flatten() / norms.clamp_min(torch.finfo(W.dtype).tiny)
        gains.append(torch.where(norms > 0, turned, 1.0))
    total = 1 + torch.stack([weight * (gain - 1) for gain, (_, weight) in zip(gains, acting, strict=True)]).sum(0)
    lost = int((total.abs() < SMALLEST).sum())
    if lost:
        raise AdapterError(
            f"At {path} the gains of these DoRA adapters cancel for {lost} outputs, which no DoRA adapter can do. "
            "Choose other weights."
        )
    return [gain[:, None] for gain in gains], total


def with_gains(
    product: Product, total: Tensor, reading: Reading, like: LooseFactor
) -> tuple[Product, tuple[str, Tensor]]:
    """The product and the magnitude with which DoRA does γ ⊙ W plus a sum of g ⊙ s·B·A.

    Args:
        product: That sum, at scale 1.
        total: γ, (out,).
        reading: The base there.
        like: A factor of this site.

    Returns:
        B'·A', and the magnitude's ending on disk with γ·‖W + B'·A'‖, (out,).
    """
    rows = total.view(product.B.shape[0], product.B.shape[1], 1).to(product.B.dtype)
    turned = Product(product.A, product.B / rows)
    held = like.holding(turned)
    magnitude = (total * reading.norms(held.A, held.B, 1.0)).to(held.A.dtype)
    return turned, (f".{MAGNITUDE}", magnitude.view(reading.kind.vector(reading.slot)))
