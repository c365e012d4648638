"""LoRA-GA aligns A and B with the weight's gradient, so that the first update approximates that of full fine-tuning."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorakit.config import LoraGAConfig
from lorakit.core.inits.init import Init, InitContext, InitResult
from lorakit.core.kinds.kind import takes_input
from lorakit.core.linalg import dense_spectrum
from lorakit.errors import ConfigError

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


def _digest(context: InitContext, statistics: GradientMoments) -> dict[str, Tensor]:
    """Return U (out, 2r), S (2r,) and Vh (2r, n): the top 2r singular vectors and values of the mean gradient."""
    settings_of(context)
    context.check_ungrouped()
    G = context.kind.flat_weight(context.spec, statistics.mean())
    context.check_rank(min(G.shape) // 2, "init_lora_weights='lora_ga' needs 2·r directions of the gradient")
    found, _ = dense_spectrum(G, 2 * context.r)
    part = slice(0, 2 * context.r)
    return {"U": found.U[0, :, part].contiguous(), "S": found.S[0, part].clone(), "Vh": found.Vh[0, part].contiguous()}


def _lora_ga(context: InitContext) -> InitResult:
    """From the gradient G = U·S·Vᵀ, take rows of Vᵀ as A and columns of U·S as B; the base becomes W − s·B·A.

    [docs/math.md (67)]

    Source:
        Wang et al. 2024, arXiv:2407.05000, section 3.2 and theorem 3.2; B's columns are multiplied by S, as in PEFT.
    """
    settings, found = settings_of(context), context.collected()
    U, S, Vh = found["U"], found["S"], found["Vh"]
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
    "lora_ga", _lora_ga, fits=takes_input, changes_base=True, is_exact=False, needs="gradients", digest=_digest
)
