"""Compare two adapters site by site from their factors: direction, strength, input space and output space of updates.

If a variant's update is more than a low-rank product, only the low-rank product is compared.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, Spectrum, cosines, inner, significant, spectrum
from lorakit.core.operations.tensor_sources import AdapterWeights, weights_of_folder, weights_of_model
from lorakit.core.operations.writing import aligned
from lorakit.core.variants import variants_of


@dataclass(frozen=True)
class SiteComparison:
    """Comparison of two updates to the same weight.

    Attributes:
        ranks: Numerical rank of each update; for experts, the largest rank over all experts.
        norms: Frobenius norm of each update, including the scale.
        cosine: Cosine similarity of the two updates, treated as vectors, in [−1, 1]; 0 if either update is zero.
        output_angles: Principal angles, in degrees, between the updates' output spaces, over all experts, in ascending
            order.
        input_angles: Principal angles, in degrees, between the updates' input spaces, in ascending order.
        output_overlap: Mean squared cosine of the output angles, in [0, 1]: 1 if one space contains the other.
        input_overlap: Mean squared cosine of the input angles, in [0, 1].
    """

    path: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]
    output_overlap: float
    input_overlap: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of two adapters.

    Attributes:
        names: Names or directories of the two adapters.
        norms: Frobenius norm of each adapter's updates over all its sites.
        cosine: Cosine similarity of the two adapters, each treated as one vector over all sites; a missing site counts
            as zero.
        base: How the adapters' base models compare: "same", "same at other precision", "unverifiable" or "different".
        in_part: Titles of the variants for which only the low-rank parts of the updates were compared.
    """

    names: tuple[str, str]
    sites: tuple[SiteComparison, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    norms: tuple[float, float]
    cosine: float
    base: str
    in_part: tuple[str, ...]


def compare_adapters(model: nn.Module, first: str, second: str) -> Comparison:
    """Compare two adapters of a model."""
    return compare_weights(weights_of_model(model, first), weights_of_model(model, second))


def compare_folders(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Comparison:
    """Compare two adapters on disk."""
    return compare_weights(weights_of_folder(first, ["nonfinite"]), weights_of_folder(second, ["nonfinite"]))


def compare_weights(first: AdapterWeights, second: AdapterWeights) -> Comparison:
    """Compare two adapters; an AdapterError if they change weights of different shapes at a site."""
    with torch.no_grad():
        both = aligned([first, second])
        pairs = {p: (a.scaled_product(), b.scaled_product()) for p, (a, b) in both.items() if a and b}
        sites = tuple(_site(path, *pair) for path, pair in pairs.items())
        norms = (_norm(first), _norm(second))
        dot = sum(inner(one, other) for one, other in pairs.values())
    variants = [variant for adapter in (first, second) for variant in variants_of(adapter.config)]
    return Comparison(
        names=(first.label, second.label),
        sites=sites,
        only_first=tuple(path for path, (one, other) in both.items() if one and not other),
        only_second=tuple(path for path, (one, other) in both.items() if other and not one),
        norms=norms,
        cosine=_ratio(dot, norms[0] * norms[1]),
        base=first.compare_base(second).verdict,
        in_part=tuple(dict.fromkeys(v.title for v in variants if not v.is_low_rank)),
    )


def _norm(adapter: AdapterWeights) -> float:
    products = (factor.scaled_product() for factor in adapter.factors.values())
    return math.sqrt(max(0.0, sum(inner(product, product) for product in products)))


def _site(path: str, one: Product, other: Product) -> SiteComparison:
    spectra = spectrum(one), spectrum(other)
    norms = (float(spectra[0].S.norm()), float(spectra[1].S.norm()))
    ranks = (significant(spectra[0]), significant(spectra[1]))
    out, into = _between(spectra, ranks, output=True), _between(spectra, ranks, output=False)
    return SiteComparison(
        path=path,
        ranks=(max(ranks[0]), max(ranks[1])),
        norms=norms,
        cosine=_ratio(inner(one, other), norms[0] * norms[1]),
        output_angles=_degrees(out),
        input_angles=_degrees(into),
        output_overlap=float(out.square().mean()) if out.numel() else 0.0,
        input_overlap=float(into.square().mean()) if into.numel() else 0.0,
    )


def _between(
    spectra: tuple[Spectrum, Spectrum], ranks: tuple[tuple[int, ...], tuple[int, ...]], *, output: bool
) -> Tensor:
    """Return the cosines of the principal angles in each group, up to the group's numerical rank, as one vector."""
    one, other = (each.U if output else each.Vh.mT for each in spectra)
    parts = zip(one, other, *ranks, strict=True)
    return torch.cat([cosines(a[None, :, :k], b[None, :, :m]).flatten() for a, b, k, m in parts])


def _degrees(values: Tensor) -> tuple[float, ...]:
    return tuple(sorted(math.degrees(math.acos(float(cosine))) for cosine in values.flatten()))


def _ratio(dot: float, norms: float) -> float:
    return max(-1.0, min(1.0, dot / norms)) if norms else 0.0
