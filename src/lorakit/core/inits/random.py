"""Inits that need no data and no base: Kaiming, Gaussian, random B, orthogonal.

Inits that look at nothing: Kaiming, Gaussian, and both sides random.

Orthogonal: both factors are random, and their product is zero all the same.
"""

from __future__ import annotations

import math

import torch

from lorakit.core.inits.init import Init, InitContext, InitResult, normal, uniform, zeros
from lorakit.core.kinds import every_kind, every_kind_of_the_table
from lorakit.errors import ConfigError


def _kaiming(blank: InitContext) -> InitResult:
    """One side uniform in ±1/√fan_in (an Embedding's: standard normal), the zero side zero.  [docs/math.md (5), (6)]

    Source: He et al. 2015 with a = √5, as nn.Linear's own start; Hu et al. 2021, section 4.1.
    """
    if blank.kind.zero_side == "A":
        return InitResult(zeros(blank, blank.A_shape), normal(blank, blank.B_shape, 1.0))
    return InitResult(uniform(blank, blank.A_shape), zeros(blank, blank.B_shape))


def _gaussian(blank: InitContext) -> InitResult:
    """One side normal with standard deviation 1/r, the zero side zero.  [docs/math.md (5)]."""
    std = 1.0 / blank.r
    if blank.kind.zero_side == "A":
        return InitResult(zeros(blank, blank.A_shape), normal(blank, blank.B_shape, std))
    return InitResult(normal(blank, blank.A_shape, std), zeros(blank, blank.B_shape))


def _random(blank: InitContext) -> InitResult:
    """Both sides random, so the adapter acts from the start; for tests and experiments."""
    if blank.kind.zero_side == "A":
        return InitResult(normal(blank, blank.A_shape, 1.0), normal(blank, blank.B_shape, 1.0))
    return InitResult(uniform(blank, blank.A_shape), uniform(blank, blank.B_shape))


KAIMING = Init(
    name=True,
    fits=every_kind,
    changes_base=False,
    is_identity=True,
    needs="",
    fill=_kaiming,
    takes_any_shape=True,
)
GAUSSIAN = Init(
    name="gaussian",
    fits=every_kind,
    changes_base=False,
    is_identity=True,
    needs="",
    fill=_gaussian,
    takes_any_shape=True,
)
RANDOM = Init(
    name=False,
    fits=every_kind,
    changes_base=False,
    is_identity=False,
    needs="",
    fill=_random,
    takes_any_shape=True,
)

SIZE = 0.1
"""Both factors are this times rows of standard normal numbers in an orthogonal basis."""


def _orthogonal(blank: InitContext) -> InitResult:
    """A = Q₁ᵀ·X/10 and B = Y·Q₂/10, with Q₁ and Q₂ halves of the rows of an orthogonal Q.   [docs/math.md (63)]

    Source:
        datta0.github.io/posts/rethink-lora-init, as PEFT has it: neither factor waits for the other to move.
    """
    if blank.r % 2:
        raise ConfigError(
            f"{blank.path}: Orthogonal initialization requires the LoRA rank to be even, got {blank.r} instead.",
            where=blank.path,
        )
    if blank.slot.groups > 1:
        raise ConfigError(
            f"{blank.path}: init_lora_weights is 'orthogonal', which has no meaning on a convolution of "
            f"{blank.slot.groups} groups. Leave the module out, or use True.",
            where=blank.path,
        )
    g, out = max(blank.slot.experts, 1), blank.slot.out_features
    n = math.prod(blank.A_shape[1:])

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(g, *shape, device=blank.device, dtype=blank.dtype).normal_(generator=blank.generator)

    Q = torch.linalg.qr(random(blank.r, blank.r)).Q
    odd, even = Q[:, 0::2], Q[:, 1::2]  # (g, r / 2, r)
    return InitResult(*blank.laid(odd.mT @ random(blank.r // 2, n) * SIZE, random(out, blank.r // 2) @ even * SIZE))


ORTHOGONAL = Init(
    name="orthogonal",
    fits=every_kind_of_the_table,
    changes_base=False,
    is_identity=True,
    needs="",
    fill=_orthogonal,
    is_exact=False,
)
