"""Inits from a decomposition of W: PiSSA, OLoRA, MiCA.

PiSSA: the strongest singular directions of W become the adapter, and what is left becomes the base.

OLoRA: the adapter begins as a part of the QR decomposition of W, and what is left becomes the base.

MiCA: B is frozen at the weakest left singular directions of W, and A alone learns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.inits.init import Init, InitContext, InitResult, balanced, zeros
from lorakit.core.kinds import every_kind_of_the_table

FAST = "pissa_niter_"
SPARE = 16
"""A sketch has so many columns more than the rank, so that its last directions are sharp too."""


def _pissa(blank: InitContext) -> InitResult:
    """W = U·S·Vᵀ: A = √(S_r/s)·V_rᵀ, B = U_r·√(S_r/s), and the base becomes W − s·B·A.   [docs/math.md (60)]

    Source:
        Meng et al. 2024, arXiv:2404.02948, eq. (2) to (4); with "pissa_niter_N" its fast SVD, Halko et al. 2011.
    """
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]))
    name = str(blank.config.init_lora_weights).lower()
    iterations = int(name.removeprefix(FAST)) if name.startswith(FAST) else None
    U, S, Vh = torch.linalg.svd(W, full_matrices=False) if iterations is None else sketched(blank, W, iterations)
    return InitResult(*blank.laid(*balanced(blank, U[..., : blank.r], S[:, : blank.r], Vh[:, : blank.r])))


def sketched(blank: InitContext, W: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest singular directions from a random sketch and so many power iterations.

    Args:
        blank: Its rank, and its source of randomness.
        W: (g, out, n).
        iterations: Each sharpens the directions.

    Returns:
        U (g, out, k), S (g, k), Vh (g, k, n), with k a little above the rank.

    Source:
        Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(blank.r + SPARE, *W.shape[1:])
    probe = torch.empty(W.shape[0], W.shape[2], width, dtype=W.dtype, device=W.device)
    Q = torch.linalg.qr(W @ probe.normal_(generator=blank.generator)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    u, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Q @ u, S, Vh


PISSA = Init(
    name="pissa",
    fits=every_kind_of_the_table,
    changes_base=True,
    is_identity=True,
    needs="",
    fill=_pissa,
    is_exact=False,
    family=r"pissa_niter_\d{1,3}",
)


def _olora(blank: InitContext) -> InitResult:
    """W = Q·R: B is the first r columns of Q, A the first r rows of R, the base W − s·B·A.   [docs/math.md (61)]

    Source:
        Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
    """
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]))
    Q, R = torch.linalg.qr(W)
    return InitResult(*blank.laid(R[:, : blank.r], Q[..., : blank.r]))


OLORA = Init(
    name="olora",
    fits=every_kind_of_the_table,
    changes_base=True,
    is_identity=True,
    needs="",
    fill=_olora,
    is_exact=False,
    requantises=True,
)


def _mica(blank: InitContext) -> InitResult:
    """W = U·S·Vᵀ: B is the last r columns of U, A = 0.   [docs/math.md (68)]

    Source:
        arXiv:2604.01694 (MiCA), as PEFT has it: the adapter writes only where the base writes least.
    """
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]), "MiCA requires `r` <= min(in_features, out_features)")
    U = torch.linalg.svd(W, full_matrices=False).U
    A, B = zeros(blank, blank.A_shape), U[..., -blank.r :]
    return InitResult(A, blank.laid(A.reshape(W.shape[0], blank.r, -1), B)[1])


MICA = Init(
    name="mica",
    fits=every_kind_of_the_table,
    changes_base=False,
    is_identity=True,
    needs="",
    fill=_mica,
    trains=frozenset({"A"}),
)
