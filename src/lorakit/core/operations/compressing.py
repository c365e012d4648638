"""Compress an adapter to a lower rank, exactly, from its factors; turn any variant into plain LoRA, nearly.

No dense weight is made for plain LoRA. What is lost is known exactly, and said site by site. Experts that lie in one
parameter are cut each by itself to one common rank, for which their share of the energy is taken together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, RankLimit, Reading, cut, dense_spectrum, spectrum, truncated
from lorakit.core.model.checks import check_allowances
from lorakit.core.operations.compatibility import check_plain_parts, shared_facts
from lorakit.core.operations.tensor_sources import AdapterWeights, SiteFactors, weights_of_folder, weights_of_model
from lorakit.core.operations.writing import OperationReport, SiteOperation, common_targets, described, put, write
from lorakit.core.variants import NO_TENSORS, PLAIN, variants_of, without
from lorakit.errors import NotYetSupported


def compress(
    model: nn.Module,
    adapter: str,
    name: str = "compressed",
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> OperationReport:
    """Put a smaller version of an adapter on its model; it is frozen, and not active.

    Args:
        model: The adapted model.
        adapter: The adapter, which stays.
        name: The new adapter's name.
        rank: Largest rank of a site.
        energy: Or the share of each site's energy that must stay, in (0, 1].

    Returns:
        What was lost where.

    Raises:
        AdapterError: There is no such adapter, or the new name is taken.
        ConfigError: Rank and energy are both given or both missing, or out of range.
    """
    result, sites = compress_weights(weights_of_model(model, adapter), RankLimit(rank, energy))
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
    """Write a smaller version of an adapter on disk; its base is not needed.

    Args:
        folder: The adapter.
        output: The folder to make; nothing may stand there.
        rank: As `compress`.
        energy: As `compress`.
        allow: Refusals to lift: "nonfinite".

    Returns:
        What was lost where.

    Raises:
        AdapterFileError: The folder is no adapter, or is damaged.
        ConfigError: As `compress`, or a word in `allow` is unknown.
        DiskError: The folder cannot be written.
    """
    check_allowances(allow)
    source = weights_of_folder(folder, allow)
    result, sites = compress_weights(source, RankLimit(rank, energy))
    source.report()
    write(result, output, allow=allow)
    return OperationReport(str(output), result.config, sites, dict(result.facts))


def compress_weights(adapter: AdapterWeights, to: RankLimit) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    """Compress an adapter wherever it comes from. Own tensors of a variant that fit any rank stay as they are.

    Args:
        adapter: The adapter.
        to: How far.

    Returns:
        The smaller one, with scale 1, and what was lost where.
    """
    return _reduced(adapter, to, "compress", lambda path, factor: None)


def plain_weights(
    adapter: AdapterWeights, to: RankLimit, reading: Callable[[str], Reading]
) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    """Turn an adapter of any variant into plain LoRA of scale 1; an update of full rank is decomposed whole.

    Args:
        adapter: The adapter.
        to: Its rank or share of energy; plain sites are compressed.
        reading: Path -> the base's weight there; only asked where an update is more than a product of low rank.

    Returns:
        The plain adapter, and what was lost where.

    Raises:
        ConfigError: It trains biases of the base.
        NotYetSupported: Such an update of a grouped convolution.
    """
    check_plain_parts(adapter)

    def update(path: str, factor: SiteFactors) -> Tensor | None:
        variant = factor.variant
        if variant.update is None or variant.is_low_rank:
            return None
        product = factor.product()
        if product.A.shape[0] > 1:
            raise NotYetSupported(
                f"{path} is a grouped convolution, whose {variant.title} cannot be turned into plain LoRA.", where=path
            )
        base = reading(path)
        W, held = base.W, factor.factor()
        A, B, own = (held.A.to(W.dtype), held.B.to(W.dtype), {name: t.to(W.dtype) for name, t in held.own.items()})
        wide = dataclasses.replace(held, A=A, B=B, own=own)
        delta = (factor.scale * (product.B @ product.A)[0]).view_as(W)
        return variant.update(base.kind, base.slot, W, delta, wide).flatten(1).float()

    result, sites = _reduced(adapter, to, "convert", update)
    return result, sites


def _reduced(
    adapter: AdapterWeights, to: RankLimit, operation: str, update: Callable[[str, SiteFactors], Tensor | None]
) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    found: dict[str, SiteFactors] = {}
    sites = []
    with torch.no_grad():
        for path, factor in adapter.factors.items():
            dense = update(path, factor)
            product, norm, lost = _cut_factor(factor, to) if dense is None else _cut_dense(dense, to)
            made = (factor if dense is None else factor.of_variant(PLAIN, NO_TENSORS)).holding(product)
            others = dict(made.others)
            if "bias" in others:  # part of what the scale multiplies, which is 1 from now on
                others["bias"] = (others["bias"][0], others["bias"][1] * factor.scale)
            found[path] = dataclasses.replace(made, others=others)
            sites.append(SiteOperation(path, found[path].r, factor.r, norm, lost**0.5))
    left = {factor.variant for factor in found.values()}
    gone = [variant for variant in variants_of(adapter.config) if variant not in left]
    config, found = described(without(adapter.config, *gone), found, common_targets([adapter]))
    limit = {"rank": to.rank} if to.rank is not None else {"energy": to.energy}
    facts = {**shared_facts([adapter]), "operation": {"name": operation, **limit, "of": [adapter.origin()]}}
    return dataclasses.replace(adapter, config=config, factors=found, facts=facts, sha256=""), tuple(sites)


def _cut_factor(factor: SiteFactors, to: RankLimit) -> tuple[Product, float, float]:
    product = factor.product()
    found = spectrum(Product(product.A, product.B * factor.scale))
    smaller, lost = cut(found, to, factor.shared)
    return smaller, float(found.S.norm()), lost


def _cut_dense(delta: Tensor, to: RankLimit) -> tuple[Product, float, float]:
    found, whole = dense_spectrum(delta, to.rank)
    product = truncated(found, to.of(found.S))
    kept = float(found.S[:, : product.A.shape[1]].double().square().sum())
    return product, whole**0.5, max(0.0, 1 - kept / whole) if whole else 0.0
