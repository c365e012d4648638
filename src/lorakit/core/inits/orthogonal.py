"""Orthogonal: both factors are random, and their product is zero all the same."""

from __future__ import annotations

import math

import torch

from lorakit.core.inits.init import MATRICES, Blank, Filled, Init
from lorakit.errors import ConfigError

SIZE = 0.1
"""Both factors are this times rows of standard normal numbers in an orthogonal basis."""


def _orthogonal(blank: Blank) -> Filled:
    """A = Q₁ᵀ·X/10 and B = Y·Q₂/10, with Q₁ and Q₂ halves of the rows of an orthogonal Q.   [docs/math.md (63)]

    Source:
        datta0.github.io/posts/rethink-lora-init, as PEFT has it: neither factor waits for the other to move.
    """
    if blank.r % 2:
        raise ConfigError(
            f"{blank.path}: Orthogonal initialization requires the LoRA rank to be even, got {blank.r} instead."
        )
    if blank.slot.groups > 1:
        raise ConfigError(
            f"{blank.path}: init_lora_weights is 'orthogonal', which has no meaning on a convolution of "
            f"{blank.slot.groups} groups. Leave the module out, or use True."
        )
    g, out = max(blank.slot.experts, 1), blank.slot.out_features
    n = math.prod(blank.A_shape[1:])

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(g, *shape, device=blank.device, dtype=blank.dtype).normal_(generator=blank.generator)

    Q = torch.linalg.qr(random(blank.r, blank.r)).Q
    odd, even = Q[:, 0::2], Q[:, 1::2]  # (g, r / 2, r)
    return Filled(*blank.laid(odd.mT @ random(blank.r // 2, n) * SIZE, random(out, blank.r // 2) @ even * SIZE))


ORTHOGONAL = Init(
    name="orthogonal",
    kinds=MATRICES,
    changes_base=False,
    is_identity=True,
    needs="",
    fill=_orthogonal,
    is_exact=False,
)
