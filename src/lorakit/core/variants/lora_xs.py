"""LoRA-XS: A and B are frozen at the largest singular directions of W, and an r × r matrix R between them is trained.

R starts at zero, not at the paper's N(0, 10⁻¹⁰), so that a new adapter leaves the output unchanged; its gradient,
s·Bᵀ·∂L/∂W·Aᵀ, is not zero there. A and B are saved, because a decomposition fixes no signs: with other signs, the
same R would be another update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds.kind import only_dense
from lorakit.core.variants.variant import NO_SETTING, Factor, OwnTensor, Parts, Setting, Start, Variant

MATRIX = "lora_R"
"""The name of R, on a layer and on disk."""


def directions(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A = Σ_r·V_rᵀ (r, in) and B = U_r (out, r), with W = U·Σ·Vᵀ.   [docs/math.md (113)]

    Source:
        Bałazy et al. 2024, arXiv:2405.17604, section 3. There W multiplies a row x from the right, so Σ is next to x.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return S[:r, None] * Vh[:r], U[:, :r]


def _setting(config: LoraConfig, path: str) -> Setting | None:
    return NO_SETTING if config.use_lora_xs else None


def _start(start: Start) -> tuple[Tensor, Tensor]:
    start.check_rank(min(start.spec.out_features, start.spec.in_features), LORA_XS.title)
    A, B = directions(start.finite_weight(), start.rank)
    return A.to(start.A).contiguous(), B.to(start.B).contiguous()


def _factors(factor: Factor, training: bool) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B·R (out, r).   [docs/math.md (113)]"""
    return factor.A, factor.B @ factor.own[MATRIX]


LORA_XS = Variant(
    name="lora-xs",
    title="LoRA-XS",
    field="use_lora_xs",
    setting=_setting,
    fits=only_dense,
    parts=Parts(
        start=_start,
        trains=frozenset(),
        extras=(
            OwnTensor(
                held_as=MATRIX,
                carried="parameter",
                shape=lambda kind, spec, r, setting: (r, r),
                start=lambda start: start.A.new_zeros(start.rank, start.rank),
                role="whole",
            ),
        ),
    ),
    factors=_factors,
)
