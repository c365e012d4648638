"""Compare two adapters site by site: do they change the weights in the same direction, how strongly, in which spaces.

Everything comes from the factors; no product is formed and no base is needed. A variant whose
update is more than a product of low rank is compared by that part alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.linalg import Product, Spectrum, cosines, inner, significant, spectrum
from lorakit.core.model.fingerprint import UNVERIFIABLE
from lorakit.core.operations.tensor_sources import AdapterWeights, SiteFactors, weights_of_folder, weights_of_model
from lorakit.core.operations.writing import aligned
from lorakit.core.variants import Variant, variants_of
from lorakit.errors import AdapterError


@dataclass(frozen=True)
class SiteComparison:
    """Two updates of one weight.

    Attributes:
        path: The site.
        ranks: What each has of directions that are more than rounding; of experts, the largest.
        norms: Frobenius norm of each update, scale included.
        cosine: Of the two updates as vectors, in [−1, 1]; 0 where one is zero.
        output_angles: Principal angles between what they write to, in degrees, smallest first; of all experts.
        input_angles: Principal angles between what they read from, likewise.
        output_overlap: Mean squared cosine of the output angles, in [0, 1]: 1 where one space holds the other.
        input_overlap: Likewise of the input angles.
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
    """Two adapters.

    Attributes:
        names: Names or folders of the two.
        sites: The sites that both have.
        only_first: Sites that only the first has.
        only_second: Sites that only the second has.
        norms: Norm of each over all its sites.
        cosine: Of the two over all sites, as if each were one long vector; a site that one lacks counts as zero there.
        base: Whether their bases are the same: same, same at other precision, unverifiable, different.
        in_part: Titles of variants of which only the low-rank part is compared.
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
    """Compare two adapters of a model.

    Args:
        model: The adapted model; only read.
        first: An adapter.
        second: Another.

    Raises:
        AdapterError: There is no such adapter.
    """
    return compare_weights(weights_of_model(model, first), weights_of_model(model, second))


def compare_folders(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Comparison:
    """Compare two adapters on disk.

    Args:
        first: A folder.
        second: Another.

    Raises:
        AdapterFileError: A folder is no adapter, or is damaged.
        AdapterError: At some site they change weights of different shapes.
    """
    return compare_weights(weights_of_folder(first, ["nonfinite"]), weights_of_folder(second, ["nonfinite"]))


def compare_weights(first: AdapterWeights, second: AdapterWeights) -> Comparison:
    """Compare two adapters wherever they come from.

    Args:
        first: An adapter.
        second: Another.

    Raises:
        AdapterError: At some site they change weights of different shapes, or files do not say which bare parameters
            are the same.
    """
    with torch.no_grad():
        both = aligned([first, second])
        pairs = {p: (_scaled(one), _scaled(other)) for p, (one, other) in both.items() if one and other}
        for path, (one, other) in pairs.items():
            if (one.A.shape[::2], one.B.shape[:2]) != (other.A.shape[::2], other.B.shape[:2]):
                raise AdapterError(
                    f"{first.label} and {second.label} do not change the same weights: at {path} the one is "
                    f"{_size(one)}, the other {_size(other)}."
                )
        sites = tuple(_site(path, *pair) for path, pair in pairs.items())
        norms = (_norm(first), _norm(second))
        dot = sum(inner(one, other) for one, other in pairs.values())
    found = first.compare_base(second)
    return Comparison(
        names=(first.label, second.label),
        sites=sites,
        only_first=tuple(path for path, (one, other) in both.items() if one and not other),
        only_second=tuple(path for path, (one, other) in both.items() if other and not one),
        norms=norms,
        cosine=_ratio(dot, norms[0] * norms[1]),
        base=UNVERIFIABLE if found is None else found.verdict,
        in_part=tuple(dict.fromkeys(v.title for v in _variants(first, second) if not v.is_low_rank)),
    )


def _variants(*adapters: AdapterWeights) -> list[Variant]:
    return [variant for adapter in adapters for variant in variants_of(adapter.config)]


def _scaled(factor: SiteFactors) -> Product:
    product = factor.product()
    return Product(product.A, product.B * factor.scale)


def _norm(adapter: AdapterWeights) -> float:
    scaled = (_scaled(factor) for factor in adapter.factors.values())
    return math.sqrt(max(0.0, sum(inner(product, product) for product in scaled)))


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
    """Cosines between the spaces of each group, which has a true rank of its own: (all of them,)."""
    one, other = (found.U if output else found.Vh.mT for found in spectra)
    parts = zip(one, other, *ranks, strict=True)
    return torch.cat([cosines(a[None, :, :k], b[None, :, :m]).flatten() for a, b, k, m in parts])


def _size(product: Product) -> str:
    one = f"{product.B.shape[1]} × {product.A.shape[2]}"
    return f"{product.A.shape[0]} of {one}" if product.A.shape[0] > 1 else one


def _degrees(found: Tensor) -> tuple[float, ...]:
    return tuple(sorted(math.degrees(math.acos(float(cosine))) for cosine in found.flatten()))


def _ratio(dot: float, norms: float) -> float:
    return max(-1.0, min(1.0, dot / norms)) if norms else 0.0
