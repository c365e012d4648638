"""Find and weaken intruder dimensions: strong directions of W + ΔW that are nearly orthogonal to every direction of W.

They are associated with forgetting; weakening them restores part of what was forgotten, at some cost in the task.

Source: Shuttleworth et al. 2024, arXiv:2410.21228.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, Reading, padded, spectrum, stacked
from lorakit.core.operations.compatibility import check_no_base_biases
from lorakit.core.operations.tensor_sources import SiteFactors, weights_of_model
from lorakit.core.operations.writing import put, reader_of
from lorakit.core.variants import variants_of
from lorakit.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class SiteIntruders:
    """Intruder dimensions of one site, or of one of several experts in a parameter.

    Attributes:
        indices: Indices of the singular vectors of W + ΔW that are intruders, strongest first.
        cosines: For each intruder, the largest absolute cosine with a singular vector of W.
        energy_lost: Fraction of the weakened update's energy that truncation to the adapter's rank removes.
        expert: Index of the expert, or None if the site has only one weight matrix.
    """

    path: str
    indices: tuple[int, ...]
    cosines: tuple[float, ...]
    energy_lost: float
    expert: int | None = None


def reduce_intruders(
    model: nn.Module,
    adapter: str,
    name: str = "intruder_reduced",
    *,
    top: int = 10,
    threshold: float = 0.5,
    keep: float = 0.75,
) -> tuple[SiteIntruders, ...]:
    """Add a frozen, inactive copy of an adapter to the model, and return the intruder dimensions that the copy weakens.

    Of the `top` strongest directions, those are intruders whose absolute cosine with each direction of the base is
    below `threshold`; the fraction `keep` of each is kept. A ConfigError if `top` is below 1, an AdapterError if the
    update is not a low-rank product.
    """
    if top < 1:
        raise ConfigError.of("top", top, "an integer >= 1")
    weights = weights_of_model(model, adapter)
    check_no_base_biases(weights)
    variant = next((variant for variant in variants_of(weights.config) if not variant.is_low_rank), None)
    if variant is not None:
        text = f"{adapter} uses {variant.title}; intruder dimensions are only defined for low-rank updates."
        raise AdapterError(text, what=adapter, field=variant.field)
    read = reader_of(model)
    weakened: dict[str, SiteFactors] = {}
    sites = []
    with torch.no_grad():
        for path, factor in weights.factors.items():
            base = read(factor.names[0] if factor.names else path)
            weakened[path], here = _weakened(path, factor, base, (top, threshold, keep))
            sites += here
    put(model, dataclasses.replace(weights, factors=weakened), name)
    return tuple(sites)


def _weakened(
    path: str, factor: SiteFactors, base: Reading, how: tuple[int, float, float]
) -> tuple[SiteFactors, list[SiteIntruders]]:
    """Weaken the intruders of a factor, one matrix at a time; a factor without intruders stays unchanged."""
    if factor.shared > 1:
        raise AdapterError(
            f"{path} is a grouped convolution, for which intruder dimensions are not defined.", where=path
        )
    product, wide = factor.product(), torch.promote_types(factor.A.dtype, torch.float32)
    parts, sites = [], []
    for expert in range(factor.experts):
        part = Product(product.A[expert, None], product.B[expert, None])
        weaker, site = _of_matrix(path, part, factor.scale, base.matrix(expert).to(wide), how)
        parts.append(weaker)
        sites.append(dataclasses.replace(site, expert=expert if factor.experts > 1 else None))
    if not any(site.indices for site in sites):
        return factor, sites
    joined = Product(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts]))
    return factor.holding(joined, factor.scale), sites


def _of_matrix(
    path: str, product: Product, scale: float, W: Tensor, how: tuple[int, float, float]
) -> tuple[Product, SiteIntruders]:
    """Return ΔW + (keep − 1)·Σ u·σ·vᵀ over the intruders, truncated to the adapter's rank.   [docs/math.md (58)]

    Left singular vectors (output directions) are compared, regardless of how the base stores the weight.
    """
    top, threshold, keep = how
    delta = Product(product.A, product.B * scale)
    U0 = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + (delta.B[0] @ delta.A[0]).to(W.dtype), full_matrices=False)
    nearest = (U[:, :top].mT @ U0).abs().amax(1)
    chosen = torch.nonzero(nearest < threshold).flatten()
    if not chosen.numel():
        return product, SiteIntruders(path, (), (), 0.0)
    wide, rank = product.A.dtype, product.rank
    intruders = Product(Vh[chosen].to(wide)[None], (U[:, chosen] * S[chosen]).to(wide)[None])
    spread = spectrum(stacked([delta, intruders], [1.0, keep - 1.0]))
    root = spread.S[0, :rank].sqrt()
    weaker = Product(spread.Vh[:, :rank] * root[:, None], spread.U[:, :, :rank] * (root / scale))
    energy = spread.S.square()
    lost = float(energy[:, rank:].sum() / energy.sum())
    return padded(weaker, rank), SiteIntruders(path, tuple(chosen.tolist()), tuple(nearest[chosen].tolist()), lost)
