"""Find and weaken intruder dimensions: strong directions of W + ΔW that no direction of the base resembles.

Fine-tuning with LoRA puts singular vectors into the adapted weight that are nearly orthogonal to all of the base's own;
they go with forgetting. Weakening them gives some of what was forgotten back, at some cost in the task.

Source: Shuttleworth et al. 2024, arXiv:2410.21228.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.core.operations.gains import Reading
from lorakit.core.operations.joining import check_plain_parts
from lorakit.core.operations.loose import LooseFactor, loose_from_model
from lorakit.core.operations.lowrank import Product, factors_of, padded, product_of, spectrum, stacked
from lorakit.core.operations.placing import put, reader_of
from lorakit.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class SiteIntruders:
    """One site.

    Attributes:
        path: Where.
        indices: Which singular vectors of W + ΔW are intruders, counted from 0, strongest first.
        cosines: For each, the largest cosine with a singular vector of W, in absolute value.
        energy_lost: Share of the weakened update's energy that does not fit into the adapter's rank.
    """

    path: str
    indices: tuple[int, ...]
    cosines: tuple[float, ...]
    energy_lost: float


def reduce_intruders(
    model: nn.Module,
    adapter: str,
    name: str = "intruder_reduced",
    *,
    top: int = 10,
    threshold: float = 0.5,
    keep: float = 0.75,
) -> tuple[SiteIntruders, ...]:
    """Put a version of an adapter with weaker intruder dimensions on its model; it is frozen, and not active.

    Args:
        model: The adapted model.
        adapter: The adapter, which stays.
        name: The new adapter's name; its ranks and scales are the old one's.
        top: So many of the strongest directions are looked at.
        threshold: An intruder's cosine with every direction of the base is below this.
        keep: The share of each intruder that stays; 1 changes nothing, 0 takes it out.

    Returns:
        What was found at each site.

    Raises:
        AdapterError: There is no such adapter, it is DoRA, or the new name is taken.
        ConfigError: `top` is below 1, or the adapter trains biases of the base.
    """
    if top < 1:
        raise ConfigError(f"top is {top!r}; it must be a whole number of at least 1.")
    loose = loose_from_model(model, adapter)
    check_plain_parts(loose)
    if loose.config.use_dora:
        raise AdapterError(f"{adapter} is DoRA; intruder dimensions are defined for plain LoRA.")
    read = reader_of(model)
    found: dict[str, LooseFactor] = {}
    sites = []
    with torch.no_grad():
        for path, factor in loose.factors.items():
            found[path], site = _weakened(path, factor, read(path), top, threshold, keep)
            sites.append(site)
    put(model, dataclasses.replace(loose, factors=found), name)
    return tuple(sites)


def _weakened(
    path: str, factor: LooseFactor, base: Reading, top: int, threshold: float, keep: float
) -> tuple[LooseFactor, SiteIntruders]:
    """ΔW + (keep − 1)·Σ u·σ·vᵀ over the intruders, cut to the adapter's rank.   [docs/math.md (58)]

    The directions are those of the outputs, whatever way the base stores the weight.
    """
    product = product_of(factor.A, factor.B)
    if product.A.shape[0] > 1:
        raise AdapterError(f"{path} is a grouped convolution, whose intruder dimensions are not defined.")
    delta = Product(product.A, product.B * factor.scale)
    W = base.kind.flat_weight(base.slot, base.W).to(torch.promote_types(factor.A.dtype, torch.float32))
    U0 = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + (delta.B[0] @ delta.A[0]).to(W.dtype), full_matrices=False)
    nearest = (U[:, :top].mT @ U0).abs().amax(1)
    chosen = torch.nonzero(nearest < threshold).flatten()
    if not chosen.numel():
        return factor, SiteIntruders(path, (), (), 0.0)
    wide = product.A.dtype
    intruders = Product(Vh[chosen].to(wide)[None], (U[:, chosen] * S[chosen]).to(wide)[None])
    spread = spectrum(stacked([delta, intruders], [1.0, keep - 1.0]))
    root = spread.S[0, : factor.r].sqrt()
    part = Product(spread.Vh[:, : factor.r] * root[:, None], spread.U[:, :, : factor.r] * (root / factor.scale))
    A, B = factors_of(padded(part, factor.r), factor.A, factor.B)
    energy = spread.S.square()
    lost = float(energy[:, factor.r :].sum() / energy.sum())
    told = (tuple(chosen.tolist()), tuple(nearest[chosen].tolist()))
    return dataclasses.replace(factor, A=A, B=B), SiteIntruders(path, *told, lost)
