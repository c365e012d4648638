"""Reduce an adapter: compress it to a lower rank, convert any variant to plain LoRA, or weaken its intruder dimensions.

The energy lost at each site is exact. Experts in one parameter are truncated separately, to a common rank that depends
on their total energy. Intruder dimensions are strong directions of W + ΔW that are nearly orthogonal to every direction
of W. They are associated with forgetting; weakening them restores part of what was forgotten, at some cost in the task.

Source of intruder dimensions: Shuttleworth et al. 2024, arXiv:2410.21228.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, RankLimit, Reading, cut, cut_dense, padded, spectrum, stacked
from lorakit.core.model.checks import check_allowances
from lorakit.core.operations.compatibility import check_no_base_biases, shared_facts
from lorakit.core.operations.tensor_sources import AdapterWeights, SiteFactors, weights_of_folder, weights_of_model
from lorakit.core.operations.writing import (
    OperationReport,
    SiteOperation,
    common_targets,
    described,
    put,
    reader_of,
    write,
)
from lorakit.core.variants import NO_TENSORS, PLAIN, variants_of, without
from lorakit.errors import AdapterError, ConfigError, NotYetSupported


def compress(
    model: nn.Module, adapter: str, name: str = "compressed", *, rank: int | None = None, energy: float | None = None
) -> OperationReport:
    """Compress an adapter to a frozen, inactive adapter; the report states the energy lost at each site.

    `rank` is the maximum rank of a site; `energy`, its alternative, the fraction of each site's energy to keep, in (0,
    1].
    """
    result, sites = reduced_weights(weights_of_model(model, adapter), RankLimit(rank, energy))
    put(model, result, name)
    return OperationReport(name, result.config, sites, dict(result.facts))


def compress_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    allow: Collection[str] = (),
) -> OperationReport:
    """Compress an adapter on disk to a new directory, as `compress` does; the base model is not needed.

    `allow` can hold "nonfinite".
    """
    check_allowances(allow)
    source = weights_of_folder(folder, allow)
    result, sites = reduced_weights(source, RankLimit(rank, energy))
    source.report()
    write(result, output, allow=allow)
    return OperationReport(str(output), result.config, sites, dict(result.facts))


def plain_weights(
    adapter: AdapterWeights, to: RankLimit, reading: Callable[[str], Reading]
) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    """Convert an adapter of any variant to plain LoRA with scale 1, and return the energy lost at each site too.

    Full-rank updates are decomposed, and read the base; a NotYetSupported for those of grouped convolutions. `to`
    limits the rank of sites that are plain LoRA too.
    """
    check_no_base_biases(adapter)
    return reduced_weights(adapter, to, reading)


def reduced_weights(
    adapter: AdapterWeights, to: RankLimit, reading: Callable[[str], Reading] | None = None
) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    """Reduce the rank of an adapter, and return the result, with scale 1, and the energy lost at each site.

    A variant's extra tensors are kept if they do not depend on the rank. With `reading`, every update is converted to
    plain LoRA, as by `plain_weights`.
    """
    factors: dict[str, SiteFactors] = {}
    sites = []
    with torch.no_grad():
        for path, factor in adapter.factors.items():
            dense = None if reading is None else _dense_update(path, factor, reading)
            product, norm, lost = _cut_factor(factor, to) if dense is None else _cut_dense(dense, to)
            reduced = (factor if dense is None else factor.of_variant(PLAIN, NO_TENSORS)).holding(product)
            if reduced.bias is not None:  # the old scale also applied to the bias; the new scale is 1
                reduced.bias = reduced.bias * factor.scale
            factors[path] = reduced
            sites.append(SiteOperation(path, factors[path].r, factor.r, norm, lost**0.5))
    left = {factor.variant for factor in factors.values()}
    gone = [variant for variant in variants_of(adapter.config) if variant not in left]
    config, factors = described(without(adapter.config, *gone), factors, common_targets([adapter]))
    limit = {"rank": to.rank} if to.rank is not None else {"energy": to.energy}
    operation = {"name": "compress" if reading is None else "convert", **limit, "of": [adapter.origin()]}
    facts = {**shared_facts([adapter]), "operation": operation}
    return dataclasses.replace(adapter, config=config, factors=factors, facts=facts, sha256=""), tuple(sites)


def _dense_update(path: str, factor: SiteFactors, reading: Callable[[str], Reading]) -> Tensor | None:
    """Return the full weight update of a site, (out, n), or None if the update is a low-rank product."""
    variant = factor.variant
    if isinstance(variant.update, str) or variant.is_low_rank:
        return None
    product = factor.product()
    if product.A.shape[0] > 1:
        text = f"{path}: {variant.title} on a grouped convolution cannot be converted to plain LoRA."
        raise NotYetSupported(text, where=path)
    base = reading(path)
    W = base.W
    extras = {name: tensor.to(W.dtype) for name, tensor in factor.own.items()}
    wide = dataclasses.replace(factor, A=factor.A.to(W.dtype), B=factor.B.to(W.dtype), own=extras)
    delta = (factor.scale * (product.B @ product.A)[0]).view_as(W)
    return variant.update(base.kind, base.spec, W, delta, wide).flatten(1).float()


def _cut_factor(factor: SiteFactors, to: RankLimit) -> tuple[Product, float, float]:
    """Return the truncated form of a factor, the norm of its update, and the fraction of the energy lost."""
    values = spectrum(factor.scaled_product())
    smaller, lost = cut(values, to, factor.shared)
    return smaller, float(values.S.norm()), lost


def _cut_dense(delta: Tensor, to: RankLimit) -> tuple[Product, float, float]:
    """Return the truncated form of an update (out, n), the norm of the update, and the fraction of the energy lost."""
    product, whole, kept = cut_dense(delta, to)
    return product, whole**0.5, max(0.0, 1 - kept / whole) if whole else 0.0


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
        text = f"{path} is a grouped convolution, for which intruder dimensions are not defined."
        raise AdapterError(text, where=path)
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
