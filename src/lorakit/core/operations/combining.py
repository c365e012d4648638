"""Combine adapters into one: weighted sums, differences, means, in the field's eleven ways.

What is combined is each adapter's effect, weight · scale · B·A, site by site; the result has scale 1 everywhere, so its
effect is what was combined and nothing else, whatever ranks, alphas and rsLoRA the adapters had. No dense product is
made where factors suffice. A variant whose update is more than that says how such updates add up (`Variant.combine`),
which needs the base; the factors of other variants are multiplied, and their sum is plain LoRA. Experts that
lie in one parameter are combined each by itself, as if each were a site.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, Reading, padded, spectrum, stacked, truncated
from lorakit.core.model.checks import check_allowances
from lorakit.core.operations.combination_types import (
    CombinationType,
    RowReading,
    added_up,
    check_same_rows,
    clamped,
    combined_rows,
    row_reader,
)
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
from lorakit.core.variants import Variant, variants_of
from lorakit.errors import AdapterError, ConfigError


def combine(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str = "combined",
    *,
    way: CombinationType | str = "svd",
) -> OperationReport:
    """Put a weighted combination of adapters on their model, as a new adapter; it is frozen, and not active.

    Args:
        model: The adapted model.
        adapters: Their names.
        weights: One number each; negative ones subtract, 0 leaves an adapter out.
        name: The new adapter's name.
        way: How; a bare word is that way with its defaults.

    Returns:
        What was made, with how far each site is from the plain sum.

    Raises:
        AdapterError: There is no such adapter, the new name is taken, or the adapters cannot be combined.
        ConfigError: The way does not exist or lacks something, or the ranks do not fit it.
    """
    way = CombinationType(way) if isinstance(way, str) else way
    sources = [weights_of_model(model, adapter) for adapter in adapters]
    result, sites = combine_weights(sources, weights, way, reader_of(model), row_reader(model))
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
    """Combine adapters on disk into a new folder; the base is needed for some variants and for rows of tokens.

    Args:
        folders: Their folders.
        weights: One number each.
        output: The folder to make; nothing may stand there.
        way: How.
        model: The base, for variants that read it and for rows of tokens.
        allow: Checks to override: "base_mismatch", "key_mismatch" (no common site), "nonfinite".

    Returns:
        What was written.

    Raises:
        AdapterFileError: A folder is no adapter, or is damaged.
        BaseMismatchError: They were made on different bases, or for different tasks.
        AdapterError: They cannot be combined, or one has no site in common with any other.
        ConfigError: As `combine`, or a word in `allow` is unknown.
        DiskError: The folder cannot be written.
    """
    check_allowances(allow)
    way = CombinationType(way) if isinstance(way, str) else way
    sources = [weights_of_folder(folder, allow) for folder in folders]
    check_one_base(sources, allow)
    base = (None, None) if model is None else (reader_of(model), row_reader(model))
    result, sites = combine_weights(sources, weights, way, *base)
    for source in sources:
        source.report()
    write(result, output, allow=allow)
    return OperationReport(str(output), result.config, sites, dict(result.facts))


def average(
    model: nn.Module, adapters: Sequence[str], name: str = "average", *, way: CombinationType | str = "svd"
) -> OperationReport:
    """The mean of adapters; `combine` with equal weights that add up to 1.

    Raises:
        AdapterError: As `combine`, or none was named.
    """
    return combine(model, adapters, [1 / max(1, len(adapters))] * len(adapters), name, way=way)


def subtract(model: nn.Module, adapter: str, other: str, name: str = "difference") -> OperationReport:
    """What one adapter has beyond another, exactly; its rank is the sum of theirs.

    Raises:
        AdapterError: As `combine`.
    """
    return combine(model, [adapter, other], [1.0, -1.0], name, way="cat")


def rescale(model: nn.Module, adapter: str, weight: float, name: str = "rescaled") -> OperationReport:
    """An adapter with another strength, exactly.

    Raises:
        AdapterError: As `combine`.
    """
    return combine(model, [adapter], [weight], name, way="cat")


def combine_weights(
    adapters: Sequence[AdapterWeights],
    weights: Sequence[float],
    way: CombinationType,
    reading: Callable[[str], Reading] | None = None,
    rows: RowReading | None = None,
) -> tuple[AdapterWeights, tuple[SiteOperation, ...]]:
    """Combine adapters wherever they come from.

    Args:
        adapters: Of one base.
        weights: One number each.
        way: How.
        reading: Path -> the base's weight there; only asked where the sum is of a variant that reads it.
        rows: How to read rows of the base's tables; only asked where adapters train the same rows.

    Returns:
        The result, and how far each site is from the plain sum.

    Raises:
        AdapterError: They cannot be combined, or numbers and adapters are not equally many.
        ConfigError: The ranks do not fit the way.
    """
    check_joinable(adapters)
    check_same_rows(adapters)
    _check(adapters, weights, way, reading is not None)
    summed = next(iter(_summed(adapters)), None)
    generator, found, sites = way.generator(), {}, []
    for path, factors in aligned(adapters).items():
        here = [(factor, weight) for factor, weight in zip(factors, weights, strict=True) if factor is not None]
        with torch.no_grad():
            found[path], site = _site(
                path, here, way, generator, (summed, reading(path)) if summed and reading else None
            )
        sites.append(site)
    joined = joined_config([a.config for a in adapters])
    if joined.lora_bias:
        found = {path: _with_bias(factor) for path, factor in found.items()}
    config, found = described(joined, found, common_targets(adapters))
    others = {name: tensor for adapter in adapters for name, tensor in adapter.others.items()}
    others |= combined_rows(adapters, weights, rows)
    known = next((adapter.base for adapter in adapters if adapter.base is not None), None)
    facts = {**shared_facts(adapters), "operation": _operation(adapters, weights, way)}
    return AdapterWeights("", config, found, others, known, facts), tuple(sites)


def _site(
    path: str,
    here: Sequence[tuple[SiteFactors, float]],
    way: CombinationType,
    generator: torch.Generator | None,
    summed: tuple[Variant, Reading] | None,
) -> tuple[SiteFactors, SiteOperation]:
    """The combined factor of one site, with scale 1, and how far it is from the plain sum."""
    _check_shapes(path, [factor for factor, _ in here])
    first = here[0][0]
    acting = [(factor, weight) for factor, weight in here if weight != 0]
    acting = acting or [(first, 0.0)]
    whole, products = None, [factor.product() for factor, _ in acting]
    if summed is not None and summed[0].combine is not None:
        whole = summed[0].combine(path, [factor.addend(weight) for factor, weight in acting], summed[1])
        products = list(whole.products)
    exact = stacked(products, [weight * factor.scale for factor, weight in acting])
    found = spectrum(exact)
    if way.name == "cat":
        product, apart = exact, 0.0
    elif way.name == "svd" and way.clamp is None:
        rank = _rank(path, acting, way)
        product = padded(exact if exact.rank <= rank else truncated(found, rank), rank)
        apart = float(found.S[:, rank:].norm())
    else:
        make = _decomposed if way.decomposes else _by_themselves
        parts = _by_expert(products, first.experts)
        product = _side_by_side([make(path, part, acting, way, generator) for part in parts])
        apart = float(spectrum(stacked([product, exact], [1.0, -1.0])).S.norm())
    norm = float(found.S.norm())
    own: Mapping[str, Tensor] = {}
    if whole is not None:
        product, own = whole.finish(product)
    made = dataclasses.replace(first.holding(product), others=_biases(acting))
    if summed is not None:
        made = made.of_variant(summed[0], own)
    return made, SiteOperation(path, made.r, exact.rank * first.shared, norm, apart / norm if norm else 0.0)


def _by_expert(products: Sequence[Product], experts: int) -> Iterator[list[Product]]:
    """The products of each expert by itself, one expert after the other; all groups together where there is one."""
    wide = products[0].A.shape[0] // experts
    for first in range(0, wide * experts, wide):
        yield [Product(p.A[first : first + wide], p.B[first : first + wide]) for p in products]


def _side_by_side(products: Sequence[Product]) -> Product:
    return Product(torch.cat([p.A for p in products]), torch.cat([p.B for p in products]))


def _rank(path: str, acting: Sequence[tuple[SiteFactors, float]], way: CombinationType) -> int:
    """The rank of each group that a way with "svd" gives."""
    groups = acting[0][0].shared
    asked = way.rank if way.rank is not None else max(factor.r for factor, _ in acting)
    if asked % groups:
        raise ConfigError(f"{path} is a grouped convolution: its rank must be a multiple of {groups}, and is {asked}.")
    return asked // groups


def _decomposed(
    path: str,
    products: Sequence[Product],
    acting: Sequence[tuple[SiteFactors, float]],
    way: CombinationType,
    generator: torch.Generator | None,
) -> Product:
    """Ways with "svd": of the sum, from factors; of pruned updates, from the dense update, which they are made of."""
    rank = _rank(path, acting, way)
    if not way.prunes:
        product = truncated(spectrum(stacked(products, [weight * factor.scale for factor, weight in acting])), rank)
    else:
        dtype = torch.promote_types(acting[0][0].A.dtype, torch.float32)
        deltas = [(p.B @ p.A * factor.scale).to(dtype) for p, (factor, _) in zip(products, acting, strict=True)]
        dense = added_up(deltas, [weight for _, weight in acting], way, generator)
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False, driver=way.driver if dense.is_cuda else None)
        wide = products[0].A.dtype
        product = Product(Vh[:, :rank].to(wide), (U[:, :, :rank] * S[:, None, :rank]).to(wide))
    if way.clamp is not None:
        product = Product(*clamped(product.A, product.B, way.clamp))
    return padded(product, rank)


def _by_themselves(
    path: str,
    products: Sequence[Product],
    acting: Sequence[tuple[SiteFactors, float]],
    way: CombinationType,
    generator: torch.Generator | None,
) -> Product:
    """Ways without "svd": on A and on B by themselves, each with the root of the weight, the sign on A."""
    ranks = sorted({factor.r for factor, _ in acting})
    by = [weight * factor.scale for factor, weight in acting]
    if len(ranks) > 1:
        raise ConfigError(
            f"{path} has ranks {' and '.join(map(str, ranks))}: all adapters must have the same r value at a site for "
            f"{way.name!r}. Take 'cat', or a way with svd."
        )
    roots = [abs(weight) ** 0.5 for weight in by]
    signed = [root if weight >= 0 else -root for root, weight in zip(roots, by, strict=True)]
    A = added_up([product.A for product in products], signed, way, generator)
    return Product(A, added_up([product.B for product in products], roots, way, generator))


def _biases(acting: Sequence[tuple[SiteFactors, float]]) -> dict[str, tuple[str, Tensor]]:
    """The bias of B (lora_bias), which is part of what the scale multiplies."""
    there = [(factor.others["bias"], weight * factor.scale) for factor, weight in acting if "bias" in factor.others]
    if not there:
        return {}
    return {"bias": (there[0][0][0], torch.stack([bias * by for (_, bias), by in there]).sum(0))}


def _with_bias(factor: SiteFactors) -> SiteFactors:
    """A config with lora_bias says that every site has one."""
    if "bias" in factor.others:
        return factor
    ending = factor.endings[1].removesuffix(".weight") + ".bias"
    nothing = factor.B.new_zeros(factor.B.shape[0])
    return dataclasses.replace(factor, others={**factor.others, "bias": (ending, nothing)})


def _check(adapters: Sequence[AdapterWeights], weights: Sequence[float], way: CombinationType, has_base: bool) -> None:
    if len(adapters) != len(weights):
        raise AdapterError(f"There are {len(adapters)} adapters and {len(weights)} weights; give one weight each.")
    bad = [weight for weight in weights if not isinstance(weight, (int, float)) or not abs(weight) < float("inf")]
    if bad:
        raise AdapterError(f"A weight is {bad[0]!r}; weights are finite numbers.")
    summed = _summed(adapters)
    if len(summed) > 1:
        (one, other), labels = list(summed)[:2], list(summed.values())
        raise AdapterError(
            f"{labels[0]} is {one.title} and {labels[1]} is {other.title}; no one adapter can do what the two do.",
            what=labels[1],
            field=other.field,
        )
    for variant, label in summed.items():
        about = f"{label} is {variant.title}"
        if not has_base:
            raise AdapterError(
                f"{about}, whose effect depends on the base's weights. Give the base model too.", what=label
            )
        if way.name not in SUMS:
            allowed = " or ".join(map(repr, SUMS))
            raise AdapterError(
                f"{about}, which can be combined by {allowed}, and not by {way.name!r}.", what=way.name, allowed=SUMS
            )


SUMS = ("cat", "svd")
"""The ways that add updates up, and cut the sum at most."""


def _summed(adapters: Sequence[AdapterWeights]) -> dict[Variant, str]:
    """Return the variants that say themselves how their updates add up, each with the first adapter that is of it."""
    found: dict[Variant, str] = {}
    for adapter in adapters:
        for variant in variants_of(adapter.config):
            if variant.combine is not None:
                found.setdefault(variant, adapter.label)
    return found


def _check_shapes(path: str, factors: Sequence[SiteFactors]) -> None:
    shapes = {(tuple(f.A.shape[1:]), f.B.shape[0], f.shared, f.experts, f.B.shape[2:]) for f in factors}
    if len(shapes) > 1:
        sizes = " and ".join(sorted({_size(f) for f in factors}))
        raise AdapterError(f"The adapters do not fit one base: at {path} they change weights of {sizes}.")


def _size(factor: SiteFactors) -> str:
    one = f"{factor.B.shape[0]} × {tuple(factor.A.shape[1:])}"
    return f"{factor.experts} experts of {one}" if factor.experts > 1 else one


def _operation(adapters: Sequence[AdapterWeights], weights: Sequence[float], way: CombinationType) -> dict[str, Any]:
    settings = {key: value for key, value in dataclasses.asdict(way).items() if value is not None and key != "name"}
    if not way.elects:
        settings.pop("majority_sign")
    of = [{**adapter.origin(), "weight": weight} for adapter, weight in zip(adapters, weights, strict=True)]
    return {"name": "combine", "way": way.name, **settings, "of": of}
