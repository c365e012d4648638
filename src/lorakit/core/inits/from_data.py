"""Inits from collected data: EVA and CorDA, from a site's inputs, and LoRA-GA, from the gradient of its weight.

EVA sets A to principal directions of the inputs, and moves ranks to sites where they explain the most. CorDA starts at
the largest or smallest singular directions of W·C, with the inputs' covariance C. LoRA-GA aligns A and B with the
gradient, so that the first update approximates that of full fine-tuning.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lorakit.config.nested import CordaConfig, EvaConfig, LoraGAConfig
from lorakit.core.inits.init import Init, InitContext, InitResult, balanced, zeros
from lorakit.core.kinds.kind import takes_input, takes_values
from lorakit.core.linalg import Principal, dense_spectrum
from lorakit.errors import ConfigError


class InputMoments(Protocol):
    """Moments of a site's inputs, collected by `lorakit.core.statistics`: `rows` inputs of `calls` calls."""

    rows: int
    calls: int

    def second_moment(self) -> Tensor:
        """Return Σ x·xᵀ / rows, (in, in)."""

    def principal(self, k: int) -> Principal:
        """Return the first k principal directions, (k, in)."""


def _eva_settings(context: InitContext) -> EvaConfig:
    return context.config.eva_config or EvaConfig()


def _eva_digest(context: InitContext, statistics: InputMoments) -> dict[str, Tensor]:
    """Return the first `rho`·r principal directions (k, in), and their singular values and variance ratios, (k,)."""
    context.check_rank(math.prod(context.A_shape[1:]))
    principal = statistics.principal(round(_eva_settings(context).rho * context.r))
    return {"directions": principal.vectors, "values": principal.values, "ratios": principal.ratios}


def _eva(context: InitContext) -> InitResult:
    """Set A to the first r principal directions of the inputs and B to zero.   [docs/math.md (64)]

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.2.
    """
    statistics = context.collected()
    context.check_rank(len(statistics["directions"]))
    A = statistics["directions"][: context.r]
    if _eva_settings(context).whiten:
        A = A / statistics["values"][: context.r, None].sqrt()
    return InitResult(A.reshape(context.A_shape).to(context.dtype).contiguous(), zeros(context, context.B_shape))


EVA = Init("eva", _eva, fits=takes_values, needs="inputs", digest=_eva_digest)


DAMP, LARGEST_ERROR = 0.01, 0.05
"""`DAMP` is the initial damping, relative to the mean diagonal element of C; it is doubled until C is invertible.

C counts as invertible if ‖C·C⁻¹ − I‖ is below `LARGEST_ERROR`.
"""

METHODS = ("ipm", "kpm")


def _corda_digest(context: InitContext, statistics: InputMoments) -> dict[str, Tensor]:
    """Return the r directions that the config's method selects: U (out, r), S (r,) and Vh = Vᵀ·C⁻¹ (r, n).

    The covariance C (n, n) is Σ x·xᵀ over the inputs of one call, averaged over all calls.
    """
    C = statistics.second_moment() * (statistics.rows / statistics.calls)
    method = (context.config.corda_config or CordaConfig()).corda_method
    if method not in METHODS:
        text = f"Invalid corda_method found: {method}, it should be 'ipm' or 'kpm'."
        raise ConfigError(text, what=method, field="corda_config.corda_method", allowed=METHODS)
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
    statistics = context.collected()
    context.check_collected(statistics["U"].shape[1])
    return InitResult(*context.in_layout(*balanced(context, *(statistics[name][None] for name in ("U", "S", "Vh")))))


CORDA = Init(
    "corda", _corda, fits=takes_values, changes_base=True, is_exact=False, needs="inputs", digest=_corda_digest
)


DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class GradientMoments(Protocol):
    """Gradients of a site's weight, collected by `lorakit.core.statistics`."""

    def mean(self) -> Tensor:
        """Return the mean gradient over the batches, shaped like the canonical weight, (out, in) at a dense site."""


def settings_of(context: InitContext) -> LoraGAConfig:
    """Return the config's LoRA-GA settings, or PEFT's defaults; a ConfigError if a setting is invalid."""
    settings = context.config.lora_ga_config or LoraGAConfig()
    for field, value, known in (("direction", settings.direction, DIRECTIONS), ("scale", settings.scale, SCALES)):
        if value not in known:
            raise ConfigError.of(f"lora_ga_config.{field}", value, allowed=known)
    return settings


def _lora_ga_digest(context: InitContext, statistics: GradientMoments) -> dict[str, Tensor]:
    """Return U (out, 2r), S (2r,) and Vh (2r, n): the top 2r singular vectors and values of the mean gradient."""
    settings_of(context)
    context.check_ungrouped()
    G = context.kind.flat_weight(context.spec, statistics.mean())
    context.check_rank(min(G.shape) // 2, "init_lora_weights='lora_ga' needs 2·r directions of the gradient")
    spectrum, _ = dense_spectrum(G, 2 * context.r)
    part = slice(0, 2 * context.r)
    return {
        "U": spectrum.U[0, :, part].contiguous(),
        "S": spectrum.S[0, part].clone(),
        "Vh": spectrum.Vh[0, part].contiguous(),
    }


def _lora_ga(context: InitContext) -> InitResult:
    """From the gradient G = U·S·Vᵀ, take rows of Vᵀ as A and columns of U·S as B; the base becomes W − s·B·A.

    [docs/math.md (67)]

    Source:
        Wang et al. 2024, arXiv:2407.05000, section 3.2 and theorem 3.2; B's columns are multiplied by S, as in PEFT.
    """
    settings, statistics = settings_of(context), context.collected()
    U, S, Vh = statistics["U"], statistics["S"], statistics["Vh"]
    context.check_collected(len(S) / 2)  # with an odd number of directions, len(S) / 2 matches no rank
    to_A, to_B = _chosen(context, settings.direction)
    A, B, strength = Vh[to_A], U[:, to_B] * S[to_B], float(S[to_B][0])
    if settings.scale == "stable":
        B = B * (context.spec.out_features**0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd" and strength > 0:
        largest = float(dense_spectrum(context.matrices()[0], 1)[0].S[0, 0])
        B = B * (largest / strength)
    elif settings.scale == "gd_scale":
        A, B = A / context.scale, B / context.scale
    return InitResult(*context.in_layout(A[None], B[None]))


def _chosen(context: InitContext, direction: str) -> tuple[slice | Tensor, slice | Tensor]:
    """Return the indices of the singular directions for A and for B."""
    r = context.r
    if direction == "random":
        picked = torch.randperm(2 * r, generator=context.generator, device=context.device)[:r]
        return picked, picked
    return {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
    }[direction]


LORA_GA = Init(
    "lora_ga", _lora_ga, fits=takes_input, changes_base=True, is_exact=False, needs="gradients", digest=_lora_ga_digest
)
