"""LoRA-GA: the adapter begins where the gradient of the loss by W points, so that its first step is W's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraGAConfig
from lorakit.core.inits.init import Init, InitContext, InitResult
from lorakit.core.kinds import Kind
from lorakit.core.linalg import dense_spectrum
from lorakit.errors import ConfigError

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def _fits(kind: Kind) -> bool:
    return kind.acts_on == "input"


def settings_of(blank: InitContext) -> LoraGAConfig:
    """The settings, PEFT's defaults where there are none.

    Raises:
        ConfigError: A word is not known.
    """
    settings = blank.config.lora_ga_config or LoraGAConfig()
    for field, value, known in (("direction", settings.direction, DIRECTIONS), ("scale", settings.scale, SCALES)):
        if value not in known:
            raise ConfigError(
                f"lora_ga_config: {field} is {value!r}; it must be one of {', '.join(known)}.",
                what=value,
                field=f"lora_ga_config.{field}",
                allowed=known,
            )
    return settings


def _digest(blank: InitContext, collected: Any) -> dict[str, Tensor]:
    """U (out, 2r), S (2r,) and Vᵀ (2r, n) of the mean gradient."""
    settings_of(blank)
    return strongest(blank, collected.mean())


def strongest(blank: InitContext, gradient: Tensor) -> dict[str, Tensor]:
    """The 2r strongest singular directions of a gradient.

    Args:
        blank: The site.
        gradient: Canonical, (out, in) or as its kind has it.

    Returns:
        U (out, 2r), S (2r,), Vh (2r, n).

    Raises:
        ConfigError: There are fewer directions.
    """
    if blank.slot.groups > 1:
        blank.matrices()  # says why not
    G = blank.kind.flat_weight(blank.slot, gradient)
    blank.check_rank(min(G.shape) // 2, "init_lora_weights='lora_ga' needs 2·r directions of the gradient")
    found, _ = dense_spectrum(G, 2 * blank.r)
    part = slice(0, 2 * blank.r)
    return {"U": found.U[0, :, part].contiguous(), "S": found.S[0, part].clone(), "Vh": found.Vh[0, part].contiguous()}


def _lora_ga(blank: InitContext) -> InitResult:
    """A = rows of Vᵀ, B = other columns of U·S of the gradient G = U·S·Vᵀ; the base becomes W − s·B·A.

    [docs/math.md (67)]

    Source:
        Wang et al. 2024, arXiv:2407.05000, section 3.2 and theorem 3.2, with B's columns times S as PEFT has them.
    """
    settings, found, r = settings_of(blank), blank.found(), blank.r
    U, S, Vh = found["U"], found["S"], found["Vh"]
    if len(S) != 2 * r:
        raise ConfigError(
            f"{blank.path}: the statistics were collected for rank {len(S) // 2}, and r is {r}. Collect them with the "
            "config that is attached.",
            where=blank.path,
        )
    to_A, to_B = _chosen(blank, settings.direction)
    A, B, strength = Vh[to_A], U[:, to_B] * S[to_B], float(S[to_B][0])
    if settings.scale == "stable":
        B = B * (blank.slot.out_features**0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd" and strength > 0:
        largest = float(dense_spectrum(blank.matrices()[0], 1)[0].S[0, 0])
        B = B * (largest / strength)
    elif settings.scale == "gd_scale":
        A, B = A / blank.scale, B / blank.scale
    return InitResult(*blank.laid(A[None], B[None]))


def _chosen(blank: InitContext, direction: str) -> tuple[Any, Any]:
    """Which singular directions go to A and which to B."""
    r = blank.r
    if direction == "random":
        picked = torch.randperm(2 * r, generator=blank.generator, device=blank.device)[:r]
        return picked, picked
    return {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
    }[direction]


LORA_GA = Init(
    name="lora_ga",
    fits=_fits,
    changes_base=True,
    is_identity=True,
    needs="gradients",
    fill=_lora_ga,
    is_exact=False,
    digest=_digest,
)
