"""CorDA: initialize A and B by the largest or smallest singular directions of W·C, with the inputs' covariance C."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.config import CordaConfig
from lorakit.core.inits.eva import InputMoments, sees_inputs
from lorakit.core.inits.init import Init, InitContext, InitResult, balanced
from lorakit.errors import ConfigError

DAMP, LARGEST_ERROR = 0.01, 0.05
"""`DAMP` is the initial damping, relative to the mean diagonal element of C; it is doubled until C is invertible.

C counts as invertible if ‖C·C⁻¹ − I‖ is below `LARGEST_ERROR`.
"""

METHODS = ("ipm", "kpm")


def _digest(context: InitContext, statistics: InputMoments) -> dict[str, Tensor]:
    """Return the r directions that the config's method selects: U (out, r), S (r,) and Vh = Vᵀ·C⁻¹ (r, n).

    The covariance C (n, n) is Σ x·xᵀ over the inputs of one call, averaged over all calls.
    """
    C = statistics.second_moment() * (statistics.rows / statistics.calls)
    method = (context.config.corda_config or CordaConfig()).corda_method
    if method not in METHODS:
        raise ConfigError(
            f"Invalid corda_method found: {method}, it should be 'ipm' or 'kpm'.",
            what=method,
            field="corda_config.corda_method",
            allowed=METHODS,
        )
    (W,) = context.matrices()
    U, S, Vh = decomposed(W, C.to(W))
    part = slice(0, context.r) if method == "ipm" else slice(len(S) - context.r, None)
    return {"U": U[:, part].contiguous(), "S": S[part].clone(), "Vh": Vh[part].contiguous()}


def decomposed(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose W·C = U·S·Vᵀ into U (out, k), S (k,) and Vᵀ·C⁻¹ (k, n), largest singular values first.

    C (n, n), symmetric and positive semidefinite, is damped until it is invertible.
    """
    wide = torch.float64 if C.device.type != "mps" else torch.float32  # MPS has no float64
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


def _corda(context: InitContext) -> InitResult:
    """With W·C = U·S·Vᵀ, set A = √(S_r/s)·V_rᵀ·C⁻¹ and B = U_r·√(S_r/s).   [docs/math.md (65)]

    The base becomes W − s·B·A.

    Source:
        Yang et al. 2024, arXiv:2406.05223, eqs. (3) to (6): "ipm" uses the largest singular values, "kpm" the smallest.
    """
    found = context.collected()
    context.check_collected(found["U"].shape[1])
    return InitResult(*context.in_layout(*balanced(context, *(found[name][None] for name in ("U", "S", "Vh")))))


CORDA = Init("corda", _corda, fits=sees_inputs, changes_base=True, is_exact=False, needs="inputs", digest=_digest)
