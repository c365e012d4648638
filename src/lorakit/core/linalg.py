"""Linear algebra on low-rank products B·A without forming them: singular values, inner products and angles.

Factors are batched over groups: A is (g, r, in) and B is (g, out, r). A group is one expert of a fused parameter or one
group of a convolution; all other sites have a single group. The output channels of a convolution group use only that
group's part of A. Computations use float64. This module does not depend on adapters, scales or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.kinds.kind import Kind, WeightSpec
from lorakit.core.kinds.parameter import joined_A, joined_B, per_expert
from lorakit.errors import ConfigError

SPARE, SKETCH = 16, 8
"""A sketch has SPARE more columns than the requested rank.

A sketch is used only if SKETCH times its number of columns is less than the smaller dimension of the matrix.
"""


@dataclass(frozen=True)
class Product:
    """The factors of B·A: A (g, r, in) and B (g, out, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """The rank of each group."""
        return self.A.shape[1]


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of B·A, largest values first.

    U is (g, out, k), S (g, k) and Vh (g, k, in), with k = min(r, out, in).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class Principal:
    """Principal directions of a set of rows.

    Attributes:
        vectors: Orthonormal directions by decreasing variance, (k, in); the component of largest magnitude in each
            direction is positive.
        values: Singular values of the centered rows, one per direction, (k,).
        ratios: Fraction of the total variance that each direction explains, (k,).
    """

    vectors: Tensor
    values: Tensor
    ratios: Tensor


@dataclass(frozen=True)
class Reading:
    """The base weight of a site, and the site's geometry.

    W is canonical, in float64, (out, in, …); for experts, it is the tensor as the base stores it, (experts, …, …).
    """

    W: Tensor
    kind: Kind
    spec: WeightSpec

    def matrix(self, expert: int = 0) -> Tensor:
        """Return the weight as a float64 matrix, (out, n); to save memory, only one expert's matrix is converted."""
        if not self.spec.experts:
            return self.kind.flat_weight(self.spec, self.W)
        W = self.W[expert].double()
        return W.T if self.spec.in_first else W


def product_of(A: Tensor, B: Tensor, experts: int = 1) -> Product:
    """Return the factors of one site as a `Product`, in float64; kernels are flattened into the columns of A.

    A is (r, in, …), or (experts·r, in) for experts; B is (out, r / g, …), with g > 1 for a grouped convolution, or
    (out, r·experts) for experts.
    """
    wide = torch.float64 if A.device.type != "mps" else torch.float32  # MPS has no float64
    A, B = A.detach().to(wide).flatten(1), B.detach().to(wide).flatten(1)
    if experts > 1:
        return Product(*per_expert(A, B, experts))
    groups = max(1, A.shape[0] // B.shape[1])
    return Product(A.reshape(groups, -1, A.shape[1]), B.reshape(groups, -1, B.shape[1]))


def factors_of(product: Product, A_like: Tensor, B_like: Tensor, experts: int = 1) -> tuple[Tensor, Tensor]:
    """Convert a product of any rank back to a site's A (r, in, …) and B (out, r / g, …), in fp32 or wider.

    This is the inverse of `product_of`. `A_like` and `B_like` have the layout and dtype of the site's factors; their
    rank may differ.
    """
    A, B = (joined_A(product.A), joined_B(product.B)) if experts > 1 else (product.A, product.B)
    A = A.reshape(-1, *A_like.shape[1:])
    B = B.reshape(B_like.shape[0], -1, *B_like.shape[2:])
    return A.to(_kept(A_like.dtype)).contiguous(), B.to(_kept(B_like.dtype)).contiguous()


def stacked(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """Return Σ w·B·A of products for one site as one product with the sum of their ranks.   [docs/math.md (50)]"""
    A = torch.cat([product.A for product in products], dim=1)
    B = torch.cat([product.B * weight for product, weight in zip(products, weights, strict=True)], dim=2)
    return Product(A, B)


def spectrum(product: Product) -> Spectrum:
    """Return the exact singular value decomposition of B·A, computed from the factors.   [docs/math.md (51)]

    With the QR decompositions B = Q·R and Aᵀ = P·T, the product is B·A = Q·(R·Tᵀ)·Pᵀ, so only the small matrix R·Tᵀ
    needs a singular value decomposition. Cost: O((in + out)·r²).
    """
    Q, R = torch.linalg.qr(product.B)
    P, T = torch.linalg.qr(product.A.mT)
    u, S, vh = torch.linalg.svd(R @ T.mT, full_matrices=False)
    return Spectrum(Q @ u, S, vh @ P.mT)


def truncated(decomposed: Spectrum, rank: int) -> Product:
    """Return a product's best approximation of at most this rank in each group.   [docs/math.md (52)]

    The factors are B = U·S and A = Vᵀ, with the largest singular values first. Source: Eckart and Young 1936.
    """
    return Product(decomposed.Vh[:, :rank], decomposed.U[:, :, :rank] * decomposed.S[:, None, :rank])


def padded(product: Product, rank: int) -> Product:
    """Zero-pad a product to a rank in each group; a product with at least that rank is returned unchanged."""
    lack = rank - product.A.shape[1]
    if lack <= 0:
        return product
    return Product(torch.nn.functional.pad(product.A, (0, 0, 0, lack)), torch.nn.functional.pad(product.B, (0, lack)))


def rank_for(S: Tensor, energy: float) -> int:
    """Return the smallest rank, at least 1, that retains a fraction in (0, 1] of the energy ΣS².   [docs/math.md (52)]

    S (g, k) has the largest values first; every group keeps the same number of values.
    """
    energies = S.double().square().sum(0).cumsum(0)
    total = float(energies[-1])
    if total == 0:
        return 1
    slack = 8 * torch.finfo(energies.dtype).eps * total  # drops pure rounding error even if energy is 1
    return min(int((energies < energy * total - slack).sum()) + 1, S.shape[1])


def inner(one: Product, other: Product) -> float:
    """Return ⟨B·A, B'·A'⟩ = trace((BᵀB')(A'Aᵀ)) of two products for one site.   [docs/math.md (53)]"""
    return float(((one.B.mT @ other.B) * (one.A @ other.A.mT)).sum())


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two column spaces, largest first.   [docs/math.md (54)]

    The orthonormal columns are (g, n, k) and (g, n, l), and the cosines (g, min(k, l)), each in [0, 1].

    Source:
        Björck and Golub 1973; the mean of the squared cosines is φ in Hu et al. 2021, arXiv:2106.09685, eq. (4).
    """
    return torch.linalg.svdvals(one.mT @ other).clamp(max=1.0)


def significant(decomposed: Spectrum) -> tuple[int, ...]:
    """Return the numerical rank of each group: the number of singular values that exceed the rounding error."""
    S = decomposed.S
    if S.numel() == 0:
        return (0,) * S.shape[0]
    floor = S.max() * max(decomposed.U.shape[1], decomposed.Vh.shape[2]) * torch.finfo(torch.float32).eps
    return tuple(S.gt(floor).sum(1).tolist())


@dataclass(frozen=True)
class RankLimit:
    """The limit to which a product is truncated: a maximum rank, or a fraction in (0, 1] of its energy ΣS² to keep.

    Raises:
        ConfigError: Both fields are set, or neither is, or the value is out of range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ConfigError("Pass either a rank or a fraction of the energy, but not both.", field="rank")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError.of("rank", self.rank, "an integer >= 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError.of("energy", self.energy, "a fraction in (0, 1]")

    def of(self, S: Tensor, shared: int = 1) -> int:
        """Return the rank of each group, at least 1, for singular values S (g, k), largest first.

        `shared` is the number of groups that share the rank, as in a grouped convolution; 1 for experts.
        """
        if self.rank is None:
            return rank_for(S, self.energy or 1.0)
        return max(1, min(self.rank // shared, S.shape[1]))


def cut(decomposed: Spectrum, to: RankLimit, shared: int = 1) -> tuple[Product, float]:
    """Truncate a product, given its decomposition, and return it with the fraction of the energy that was removed.

    `shared` is as in `RankLimit.of`.
    """
    rank = to.of(decomposed.S, shared)
    energy = decomposed.S.square()
    total = float(energy.sum())
    return truncated(decomposed, rank), float(energy[:, rank:].sum()) / total if total else 0.0


def sketched_spectrum(W: Tensor, probe: Tensor, iterations: int) -> Spectrum:
    """Compute a truncated singular value decomposition of W (g, out, in) with a random sketch and power iterations.

    `probe` (g, in, k) is normally distributed; each iteration improves the accuracy.

    Source:
        Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    Q = torch.linalg.qr(W @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    u, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Spectrum(Q @ u, S, Vh)


def dense_spectrum(delta: Tensor, rank: int | None = None) -> tuple[Spectrum, float]:
    """Return the singular value decomposition of a dense update (out, in), and its energy ‖delta‖².

    If the `rank` needed is far below the size of the matrix, `sketched_spectrum` with four power iterations replaces
    the full decomposition; the energy shows how much the sketch leaves out.
    """
    energy = float(delta.double().square().sum())
    width = None if rank is None else rank + SPARE
    if width is None or SKETCH * width >= min(delta.shape):
        return Spectrum(*torch.linalg.svd(delta[None], full_matrices=False)), energy
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(delta.shape[1], width, generator=generator, dtype=delta.dtype).to(delta.device)
    return sketched_spectrum(delta[None], probe[None], 4), energy


def cut_dense(delta: Tensor, to: RankLimit) -> tuple[Product, float, float]:
    """Truncate a dense update (out, in), and return it with its energy ‖delta‖² before and after."""
    values, energy = dense_spectrum(delta, to.rank)
    product = truncated(values, to.of(values.S))
    return product, energy, float(values.S[:, : product.rank].double().square().sum())


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def damped_inverse(rows: Tensor, damping: float) -> Tensor:
    """Return (X·Xᵀ + δ·I)⁻¹ (…, r, r) for rows X (…, r, n) and damping δ; a pseudoinverse if the matrix is singular."""
    ridge = damping * torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return torch.linalg.pinv(rows @ rows.mT + ridge)
