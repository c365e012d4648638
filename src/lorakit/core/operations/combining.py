"""Combine adapters into one: weighted sums, differences and means, with PEFT's eleven combination types.

At each site, the effects weight · scale · B·A are combined, for experts separately. The result has scale 1 everywhere,
so its effect is exactly the combination, whatever the ranks, alphas and rsLoRA settings. A variant whose update is more
than B·A defines how such updates are added (`Variant.combine`), which needs the base model. Other variants are first
reduced to A and B (`Variant.factors`), and their sum is plain LoRA.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, Reading, Spectrum, padded, spectrum, stacked, truncated
from lorakit.core.model.checks import check_allowances
from lorakit.core.model.index import AdapterIndex
from lorakit.core.operations.combination_types import CombinationType, added_up, check_same_rows, clamped, combined_rows
from lorakit.core.operations.compatibility import check_joinable, check_one_base, joined_config, shared_facts
from lorakit.core.operations.tensor_sources import AdapterWeights, SiteFactors, weights_of_folder, weights_of_model
from lorakit.core.operations.writing import (
    OperationReport,
    SiteOperation,
    aligned,
    common_targets,
    described,
    put,
    reader_of,
    write,
)
from lorakit.core.variants import NO_TENSORS, PLAIN, Addend, Variant, is_kept, variants_of
from lorakit.durable import JsonObject
from lorakit.errors import AdapterError, ConfigError


def combine(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str = "combined",
    *,
    way: CombinationType | str = "svd",
) -> OperationReport:
    """Combine adapters of a model into a frozen, inactive one, and report each site's deviation from the weighted sum.

    A negative weight subtracts an adapter, and a weight of 0 leaves it out. The name of a type stands for its defaults.
    An AdapterError if the adapters cannot be combined, a ConfigError if the type does not support their ranks.
    """
    way = CombinationType(way) if isinstance(way, str) else way
    sources = [weights_of_model(model, adapter) for adapter in adapters]
    result, sites = combine_weights(sources, weights, way, model)
    put(model, result, name)
    return OperationReport(name, result.config, sites, dict(result.facts))


def combine_folders(
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    output: str | os.PathLike[str],
    *,
    way: CombinationType | str = "svd",
    model: nn.Module | None = None,
    allow: Collection[str] = (),
) -> OperationReport:
    """Combine adapters on disk, write the result to a new directory, and report as `combine` does.

    The base model is needed only for trainable tokens and for variants whose sum depends on it. `allow` can hold
    "base_mismatch", "key_mismatch" (no sites in common) and "nonfinite".

    Raises:
        BaseMismatchError: The adapters were trained on different base models or for different tasks.
        AdapterError: The adapters cannot be combined, or one has no sites in common with any other.
    """
    check_allowances(allow)
    way = CombinationType(way) if isinstance(way, str) else way
    sources = [weights_of_folder(folder, allow) for folder in folders]
    check_one_base(sources, allow)
    result, sites = combine_weights(sources, weights, way, model)
    for source in sources:
        source.report()
    write(result, output, allow=allow)
    return OperationReport(str(output), result.config, sites, dict(result.facts))


def average(
    model: nn.Module, adapters: Sequence[str], name: str = "average", *, way: CombinationType | str = "svd"
) -> OperationReport:
    """Average adapters by calling `combine` with equal weights that add up to 1."""
    return combine(model, adapters, [1 / max(1, len(adapters))] * len(adapters), name, way=way)


def subtract(model: nn.Module, adapter: str, other: str, name: str = "difference") -> OperationReport:
    """Subtract `other` from `adapter` exactly; the rank of the difference is the sum of the two ranks."""
    return combine(model, [adapter, other], [1.0, -1.0], name, way="cat")


def rescale(model: nn.Module, adapter: str, weight: float, name: str = "rescaled") -> OperationReport:
    """Multiply the effect of an adapter by a weight, without approximation."""
    return combine(model, [adapter], [weight], name, way="cat")


def combine_weights(
    adapters: Sequence[AdapterWeights], weights: Sequence[float], way: CombinationType, model: nn.Module | None = None
) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    """Combine adapters of the same base model, and return each site's deviation from the exact weighted sum too.

    The base model is needed only for trainable tokens and for variants whose sum depends on it.
    """
    check_joinable(adapters)
    check_same_rows(adapters)
    _check_weights(adapters, weights)
    index = None if model is None else AdapterIndex.of(model)
    reading = None if index is None else reader_of(index)
    variant = _summed_variant(adapters, way, reading is not None)
    joined = joined_config([adapter.config for adapter in adapters])
    generator = None if way.seed is None else torch.Generator().manual_seed(way.seed)
    combined, sites = {}, []
    for path, factors in aligned(adapters).items():
        here = [(factor, weight) for factor, weight in zip(factors, weights, strict=True) if factor is not None]
        summed = (variant, reading(path)) if variant is not None and reading is not None else None
        with torch.no_grad():
            factor_of_sum, site = _site(path, here, way, generator, summed)
            combined[path] = _with_bias(factor_of_sum, here) if joined.lora_bias else factor_of_sum
        sites.append(site)
    config, combined = described(joined, combined, common_targets(adapters))
    others = {name: tensor for adapter in adapters for name, tensor in adapter.others.items()}
    others |= combined_rows(adapters, weights, index)
    known = next((adapter.base for adapter in adapters if adapter.base is not None), None)
    facts = {**shared_facts(adapters), "operation": _operation(adapters, weights, way)}
    return AdapterWeights("", config, combined, others, known, facts), tuple(sites)


Weighted = Sequence[tuple[SiteFactors, float]]
"""The adapters' factors at one site, each with its adapter's weight."""


def _site(
    path: str,
    here: Weighted,
    way: CombinationType,
    generator: torch.Generator | None,
    summed: tuple[Variant, Reading] | None,
) -> tuple[SiteFactors, SiteOperation]:
    """Return a site's combined factor, with scale 1 and no bias, and its deviation from the exact weighted sum."""
    first = here[0][0]
    active = [(factor, weight) for factor, weight in here if weight != 0] or [(first, 0.0)]
    whole, products = None, [factor.product() for factor, _ in active]
    if summed is not None and callable(summed[0].combine):
        pairs = zip(active, products, strict=True)
        addends = [Addend(factor, weight, product, factor.experts) for (factor, weight), product in pairs]
        whole = summed[0].combine(path, addends, summed[1])
        products = list(whole.products)
    exact = stacked(products, [weight * factor.scale for factor, weight in active])
    exact_spectrum = spectrum(exact)
    if way.name == "cat":
        product, distance = exact, 0.0
    elif way.name == "svd" and way.clamp is None:
        rank = _rank(path, active, way)
        product = padded(exact if exact.rank <= rank else truncated(exact_spectrum, rank), rank)
        distance = float(exact_spectrum.S[:, rank:].norm())
    else:
        make = _decomposed if way.decomposes else _separate
        parts = [make(path, part, active, way, generator) for part in _by_expert(products, first.experts)]
        product = Product(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts]))
        distance = float(spectrum(stacked([product, exact], [1.0, -1.0])).S.norm())
    norm = float(exact_spectrum.S.norm())
    extras: Mapping[str, Tensor] = {}
    if whole is not None:
        product, extras = whole.finish(product)
    combined = dataclasses.replace(first.holding(product), bias=None)
    if summed is not None:
        combined = combined.of_variant(summed[0], extras)
    elif not is_kept(combined.variant):
        combined = combined.of_variant(PLAIN, NO_TENSORS)
    return combined, SiteOperation(path, combined.r, exact.rank * first.shared, norm, distance / norm if norm else 0.0)


