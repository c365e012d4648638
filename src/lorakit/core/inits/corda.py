"""CorDA: W is decomposed as the inputs see it; the strongest part (or the weakest) becomes the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.config import CordaConfig
from lorakit.core.inits.eva import sees_inputs
from lorakit.core.inits.init import Init, InitContext, InitResult, balanced
from lorakit.errors import ConfigError

DAMP, LARGEST_ERROR = 0.01, 0.05
"""Share of the mean diagonal that is added first, doubled until ‖C·C⁻¹ − I‖ is below the second number."""


def _digest(blank: InitContext, collected: Any) -> dict[str, Tensor]:
    """U (out, r), S (r,) and Vᵀ·C⁻¹ (r, n) of W·C, C the inputs' Σ x·xᵀ of a call, averaged over calls."""
    return cropped(blank, collected.second_moment() * (collected.rows / collected.calls))


def cropped(blank: InitContext, C: Tensor) -> dict[str, Tensor]:
    """The r directions that the config's method takes.

    Args:
        blank: The site.
        C: (n, n), how its inputs are spread.

    Returns:
        U (out, r), S (r,) and Vh (r, n), which is Vᵀ·C⁻¹.
    """
    (W,) = blank.matrices()
    blank.check_rank(min(W.shape))
    U, S, Vh = decomposed(W, C.to(W))
    part = slice(0, blank.r) if method_of(blank) == "ipm" else slice(len(S) - blank.r, None)
    return {"U": U[:, part].contiguous(), "S": S[part].clone(), "Vh": Vh[part].contiguous()}


def method_of(blank: InitContext) -> str:
    """Which of "ipm" and "kpm" the config asks for.

    Raises:
        ConfigError: The config says something else.
    """
    method = (blank.config.corda_config or CordaConfig()).corda_method
    if method not in ("ipm", "kpm"):
        raise ConfigError(
            f"Invalid corda_method found: {method}, it should be 'ipm' or 'kpm'.",
            what=method,
            field="corda_config.corda_method",
            allowed=("ipm", "kpm"),
        )
    return method


def decomposed(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W·C = U·S·Vᵀ, and so W = U·S·(Vᵀ·C⁻¹); C gets a share of its mean diagonal so that it has an inverse.

    Args:
        W: (out, n).
        C: (n, n), symmetric, not negative.

    Returns:
        U (out, k), S (k,), Vᵀ·C⁻¹ (k, n), strongest first.
    """
    wide = torch.float64 if C.device.type != "mps" else torch.float32  # that device has no float64
    C = C.to(wide)
    one = torch.eye(len(C), dtype=wide, device=C.device)
    damp = DAMP
    while True:
        damped = C + one * (C.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, one)) < LARGEST_ERROR:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ damped.to(W.dtype), full_matrices=False)
    return U, S, Vh @ inverse.to(W.dtype)


def _corda(blank: InitContext) -> InitResult:
    """A = √(S_r/s)·V_rᵀ·C⁻¹, B = U_r·√(S_r/s) of W·C = U·S·Vᵀ; the base becomes W − s·B·A.   [docs/math.md (65)]

    Source:
        Yang et al. 2024, arXiv:2406.05223, eq. (3) to (6): "ipm" takes the strongest directions, "kpm" the weakest.
    """
    found = blank.found()
    if found["U"].shape[1] != blank.r:
        raise ConfigError(
            f"{blank.path}: the statistics were collected for rank {found['U'].shape[1]}, and r is {blank.r}. Collect "
            "them with the config that is attached.",
            where=blank.path,
        )
    return InitResult(*blank.laid(*balanced(blank, *(found[name][None] for name in ("U", "S", "Vh")))))


CORDA = Init(
    name="corda",
    fits=sees_inputs,
    changes_base=True,
    is_identity=True,
    needs="inputs",
    fill=_corda,
    is_exact=False,
    digest=_digest,
)
