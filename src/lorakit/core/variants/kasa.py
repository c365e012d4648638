"""KaSA removes the smallest singular values of the base weight and trains the singular values of the update.

The base is W without its r smallest singular values, and the update is s·B·diag(d)·A, where d is trained. The layer
keeps the original weight, which is restored bit for bit when the adapter is disabled or detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.kinds.kind import only_linear
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import Factor, Move, OwnTensor, Parts, Penalty, Start, Variant, values_of

DIAGONAL = "lora_diag"
"""PEFT's name for the singular values of the update, on a layer and on disk."""


def truncated(W: Tensor, r: int) -> Tensor:
    """Return W (out, in) without its r smallest singular values, r less than both dimensions.   [docs/math.md (94)]

    Source:
        Wang et al. 2024, arXiv:2412.06071, section 3.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :-r] * S[:-r]) @ Vh[:-r]


def penalty(factor: Factor, training: bool) -> Tensor:
    """Return β·‖d‖² + γ·(‖Bᵀ·B − I‖ + ‖A·Aᵀ − I‖), a scalar in fp32 or wider.   [docs/math.md (96)]

    Source:
        Wang et al. 2024, arXiv:2412.06071, eqs. (9) to (11).
    """
    A, B, diagonal = (at_least_fp32(tensor) for tensor in (factor.A, factor.B, factor.own[DIAGONAL]))
    eye = torch.eye(len(diagonal), dtype=A.dtype, device=A.device)
    apart = torch.linalg.norm(B.T @ B - eye) + torch.linalg.norm(A @ A.T - eye)
    return float(factor.setting["beta"]) * diagonal.square().sum() + float(factor.setting["gamma"]) * apart


def _start(start: Start) -> Tensor:
    return torch.empty(start.rank, dtype=start.A.dtype, device=start.A.device).normal_(generator=start.generator)


def _factors(factor: Factor, training: bool) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B·diag(d) (out, r).   [docs/math.md (95)]"""
    return factor.A, factor.B * factor.own[DIAGONAL]


def _move(start: Start) -> Tensor:
    start.check_rank(min(start.spec.out_features, start.spec.in_features) - 1, KASA.title)  # one value must be left
    return truncated(start.finite_weight(), start.rank)


KASA = Variant(
    name="kasa",
    title="KaSA",
    field="kasa_config",
    setting=values_of("kasa_config"),
    fits=only_linear,
    parts=Parts(extras=(OwnTensor(DIAGONAL, "parameter", lambda kind, spec, r, setting: (r,), _start),)),
    factors=_factors,
    move=Move(
        _move, "KaSA adapters need a base without its smallest singular values, but others need the original one"
    ),
    penalty=Penalty(penalty),
)