def _by_expert(products: Sequence[Product], experts: int) -> Iterator[list[Product]]:
    """Yield the products of one expert at a time, or of all groups at once if there are no experts."""
    wide = products[0].A.shape[0] // experts
    for first in range(0, wide * experts, wide):
        yield [Product(p.A[first : first + wide], p.B[first : first + wide]) for p in products]


def _rank(path: str, active: Weighted, way: CombinationType) -> int:
    """Return the rank of each group in the result, for a type with "svd" in its name."""
    groups = active[0][0].shared
    rank = way.rank if way.rank is not None else max(factor.r for factor, _ in active)
    if rank % groups:
        text = f"{path} is a grouped convolution: the rank must be a multiple of {groups}, but is {rank}."
        raise ConfigError(text, what=rank, where=path, field="rank")
    return rank // groups


def _decomposed(
    path: str, products: Sequence[Product], active: Weighted, way: CombinationType, generator: torch.Generator | None
) -> Product:
    """Apply a type with "svd" in its name; only the types that prune need dense updates."""
    rank = _rank(path, active, way)
    if not way.prunes:
        product = truncated(spectrum(stacked(products, [weight * factor.scale for factor, weight in active])), rank)
    else:
        dtype = torch.promote_types(active[0][0].A.dtype, torch.float32)
        deltas = [(p.B @ p.A * factor.scale).to(dtype) for p, (factor, _) in zip(products, active, strict=True)]
        dense = added_up(deltas, [weight for _, weight in active], way, generator)
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False, driver=way.driver if dense.is_cuda else None)
        narrow, wide = truncated(Spectrum(U, S, Vh), rank), products[0].A.dtype
        product = Product(narrow.A.to(wide), narrow.B.to(wide))
    if way.clamp is not None:
        product = Product(*clamped(product.A, product.B, way.clamp))
    return padded(product, rank)


