"""Compress an adapter to a lower rank, or convert any variant to plain LoRA, as closely as the rank allows.

Only the factors are used, and the energy lost at each site is exact. Experts in one parameter are truncated separately,
to a common rank that depends on their total energy.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, RankLimit, Reading, cut, dense_spectrum, spectrum, truncated
from lorakit.core.model.checks import check_allowances
from lorakit.core.operations.compatibility import check_no_base_biases, shared_facts
from lorakit.core.operations.tensor_sources import AdapterWeights, SiteFactors, weights_of_folder, weights_of_model
from lorakit.core.operations.writing import OperationReport, SiteOperation, common_targets, described, put, write
from lorakit.core.variants import NO_TENSORS, PLAIN, variants_of, without
from lorakit.errors import NotYetSupported


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
        raise NotYetSupported(
            f"{path}: {variant.title} on a grouped convolution cannot be converted to plain LoRA.", where=path
        )
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
    values, whole = dense_spectrum(delta, to.rank)
    product = truncated(values, to.of(values.S))
    kept = float(values.S[:, : product.A.shape[1]].double().square().sum())
    return product, whole**0.5, max(0.0, 1 - kept / whole) if whole else 0.0
