"""PiSSA: the strongest singular directions of W become the adapter, and what is left becomes the base."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.inits.init import MATRICES, Blank, Filled, Init, balanced

FAST = "pissa_niter_"
SPARE = 16
"""A sketch has so many columns more than the rank, so that its last directions are sharp too."""


def _pissa(blank: Blank) -> Filled:
    """W = U·S·Vᵀ: A = √(S_r/s)·V_rᵀ, B = U_r·√(S_r/s), and the base becomes W − s·B·A.   [docs/math.md (60)]

    Source:
        Meng et al. 2024, arXiv:2404.02948, eq. (2) to (4); with "pissa_niter_N" its fast SVD, Halko et al. 2011.
    """
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]))
    name = str(blank.config.init_lora_weights).lower()
    iterations = int(name.removeprefix(FAST)) if name.startswith(FAST) else None
    U, S, Vh = torch.linalg.svd(W, full_matrices=False) if iterations is None else sketched(blank, W, iterations)
    return Filled(*blank.laid(*balanced(blank, U[..., : blank.r], S[:, : blank.r], Vh[:, : blank.r])))


def sketched(blank: Blank, W: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
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
    kinds=MATRICES,
    changes_base=True,
    is_identity=True,
    needs="",
    fill=_pissa,
    is_exact=False,
    family=r"pissa_niter_\d{1,3}",
)