def _separate(
    path: str, products: Sequence[Product], active: Weighted, way: CombinationType, generator: torch.Generator | None
) -> Product:
    """Apply a type without "svd" in its name to A and B separately.

    A and B are both scaled by √|weight|, and A is also multiplied by the sign of the weight.
    """
    ranks = sorted({factor.r for factor, _ in active})
    if len(ranks) > 1:
        text = (
            f"{path} has ranks {' and '.join(map(str, ranks))}: all adapters must have the same r value at a site for "
            f"{way.name!r}. Use 'cat' or a type with 'svd'."
        )
        raise ConfigError(text, what=way.name, where=path, field="combination_type")
    weights = [weight * factor.scale for factor, weight in active]
    roots = [abs(weight) ** 0.5 for weight in weights]
    signed = [root if weight >= 0 else -root for root, weight in zip(roots, weights, strict=True)]
    A = added_up([product.A for product in products], signed, way, generator)
    return Product(A, added_up([product.B for product in products], roots, way, generator))


def _with_bias(factor: SiteFactors, here: Weighted) -> SiteFactors:
    """Return a combined factor with the weighted sum of the biases at its site; zeros if there are none to add."""
    scaled = [f.bias * (weight * f.scale) for f, weight in here if weight != 0 and f.bias is not None]
    return dataclasses.replace(
        factor, bias=torch.stack(scaled).sum(0) if scaled else factor.B.new_zeros(factor.B.shape[0])
    )


def _check_weights(adapters: Sequence[AdapterWeights], weights: Sequence[float]) -> None:
    if len(adapters) != len(weights):
        message = f"Pass one weight per adapter (adapters: {len(adapters)}, weights: {len(weights)})."
        raise AdapterError(message, field="weights")
    for weight in weights:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise AdapterError(f"A weight is {weight!r}; it must be a finite number.", what=weight, field="weights")


SUMS = ("cat", "svd")
"""Combination types that only add up the updates; "svd" also truncates the sum."""


def _summed_variant(adapters: Sequence[AdapterWeights], way: CombinationType, has_base: bool) -> Variant | None:
    """Return the variant that defines how updates are added, or None; check that it supports the combination type."""
    labels: dict[Variant, str] = {}
    for adapter in adapters:
        for variant in variants_of(adapter.config):
            if callable(variant.combine):
                labels.setdefault(variant, adapter.label)
    if len(labels) > 1:
        (one, other), (label, second, *_) = list(labels)[:2], labels.values()
        text = f"{label} uses {one.title} and {second} uses {other.title}; these variants cannot be combined."
        raise AdapterError(text, what=second, field=other.field)
    for variant, label in labels.items():
        if not has_base:
            text = f"{label} uses {variant.title}, whose effect depends on the base weights. Pass the base model too."
            raise AdapterError(text, what=label, field=variant.field)
        if way.name not in SUMS:
            text = f"{label} uses {variant.title}, and allows only {' and '.join(map(repr, SUMS))}, not {way.name!r}."
            raise AdapterError(text, what=way.name, field="combination_type", allowed=SUMS)
    return next(iter(labels), None)


def _operation(adapters: Sequence[AdapterWeights], weights: Sequence[float], way: CombinationType) -> JsonObject:
    """Return a record of how a combination was made, for `lorakit.json`."""
    settings = {key: value for key, value in dataclasses.asdict(way).items() if value is not None and key != "name"}
    if not way.elects:
        settings.pop("majority_sign")
    of = [{**adapter.origin(), "weight": weight} for adapter, weight in zip(adapters, weights, strict=True)]
    return {"name": "combine", "way": way.name, **settings, "of": of}
